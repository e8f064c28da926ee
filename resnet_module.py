"""The model: a residual network for small images, and the LightningModule that trains and tests it.

`ResNet` is plain PyTorch: images in, logits out. `ResNetModule` adds what training needs: input
scaling, loss, metrics, optimizer and scheduler, and everything that a checkpoint must remember.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

MOST_PARAMETERS = 10**9
Shortcut = Literal["conv3x3", "conv1x1", "pad"]


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (batch normalisation has one) that keeps H×W at stride 1."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


class PadShortcut(nn.Module):
    """Option A of He et al. 2015: every `stride`-th pixel, new channels of zeros, no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def shortcut_for(
    kind: Shortcut, in_channels: int, out_channels: int, stride: int
) -> nn.Module | None:
    """The shortcut of a block, None where the identity fits."""
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "pad":
        return PadShortcut(out_channels - in_channels, stride)
    kernel_size = 3 if kind == "conv3x3" else 1
    return nn.Sequential(
        conv(in_channels, out_channels, kernel_size, stride), nn.BatchNorm2d(out_channels)
    )


class Block(nn.Module):
    """The residual block of He et al. 2015 (arXiv:1512.03385): conv–BN–ReLU–conv–BN, add, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut_for(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += shortcut  # in place, as the ReLU: 3 % of a training step on a CPU
        return F.relu(out, inplace=True)


class PreactivationBlock(nn.Module):
    """The block of He et al. 2016 (arXiv:1603.05027): BN–ReLU–conv twice, nothing after the sum.

    Where shapes differ the shortcut branches off after the first BN–ReLU, and is that paper's bare
    convolution: what follows the sum is normalised by the next block.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels)
        downsample = shortcut_for(shortcut, in_channels, out_channels, stride)
        self.downsample = downsample[0] if isinstance(downsample, nn.Sequential) else downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(out)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True))


class ResNet(nn.Module):
    """A residual network of three stages for small images (He et al. 2015, section 4.2).

    A 3×3 stem, three stages of `width`, 2·`width` and 4·`width` channels, the second and third
    starting with stride 2, global average pooling, and a linear head. Its depth in the paper's
    count is 2·sum(`layers`) + 2: (3, 3, 3) is ResNet-20, (18, 18, 18) ResNet-110. The parameters
    are named as torchvision names them: layer1 to layer3 are the stages, downsample the shortcuts.

    Args:
        layers: Number of blocks in each of the three stages, 1 to 1,000.
        num_classes: Number of logits, 1 or more.
        shortcut: What joins two shapes: `conv3x3` (convolution and BN), `conv1x1` (option B of the
            paper) or `pad` (option A: subsampling and zeros, no parameters).
        preactivation: Use the blocks of He et al. 2016 instead.
        width: Channels of the stem and of the first stage, 1 to 4,096.

    Raises:
        ValueError: If an option is out of its range, or the network would have more than 10⁹
            parameters.
    """

    def __init__(
        self,
        layers: tuple[int, int, int] = (3, 3, 3),
        num_classes: int = 10,
        shortcut: Shortcut = "conv3x3",
        preactivation: bool = False,
        width: int = 16,
    ) -> None:
        super().__init__()
        if len(layers) != 3 or not all(1 <= blocks <= 1000 for blocks in layers):
            raise ValueError(
                f"layers is {layers}: it takes three numbers of blocks, 1 to 1,000 each"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: it must be 1 or more")
        if not 1 <= width <= 4096:
            raise ValueError(f"width is {width}: it must be 1 to 4,096 channels")
        if shortcut not in ("conv3x3", "conv1x1", "pad"):
            raise ValueError(f"shortcut is {shortcut!r}: choose conv3x3, conv1x1 or pad")
        # Two 3×3 convolutions in each block, and the head.
        parameters = 18 * sum(n * (width << i) ** 2 for i, n in enumerate(layers))
        parameters += 4 * width * num_classes
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"layers is {layers} with width {width} and {num_classes} classes: these are "
                f"{parameters:.1e} parameters, and {MOST_PARAMETERS:.0e} are the most"
            )

        block = PreactivationBlock if preactivation else Block

        def stage(index: int) -> nn.Sequential:
            channels, stride = width * 2**index, 1 if index == 0 else 2
            first = block(width if index == 0 else channels // 2, channels, stride, shortcut)
            rest = (block(channels, channels, 1, shortcut) for _ in range(layers[index] - 1))
            return nn.Sequential(first, *rest)

        self.preactivation = preactivation
        self.conv = conv(3, width)
        # Preactivation blocks begin with BN and ReLU, so theirs comes once, after the last block.
        self.bn = nn.BatchNorm2d(4 * width if preactivation else width)
        self.layer1, self.layer2, self.layer3 = stage(0), stage(1), stage(2)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps float images (N, 3, H, W), H and W 32 or more, to logits (N, num_classes)."""
        x = self.conv(images)
        if not self.preactivation:
            x = F.relu(self.bn(x), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.preactivation:
            x = F.relu(self.bn(x), inplace=True)
        return self.fc(x.mean(dim=(2, 3)))


class ResNetModule(LightningModule):
    """Trains, validates and tests a `ResNet` with cross-entropy; logs loss, accuracy and `lr`.

    Class names and input scaling are taken from the data at the start of `fit` and travel in the
    checkpoint, so that the trained network means the same wherever it is loaded.

    Args:
        normalize: Scale the input by mean and standard deviation of the training images, per
            channel; otherwise the network sees [0, 1].
        input_mean: What each channel of [0, 1] is reduced by, in place of the training images'
            mean: for a network that was trained elsewhere. Together with `input_std`.
        input_std: What each channel is then divided by, more than 0.
        optimizer: Any torch optimizer.
        lr_scheduler: Any torch learning-rate scheduler, or none. A `OneCycleLR` that leaves
            `total_steps` open (from Python: a `partial` with `total_steps=None`) takes the whole
            run for its cycle.
        lr_interval: When the scheduler steps: after each `epoch` or each optimizer `step`.
        label_smoothing: How much of each training label is spread over all classes, from 0 to less
            than 1 (Szegedy et al. 2015). `train/loss` is then that of smoothed labels; validation
            and test know only the labels as they are.
        **network: The options of `ResNet`.

    Raises:
        ValueError: If an option is out of its range.
    """

    mean: Tensor
    std: Tensor
    CHECK_EVERY = 50  # steps from one look at the losses to the next: on a GPU a look has to wait
    # Set by the fast path: trains on a batch of many mini-batches, and returns its logits.
    many_steps: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(
        self,
        normalize: bool = True,
        optimizer: OptimizerCallable = lambda params: Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: StepLR(
            optimizer, step_size=20, gamma=0.3333333333333333
        ),
        lr_interval: Literal["epoch", "step"] = "epoch",
        input_mean: tuple[float, float, float] | None = None,
        input_std: tuple[float, float, float] | None = None,
        label_smoothing: float = 0.0,
        **network: Any,
    ) -> None:
        super().__init__()
        if (input_mean is None) != (input_std is None):
            raise ValueError(
                f"input_mean is {input_mean} and input_std is {input_std}: give both or neither"
            )
        if input_std and min(input_std) <= 0:
            raise ValueError(f"input_std is {input_std}: each must be more than 0")
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {label_smoothing}: it must be 0 or more, and less than 1"
            )
        self.save_hyperparameters()
        for name in ("optimizer", "lr_scheduler"):
            # The command line's record of them is plain; a function from Python is not, and a
            # checkpoint with one would not load with weights_only.
            if callable(self.hparams[name]):
                del self.hparams[name]
        self.normalize = normalize
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.label_smoothing = label_smoothing
        self.network = ResNet(**network)
        self.network.to(memory_format=torch.channels_last)
        self.input_scaling_given = input_mean is not None
        self.register_buffer("mean", torch.tensor(input_mean or (0.0, 0.0, 0.0)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(input_std or (1.0, 1.0, 1.0)).view(3, 1, 1))
        num_classes = self.network.fc.out_features
        self.class_names = [str(label) for label in range(num_classes)]
        metrics = MetricCollection(
            {
                "loss": MeanMetric(nan_strategy="disable"),
                "acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            }
        )
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.rate = 0.0  # the learning rate at the start of the epoch
        # Steps before it, learning rate and losses of each batch that nobody has looked at yet.
        self._unchecked: list[tuple[int, float | Tensor, Tensor]] = []
        self._interrupted: dict[str, Any] | None = None  # what an epoch had come to
        # Epochs behind the checkpoint that training goes on from, and its scheduler's state.
        self._resumed: tuple[int, dict[str, Any]] = 0, {}

    def setup(self, stage: str) -> None:
        """Takes from the data what it has for the network: names, and in training the scaling."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "class_names"):
            self.class_names = list(data.class_names)
        if stage != "fit" or not self.normalize or self.input_scaling_given:
            return
        if not hasattr(data, "channel_statistics"):
            raise MisconfigurationException(
                "normalize is True, but the data has no channel_statistics(): "
                "use CIFARDataModule, or ResNetModule(normalize=False) on images of your own scale"
            )
        mean, std = data.channel_statistics()
        self.mean.copy_(mean.view(3, 1, 1))
        self.std.copy_(std.view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Maps float images (N, 3, H, W) in [0, 1] to logits (N, num_classes)."""
        return self.network(((images - self.mean) / self.std).to(self.mean.dtype))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss (N,) of each image: cross-entropy, in training with smoothed labels."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def _score(self, logits: Tensor, labels: Tensor, metrics: MetricCollection) -> Tensor:
        """The loss of each image, and both metrics brought up to date."""
        losses = self.losses(logits, labels)
        # One by one: torchmetrics 1.9 forgets the weight of a mean when NaN checks are off.
        metrics["loss"].update(losses.detach())
        metrics["acc"].update(logits, labels)
        return losses

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        images, labels = batch
        logits = self.many_steps(images, labels) if self.many_steps else self(images)
        losses = self._score(logits, labels, self.train_metrics)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._unchecked.append((self.trainer.global_step, rate, losses.detach()))
        if len(self._unchecked) >= self.CHECK_EVERY:
            self.check_losses()
        loss = losses.mean()
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and (self.many_steps or batch_idx % interval == 0):
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return None if self.many_steps else loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        if self.many_steps and optimizer_closure:
            optimizer_closure()  # it is training_step, which has taken the steps
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the logits (N, num_classes), for callbacks to look at."""
        images, labels = batch
        self._score(logits := self(images), labels, self.val_metrics)
        return logits

    def test_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the logits (N, num_classes), for callbacks to look at."""
        images, labels = batch
        self._score(logits := self(images), labels, self.test_metrics)
        return logits

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the probabilities (N, num_classes), float32, of a batch of images."""
        return self(batch[0]).float().softmax(dim=1)

    def check_losses(self) -> None:
        """Looks at the losses since the last time.

        Raises:
            FloatingPointError: If one is not finite, in any process.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        last = self.trainer.global_step
        bad, rate = last + 1, unchecked[-1][1]  # none so far
        if not torch.cat([losses for _, _, losses in unchecked]).isfinite().all():
            step, rate, losses = next(part for part in unchecked if not part[2].isfinite().all())
            image = int((~losses.isfinite()).nonzero()[0])
            # The fast path takes many steps at once.
            bad = step + image // self.trainer.datamodule.batch_size if self.many_steps else step  # type: ignore[attr-defined]
        if self.trainer.world_size > 1:
            number = torch.tensor(float(bad), device=self.device)
            bad = int(self.trainer.strategy.reduce(number, reduce_op="min"))
        if bad <= last:
            self._refuse(f"the loss is not finite (nan or inf) in step {bad + 1}", rate)

    def _refuse(self, fault: str, rate: float | Tensor) -> None:
        cycle = "max_lr" in self.trainer.optimizers[0].param_groups[0]  # which the rate follows
        option = "--model.lr_scheduler.max_lr" if cycle else "--model.optimizer.lr"
        raise FloatingPointError(
            f"{fault}, in epoch {self.current_epoch + 1}, at a learning rate of {float(rate):g}: "
            "training has stopped, and its checkpoints are those from before. Try a lower rate "
            f"({option}) or --trainer.gradient_clip_val 1"
        )

    # Metrics are logged once per epoch: in every step it would cost more than the metrics do.
    def on_train_epoch_end(self) -> None:
        self.check_losses()
        self.log("lr", self.rate)
        self.log_dict(self.train_metrics, prog_bar=True)
        self._log_against_epochs()
        if plateau := self._plateau():
            metrics = self.trainer.callback_metrics
            if plateau.monitor in metrics:
                plateau.step(metrics[plateau.monitor])

    def _plateau(self) -> ReduceLROnPlateau | None:
        """The scheduler, if it is one that looks at a metric after each epoch."""
        scheduler = self.lr_schedulers()
        waits = isinstance(scheduler, ReduceLROnPlateau) and self.lr_interval == "epoch"
        return scheduler if waits else None  # type: ignore[return-value]

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        # Lightning would step it after the epoch's checkpoint is saved, and not at all in a run
        # that goes on from that.
        if self._plateau() is None:
            super().lr_scheduler_step(scheduler, metric)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics, prog_bar=True)
        self._log_against_epochs()

    def _log_against_epochs(self) -> None:
        """Has Lightning log against the epochs done, not the steps, which depend on the batch."""
        self.log("step", float(self.current_epoch + 1))

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics)

    def on_train_epoch_start(self) -> None:
        self.rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_start(self) -> None:
        """Takes up what an interrupted epoch had come to; of several processes, the first does."""
        epoch, self._interrupted = self._interrupted, None
        if epoch is None:
            return
        self.rate = epoch["rate"]
        for name, states in epoch["metrics"].items() if self.trainer.is_global_zero else ():
            metric = self.train_metrics[name]
            metric._update_count = 1  # it has been: there is no need to warn
            for state, value in states.items():
                setattr(metric, state, value.to(metric.device))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes the optimizer and the scheduler.

        Raises:
            MisconfigurationException: If the scheduler's steps and those of the run do not match.
        """
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        if total := getattr(scheduler, "total_steps", None):
            self._check_cycle(total, steps_of_run(self.trainer, self.lr_interval))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": self.lr_interval,
                "monitor": getattr(scheduler, "monitor", None),  # ReduceLROnPlateau has one
            },
        }

    def schedule(
        self, optimizer: Optimizer, steps: float | None = None
    ) -> LRScheduler | ReduceLROnPlateau:
        """The scheduler; one that leaves `total_steps` open takes `steps`, or those of the run."""
        assert self.lr_scheduler is not None
        if not self._takes_the_run():
            return self.lr_scheduler(optimizer)
        total = steps_of_run(self.trainer, self.lr_interval) if steps is None else steps
        if math.isinf(total):
            raise MisconfigurationException(
                "the scheduler's total_steps is None, and nothing limits the run: give "
                "--model.lr_scheduler.total_steps or --trainer.max_epochs"
            )
        try:
            return self.lr_scheduler(optimizer, total_steps=int(total))  # type: ignore[call-arg]
        except (ValueError, ZeroDivisionError) as error:
            raise MisconfigurationException(
                f"the scheduler cannot take the run's {int(total)} {self.lr_interval}s for its "
                f"cycle ({error}): train for longer, or give --model.lr_scheduler.total_steps"
            ) from error

    def _takes_the_run(self) -> bool:
        """Whether the scheduler leaves it to the run how many steps it has."""
        given = self.lr_scheduler.keywords if isinstance(self.lr_scheduler, partial) else {}
        return given.get("total_steps", 0) is None and given.get("epochs") is None

    def _check_cycle(self, has: int, needs: float) -> None:
        """Refuses to train beyond a scheduler's last step; says where training ends before it."""
        if has < needs < math.inf:
            raise MisconfigurationException(
                f"the run takes {needs:.0f} {self.lr_interval}s from here, and its scheduler has "
                f"{has} left of its total_steps: begin a new run, or train for less long"
            )
        if self._takes_the_run() and needs < has:
            self.print(
                f"The run ends {has - needs:.0f} {self.lr_interval}s before its learning rate does"
            )

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "ResNetModule":
        """Lightning's, but nothing in the environment makes it run what a file holds."""
        return super().load_from_checkpoint(*args, **{"weights_only": True, **kwargs})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning does not know of.

        Raises:
            FloatingPointError: If training has failed, so that the checkpoint would be spoilt.
        """
        checkpoint["class_names"] = self.class_names
        if self._trainer is None or (not self.trainer.training and not self.trainer.validating):
            return
        self.check_losses()
        weights = [
            value for value in checkpoint["state_dict"].values() if value.is_floating_point()
        ]
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            step = self.trainer.global_step
            self._refuse(f"a weight is not finite (nan or inf) after step {step}", self.rate)
        if not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            metrics = {name: totals(metric) for name, metric in self.train_metrics.items(True)}
            checkpoint["interrupted_epoch"] = {"rate": self.rate, "metrics": metrics}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._interrupted = checkpoint.get("interrupted_epoch")
        names = checkpoint["class_names"]
        data: Any = self._trainer and self.trainer.datamodule  # type: ignore[attr-defined]
        if data and list(getattr(data, "class_names", names)) != names:
            raise MisconfigurationException(
                f"the checkpoint was trained on the classes {names}, but the data has "
                f"{list(data.class_names)}: use the data set that it was trained on"
            )
        check_state_dict(checkpoint["state_dict"], self, "the checkpoint")
        self.class_names = names
        schedulers: list[dict[str, Any]] = checkpoint.get("lr_schedulers", [])
        self._resumed = checkpoint["epoch"] + (self._interrupted is None), dict(*schedulers)

    def on_fit_start(self) -> None:
        """Checks that what is left of a run suits what is left of its scheduler's steps.

        Raises:
            MisconfigurationException: If the run would go on beyond them.
        """
        (behind, scheduler), self._resumed = self._resumed, (0, {})
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if "total_steps" not in scheduler or not hasattr(data, "batches_done"):
            return
        if self.lr_interval == "step":
            into_epoch = (data.batches_done() or 0) / self.trainer.accumulate_grad_batches
            behind = behind * steps_per_epoch(self.trainer) + math.ceil(into_epoch)
        left = scheduler["total_steps"] - scheduler["last_epoch"]
        self._check_cycle(left, steps_of_run(self.trainer, self.lr_interval) - behind)

    def load_network(self, state_dict: Mapping[str, Any], name: str | Path = "it") -> None:
        """Loads the weights of a bare network; `name` stands for them in an error.

        Raises:
            MisconfigurationException: If they do not fit the network.
        """
        check_state_dict(state_dict, self.network, str(name))
        self.network.load_state_dict(state_dict)


def totals(metric: Metric) -> dict[str, Tensor]:
    """The sums that a metric is made of, over all processes."""
    with metric.sync_context():
        states: dict[str, Any] = metric.metric_state
        return {name: value.detach().cpu().clone() for name, value in states.items()}


def check_state_dict(state_dict: Mapping[str, Any], module: nn.Module, name: str) -> None:
    """Raises a MisconfigurationException in one sentence unless `state_dict` fits `module`."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {
        key: tuple(value.shape) for key, value in state_dict.items() if hasattr(value, "shape")
    }
    for key in expected.keys() - found.keys():
        if key.endswith("num_batches_tracked"):  # files of PyTorch 0.3, the note's, have none
            del expected[key]
    faults = (
        [f"it lacks {key}" for key in expected.keys() - found.keys()]
        + [f"it has an unknown {key}" for key in found.keys() - expected.keys()]
        + [
            f"{key} is {found[key]} and should be {expected[key]}"
            for key in expected.keys() & found.keys()
            if found[key] != expected[key]
        ]
    )
    if faults:
        raise MisconfigurationException(
            f"{name} does not fit the network: {sorted(faults)[0]} "
            f"({len(faults)} such faults); "
            "give the options that the network was trained with (layers, width, shortcut, the "
            "data set, ...)"
        )


def steps_of_run(trainer: Trainer, interval: Literal["epoch", "step"]) -> float:
    """Epochs or optimizer steps of a whole run, from its first; `inf` where nothing limits it."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
    if interval == "epoch":
        return epochs
    if not hasattr(trainer.datamodule, "batches_per_epoch"):  # type: ignore[attr-defined]
        return trainer.estimated_stepping_batches
    steps = steps_per_epoch(trainer) * epochs
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps of a whole epoch of a `CIFARDataModule`.

    Lightning's own estimate would build the batches, before the fast path has chosen their size,
    and count but the rest of an epoch that was interrupted.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batches, limit = data.batches_per_epoch(), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)
