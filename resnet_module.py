"""The model: a residual network for small images, and the LightningModule that trains and tests it.

`ResNet` is plain PyTorch: images in, logits out. `ResNetModule` adds what training needs: input
scaling, loss, metrics, optimizer and learning-rate schedule.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cifar_resnet.augment import dominant_labels
from cifar_resnet.checkpoint import TRAINING_ONLY, known_options, load_weights
from cifar_resnet.messages import UserError

Shortcut = Literal["conv3x3", "conv1x1", "pad", "pool"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": partial(F.relu, inplace=True), "silu": F.silu}
BAR_INTERVAL = 10  # steps from one loss in the progress bar to the next


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


def make_shortcut(
    kind: Shortcut, in_channels: int, out_channels: int, stride: int, norm: bool = True
) -> nn.Module | None:
    """The shortcut of a block; None where the identity fits."""
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "pad":
        return PadShortcut(out_channels - in_channels, stride)
    if kind == "pool":
        pool = nn.AvgPool2d(stride, ceil_mode=True)  # rounds odd sizes up, as a convolution does
        return nn.Sequential(pool, PadShortcut(out_channels - in_channels, stride=1))
    kernel_size = {"conv3x3": 3, "conv1x1": 1}[kind]
    projection = conv(in_channels, out_channels, kernel_size, stride)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels)) if norm else projection


class BlockOptions(NamedTuple):
    """What all blocks of a network share."""

    shortcut: Shortcut
    activation: Activation


class BasicBlock(nn.Module):
    """The block of He et al. 2015 (arXiv:1512.03385): conv–BN–ReLU–conv–BN, add, ReLU."""

    expansion = 1  # output channels for each channel of its 3×3 convolutions

    def __init__(self, in_channels: int, channels: int, stride: int, options: BlockOptions) -> None:
        super().__init__()
        self.activation = options.activation
        self.conv1 = conv(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = make_shortcut(options.shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut  # in place, as the ReLU: 3 % of a training step on a CPU
        return self.activation(out)


class Bottleneck(nn.Module):
    """The block of He et al. 2015 for deep networks: 1×1, 3×3 and 1×1 convolution.

    The stride is on the 3×3 convolution, as in torchvision; the paper has it on the first 1×1.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, options: BlockOptions) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.activation = options.activation
        self.conv1 = conv(in_channels, channels, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, kernel_size=1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = make_shortcut(options.shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.activation(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.activation(out)


class PreActBlock(nn.Module):
    """The block of He et al. 2016 (arXiv:1603.05027): BN–ReLU–conv twice, nothing after the sum.

    Where shapes differ the shortcut branches off after the first BN–ReLU. It is that paper's bare
    convolution: the next block normalises the sum.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, options: BlockOptions) -> None:
        super().__init__()
        self.activation = options.activation
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels)
        self.downsample = make_shortcut(options.shortcut, in_channels, channels, stride, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        return shortcut + self.conv2(self.activation(self.bn2(self.conv1(out))))


class PreActBottleneck(nn.Module):
    """The bottleneck of He et al. 2016: BN–ReLU–conv three times, with `PreActBlock`'s shortcut.

    The stride is on the 3×3 convolution; the paper's code has it on the first 1×1.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, options: BlockOptions) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.activation = options.activation
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, kernel_size=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, stride=stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, outputs, kernel_size=1)
        self.downsample = make_shortcut(options.shortcut, in_channels, outputs, stride, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv2(self.activation(self.bn2(self.conv1(out))))
        return shortcut + self.conv3(self.activation(self.bn3(out)))


Block = type[BasicBlock] | type[Bottleneck] | type[PreActBlock] | type[PreActBottleneck]
BLOCKS: dict[tuple[str, bool], Block] = {  # by the options `block` and `preactivation`
    ("basic", False): BasicBlock,
    ("basic", True): PreActBlock,
    ("bottleneck", False): Bottleneck,
    ("bottleneck", True): PreActBottleneck,
}


class ResNet(nn.Module):
    """A residual network of three stages for small images (He et al. 2015, section 4.2).

    A 3×3 stem, three stages whose 3×3 convolutions have `width`, 2·`width` and 4·`width` channels,
    the second and third starting with stride 2, global average pooling, and a linear head. With n
    blocks in each stage the paper's depth is 6n + 2 for basic blocks and 9n + 2 for bottlenecks:
    n = 3 is ResNet-20, n = 18 ResNet-110, or ResNet-164 of bottlenecks. The stages are layer1 to
    layer3; the names inside of them are torchvision's: conv1, bn1, ..., downsample.

    Args:
        layers: Number of blocks in each of the three stages.
        num_classes: Number of logits.
        shortcut: What joins two shapes: `conv3x3` (convolution and BN), `conv1x1` (option B of the
            paper), `pad` (option A: subsampling and zeros, no parameters), or `pool`: option A with
            the mean of 2×2 pixels, as ResNet-D averages (He et al. 2018, arXiv:1812.01187).
        preactivation: Use the blocks of He et al. 2016 instead.
        block: `basic` has two 3×3 convolutions; `bottleneck` has one between two 1×1 convolutions,
            and four times as many channels outside.
        width: Channels of the stem and of the first stage's 3×3 convolutions.
        activation: `relu`, or `silu`, x·sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118).
    """

    def __init__(
        self,
        layers: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 3, 3),
        num_classes: PositiveInt = 10,
        shortcut: Shortcut = "conv3x3",
        preactivation: bool = False,
        block: Literal["basic", "bottleneck"] = "basic",
        width: PositiveInt = 16,
        activation: Literal["relu", "silu"] = "relu",
    ) -> None:
        super().__init__()
        make_block = BLOCKS[block, preactivation]
        options = BlockOptions(shortcut, ACTIVATIONS[activation])

        def stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
            first = make_block(in_channels, channels, stride, options)
            out_channels = make_block.expansion * channels
            rest = [make_block(out_channels, channels, 1, options) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.activation = options.activation
        self.preactivation = preactivation
        narrow = make_block.expansion * width  # channels that leave the first stage
        self.conv = conv(3, width)
        # Preactivation blocks begin with BN and ReLU, so theirs comes once, after the last block.
        self.bn = nn.BatchNorm2d(4 * narrow if preactivation else width)
        self.layer1 = stage(layers[0], width, width, stride=1)
        self.layer2 = stage(layers[1], narrow, 2 * width, stride=2)
        self.layer3 = stage(layers[2], 2 * narrow, 4 * width, stride=2)
        self.fc = nn.Linear(4 * narrow, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps float images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.conv(images)
        if not self.preactivation:
            x = self.activation(self.bn(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.preactivation:
            x = self.activation(self.bn(x))
        return self.fc(x.mean(dim=(2, 3)))


class ResNetModule(LightningModule):
    """Trains, validates and tests a `ResNet` with cross-entropy; logs loss, accuracy and `lr`.

    Class names and, in `fit`, the input scaling are taken from the data. They travel in the
    checkpoint, so that a loaded network gives the same predictions everywhere. On the command
    line another optimizer or scheduler keeps the options that it shares with the default one, such
    as `lr` or `gamma`, unless they are given.

    Args:
        normalize: Scale the input by mean and standard deviation of the training images, per
            channel; otherwise the network sees [0, 1].
        optimizer: Any torch optimizer.
        lr_scheduler: Any torch learning-rate scheduler, or none. A `OneCycleLR` whose `total_steps`
            is null takes the whole run for its cycle; in Python give it as
            `partial(OneCycleLR, max_lr=..., total_steps=None)`.
        lr_interval: When the scheduler steps: after each `epoch` or each optimizer `step`.
        input_mean: Subtracted from each channel of [0, 1] instead of the training images' mean:
            for a network that was trained elsewhere. Together with `input_std`.
        input_std: What each channel is then divided by.
        label_smoothing: Share of each training label that is spread over all classes (Szegedy et
            al. 2015, arXiv:1512.00567), 0 to 1. Validation and test never smooth.
        compile: Mode of torch.compile for training; by default nothing is compiled. Evaluation
            never is. Not saved in checkpoints.
        **network: The options of `ResNet`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        normalize: bool = True,
        optimizer: OptimizerCallable = lambda params: Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = lambda optimizer: StepLR(
            optimizer, step_size=20, gamma=0.3333333333333333
        ),
        lr_interval: Literal["epoch", "step"] = "epoch",
        input_mean: tuple[float, float, float] | None = None,
        input_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None,
        label_smoothing: ClosedUnitInterval = 0.0,
        compile: CompileMode | None = None,
        **network: Any,
    ) -> None:
        super().__init__()
        if (input_mean is None) != (input_std is None):
            raise UserError("input_mean and input_std belong together: give both or neither")
        self.save_hyperparameters(ignore=["compile"], logger=False)
        for name in TRAINING_ONLY:
            # The command line passes plain data. Python code passes functions, which a checkpoint
            # that is read safely cannot hold.
            if callable(self.hparams[name]):
                del self.hparams[name]
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.compile_mode = compile
        self.network = ResNet(**network)
        self.register_buffer("mean", torch.tensor(input_mean or (0.0, 0.0, 0.0)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(input_std or (1.0, 1.0, 1.0)).view(3, 1, 1))
        self.class_names: list[str] = []
        num_classes = self.network.fc.out_features
        # Checking for NaN would make a GPU wait; the TerminateOnNaN callback checks.
        loss = MeanMetric(nan_strategy="disable")
        acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        metrics = MetricCollection({"loss": loss, "acc": acc})
        self.train_metrics = metrics.clone(prefix="train/")
        self.eval_metrics = metrics.clone(prefix="val/")

    def setup(self, stage: str) -> None:
        """Takes class names, the images' size and, for `fit`, input scaling from the data."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = [str(name) for name in getattr(data, "class_names", [])]  # not NumPy's strings
        self.class_names = common_names(self.class_names, names)
        side = getattr(data, "hparams", {}).get("image_size", 32)
        self.example_input_array = torch.zeros(1, 3, side, side)  # the summary counts its FLOPs
        if stage == "fit" and self.hparams["normalize"] and self.hparams["input_mean"] is None:
            mean, std = data.channel_statistics
            self.mean.copy_(mean.view(3, 1, 1))
            self.std.copy_(std.view(3, 1, 1))

    def on_fit_start(self) -> None:
        """Compiles the network, after callbacks have counted its FLOPs.

        Where they are counted on a compiled network, torch before 2.14 may leave it uncompiled:
        https://github.com/pytorch/pytorch/issues/190286
        """
        if self.compile_mode:
            self.network.compile(mode=self.compile_mode, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps float images (N, 3, H, W) in [0, 1] to logits (N, num_classes)."""
        images = ((images - self.mean) / self.std).to(self.mean.dtype)
        if self.training or not self.compile_mode:
            return self.network(images)
        # Compiling the network for evaluation as well takes longer than it saves.
        with torch.compiler.set_stance("force_eager"):
            return self.network(images)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss (N,) of each image: cross-entropy, in training with smoothed labels."""
        smoothing = self.hparams["label_smoothing"] if self.training else 0.0
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def shared_step(
        self, batch: tuple[Tensor, Tensor], metrics: MetricCollection
    ) -> tuple[Tensor, Tensor]:
        """Updates the metrics; returns the loss (N,) and the logits (N, num_classes) of a batch."""
        images, labels = batch
        logits = self(images)
        losses = self.losses(logits, labels)
        # The loss of each image, so that all count the same, whatever the size of their batch.
        metrics["loss"].update(losses.detach())
        metrics["acc"].update(logits, dominant_labels(labels))
        return losses, logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        losses, _ = self.shared_step(batch, self.train_metrics)
        loss = losses.mean()
        if batch_idx % BAR_INTERVAL == 0:
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the probabilities (N, num_classes), float32, which callbacks collect."""
        _, logits = self.shared_step(batch, self.eval_metrics)
        return logits.float().softmax(dim=1)

    test_step = validation_step

    # Metrics are logged once per epoch: in every step that would cost more than computing them.
    # Logging "step" makes the epochs done the x axis of all curves.
    def on_train_epoch_start(self) -> None:
        self.lr = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        # Otherwise a ModelCheckpoint that saves within this epoch would use the last one's number.
        self.trainer.callback_metrics.pop("step", None)

    def on_train_epoch_end(self) -> None:
        self.log("lr", self.lr)
        self.log_dict(self.train_metrics)
        self.log("step", float(self.current_epoch + 1))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.eval_metrics)
        self.log("step", float(self.current_epoch + 1))

    def on_test_epoch_end(self) -> None:
        metrics = self.eval_metrics.items(keep_base=True)
        self.log_dict({f"test/{name}": metric for name, metric in metrics})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        interval, length = self.hparams["lr_interval"], dict[str, Any]()
        # From the command line it is a functools.partial with all options of the class.
        given = getattr(self.lr_scheduler, "keywords", {})
        is_open = "total_steps" in given and given["total_steps"] is None
        if is_open and given.get("epochs") is None:
            steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs
            length["total_steps"] = steps if interval == "step" else epochs
        scheduler: Any = self.lr_scheduler(optimizer, **length)
        monitor, frequency = getattr(scheduler, "monitor", None), 1
        # A validation metric changes only after a validation.
        if interval == "epoch" and str(monitor).startswith("val"):
            frequency = self.trainer.check_val_every_n_epoch or 1
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": interval,
                "monitor": monitor,
                "frequency": frequency,
            },
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # In `fit` Lightning loads it after `setup`: the data's names are here already.
        self.class_names = common_names(checkpoint["class_names"], self.class_names)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "ResNetModule":
        """A trained network, in eval mode on the CPU, from what `read_checkpoint` returns.

        Raises:
            UserError: If the weights do not fit the stored options.
        """
        options = known_options(checkpoint["hyper_parameters"], cls, ResNet)
        for name in TRAINING_ONLY:
            options.pop(name, None)
        module = cls(**options)
        load_weights(module, checkpoint)
        num_classes = module.network.fc.out_features
        module.class_names = checkpoint["class_names"] or [str(i) for i in range(num_classes)]
        return module.eval()


def common_names(trained: list[str], data: list[str]) -> list[str]:
    """The class names of a checkpoint and of the data, either of which may lack them.

    Raises:
        UserError: If they differ: labels would mean other classes.
    """
    if trained and data and trained != data:
        raise UserError(
            f"the checkpoint was trained on the classes {trained}, but the data has {data}: use "
            "the data set that it was trained on"
        )
    return trained or data
