"""The fast path on one CUDA GPU: training steps recorded once as a CUDA graph, then replayed.

A step of a small network is hundreds of kernels of a few microseconds each; launching them from
Python takes longer than running them, and so does what Lightning does around a step. `CUDAGraphs`
puts the images on the GPU, hands `training_step` many mini-batches at a time and replays one
recording for each of them. The mini-batches, the optimizer steps and their order stay the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from cifar_datamodule import CIFARDataModule
from interruptions import Interruptions
from resnet_module import ResNetModule

DEVICE = "cuda"
WARM_UPS = 3  # steps before the recording: cuDNN chooses its kernels, the optimizer makes its state
# Hooks that Lightning calls at every step; they would be called once for each chunk, or never.
STEP_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
# Of Lightning's own callbacks these only look on; the others interfere with training.
ONLOOKERS = (EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar, SaveConfigCallback)

Step = Callable[[Tensor, Tensor], Tensor]


class Recording:
    """A training step as a CUDA graph: replayed on other images, it writes to the same logits."""

    def __init__(self, step: Step) -> None:
        self.step = step
        # The same throughout: what a warm-up sets up for it, the recording finds there.
        self.stream = torch.cuda.Stream()

    def warm_up(self, images: Tensor, labels: Tensor) -> Tensor:
        """Takes the step as it is."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            logits = self.step(images, labels)
        torch.cuda.current_stream().wait_stream(self.stream)
        return logits

    def record(self, images: Tensor, labels: Tensor) -> None:
        """Writes down what the step does, without doing it."""
        self.images, self.labels = images.clone(), labels.clone()
        self.graph = torch.cuda.CUDAGraph()
        here = torch.cuda.stream(torch.cuda.current_stream())  # to return to, should it fail
        with here, torch.cuda.graph(self.graph, stream=self.stream):
            self.logits = self.step(self.images, self.labels)

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        """Does it."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.logits


class TrainingSteps:
    """Trains on a chunk of mini-batches, one optimizer step for each.

    Args:
        module: What is trained.
        optimizer: Its optimizer, made recordable.
        batch_size: Images in a mini-batch.
        between: Called after each step of a chunk but the last.
    """

    def __init__(
        self,
        module: ResNetModule,
        optimizer: Optimizer,
        batch_size: int,
        between: Callable[[], None],
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.between = between
        self.recording: Recording | None = Recording(self.step)
        self.recording_holds = False
        self.warm_ups = 0
        self.recorded: list[Any] = []  # what a recording has built in
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Takes the steps of a chunk.

        Args:
            images: (N, 3, H, W), float.
            labels: (N,), int64.

        Returns:
            (N, num_classes), what each mini-batch's network, before its step, made of the images.
        """
        built_in = self._built_in()
        if built_in != self.recorded:
            # From the start: what is new may need kernels and optimizer state of its own.
            self.recorded, self.recording_holds, self.warm_ups = built_in, False, 0
        logits: list[Tensor] = []
        for batch in zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True):
            if logits:
                self.between()
            logits.append(self._fastest(*batch).clone())  # the next replay overwrites them
        return torch.cat(logits)

    def _fastest(self, images: Tensor, labels: Tensor) -> Tensor:
        """Replays the step if it can, records it first if need be, or takes it as it is."""
        if self.recording is None or len(images) != self.batch_size:
            return self.step(images, labels)
        if self.warm_ups < WARM_UPS:
            self.warm_ups += 1
            return self.recording.warm_up(images, labels)
        self._fill_rates()
        if not self.recording_holds:
            self.recording_holds = True
            self.optimizer.zero_grad()  # a recording has to make its own gradients
            try:
                self.recording.record(images, labels)
            except RuntimeError as error:
                say(f"Training without CUDA graphs, for a step could not be recorded: {error}")
                self.recording = None
                return self.step(images, labels)
        return self.recording.replay(images, labels)

    def _built_in(self) -> list[Any]:
        """What a graph takes for constant: settings but the rate, what is trained, and where."""
        return [
            [{**group, "params": None, "lr": None} for group in self.optimizer.param_groups],
            [(value.data_ptr(), value.requires_grad) for value in self.module.parameters()],
            [module.training for module in self.module.modules()],
        ]

    def _fill_rates(self) -> None:
        """A graph reads learning rates from tensors: one assigned since is written into them."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward, optimizer: what Lightning does with a batch.

        Autocast must not cache weights, which change within a chunk; Lightning's does not.
        """
        logits = self.module(images)
        loss = self.module.losses(logits, labels).mean()
        with torch.autocast(images.device.type, enabled=False):
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return logits.detach()


class CUDAGraphs(Callback):
    """Trains with recorded steps where that serves, and says why where a GPU has to do without.

    Args:
        steps: Optimizer steps in each chunk that `training_step` gets. Lightning's batches, as the
            progress bar counts them, are chunks then; its global step still counts optimizer steps.
            0 trains step by step.

    Raises:
        ValueError: If `steps` is negative.
    """

    def __init__(self, steps: int = 50) -> None:
        if steps < 0:
            raise ValueError(f"cuda_graphs.steps is {steps}: it must be 0 or more")
        self.steps = steps
        self.plain_settings: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decides, and if so has the data ready on the GPU in chunks."""
        self.plain_settings = []
        if isinstance(pl_module, ResNetModule):
            pl_module.many_steps = None  # that of an earlier fit, had it been interrupted
        if pl_module.device.type != DEVICE or not self.steps:
            return
        if reason := obstacle(trainer, pl_module, self.steps):
            say(f"Training step by step, without CUDA graphs: {reason}")
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.keep_on(pl_module.device, self.steps)
        self.plain_settings = [dict(group) for group in trainer.optimizers[0].param_groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Readies the optimizer, after a checkpoint has been loaded into it."""
        if not self.plain_settings:
            return
        assert isinstance(pl_module, ResNetModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        make_recordable(trainer.optimizers[0], pl_module.device)
        pl_module.many_steps = TrainingSteps(
            pl_module, trainer.optimizers[0], data.batch_size, lambda: count_step(trainer)
        )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leaves no trace of the fast path, so that any machine can go on with the run."""
        if not self.plain_settings:
            return
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        for group, plain in zip(groups, self.plain_settings, strict=True):
            group["lr"] = float(group["lr"])
            group.update({name: plain[name] for name in ("fused", "capturable") if name in plain})
        for scheduler in checkpoint["lr_schedulers"]:
            if "_last_lr" in scheduler:
                scheduler["_last_lr"] = [float(rate) for rate in scheduler["_last_lr"]]

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning does not call then

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Frees the recording and its memory."""
        if isinstance(pl_module, ResNetModule):
            pl_module.many_steps = None


def obstacle(trainer: Trainer, module: LightningModule, steps: int) -> str | None:
    """What keeps a run from the fast path in chunks of `steps`, None if nothing does."""
    options: Any = trainer
    data, optimizer = options.datamodule, trainer.optimizers[0]
    reasons = {
        "the model is not a plain ResNetModule": type(module) is not ResNetModule,
        "the data is not a plain CIFARDataModule": type(data) is not CIFARDataModule,
        "several processes train": type(trainer.strategy) is not SingleDeviceStrategy,
        f"trainer.precision {trainer.precision} scales its losses": (
            getattr(trainer.precision_plugin, "scaler", None) is not None
        ),
        "batches accumulate gradients": trainer.accumulate_grad_batches != 1,
        "gradients are clipped": bool(trainer.gradient_clip_val),
        "the number of training batches is limited": not is_all(trainer.limit_train_batches),
        "the number of steps is limited": trainer.max_steps != -1 or bool(trainer.min_steps),
        "validation comes within an epoch": not is_all(trainer.val_check_interval),
        "anomalies are looked for": bool(options._detect_anomaly),
        "data.num_workers is not 0": getattr(data, "num_workers", 0) != 0,
        f"{type(optimizer).__name__} is not one of Adam, AdamW and SGD": (
            type(optimizer) not in (Adam, AdamW, SGD)
        ),
        "the optimizer is differentiable": bool(optimizer.defaults.get("differentiable")),
        "the scheduler does more at every step than to set the rate": any(
            (config.reduce_on_plateau or getattr(config.scheduler, "cycle_momentum", False))
            and config.interval == "step"
            for config in trainer.lr_scheduler_configs
        ),
        "the images would fill the GPU's memory": not fits(data, steps, module.device),
    }
    reasons |= {
        f"{type(callback).__name__} may act at every step": interferes(callback)
        for callback in options.callbacks
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def is_all(limit: float | None) -> bool:
    """Whether a limit of Lightning's is none: 1.0, where 1 is one batch."""
    return isinstance(limit, float) and limit == 1.0


def fits(data: Any, steps: int, device: torch.device) -> bool:
    """Whether all images and a chunk, of which there are copies, leave half of the memory free."""
    if device.type != "cuda" or type(data) is not CIFARDataModule:
        return True
    images = data.train_set.images.nbytes + data.val_set.images.nbytes
    chunk = steps * data.batch_size * 3 * data.image_size**2 * 4  # bytes, float32
    return images + 4 * chunk < torch.cuda.mem_get_info(device)[0] / 2


def interferes(callback: Callback) -> bool:
    """Whether a callback may do more between two steps than to look on."""
    if isinstance(callback, Interruptions):
        return False  # it saves what it finds, between chunks as between steps
    if isinstance(callback, ModelCheckpoint) and (
        callback._every_n_train_steps or callback._train_time_interval or callback.save_on_exception
    ):
        return True
    known = next(
        kind for kind in type(callback).__mro__ if kind.__module__.startswith("lightning.")
    )
    if known is not Callback and not issubclass(known, ONLOOKERS):
        return True
    return any(getattr(type(callback), hook) is not getattr(known, hook) for hook in STEP_HOOKS)


def make_recordable(optimizer: Optimizer, device: torch.device) -> None:
    """Keeps an optimizer's step count and learning rate on the GPU, where a recording finds them.

    torch's schedulers fill a learning rate that is a tensor with its new value.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["fused"] = True
        if "capturable" in group:
            group["capturable"] = True
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].to(device)


def count_step(trainer: Trainer) -> None:
    """What Lightning does after an optimizer step of its own."""
    loop = trainer.fit_loop.epoch_loop
    loop.update_lr_schedulers("step", update_plateau_schedulers=False)
    progress = loop.automatic_optimization.optim_progress.optimizer.step
    progress.increment_ready()
    progress.increment_completed()
    loop._batches_that_stepped += 1


def say(line: str) -> None:
    print(line, flush=True)
