"""What one sees of a training run: lines and a bar in the terminal, pictures in TensorBoard."""

import copy
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from checkpoints import write
from report import (
    Predictions,
    as_json,
    as_png,
    confusion_figure,
    confusions,
    curves_figure,
    gallery,
    mistakes_figure,
)

SHOWN = 40  # images of the augmented batch
# TensorBoard's custom scalars: what belongs together, in one chart.
CHARTS = {
    "training and validation": {
        "loss": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "accuracy": ["Multiline", ["^train/acc$", "^val/acc$"]],
    },
    "validation accuracy": {"of each class": ["Multiline", ["^val_class/"]]},
    "optimisation": {
        "learning rate": ["Multiline", ["^lr$"]],
        "images per second": ["Multiline", ["^images_per_second$"]],
    },
}


class SayTimeOnCPU(Callback):
    """Says how long training will take where the CPU has to do it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 or trainer.accumulate_grad_batches > 1:
            say(
                f"Global batch: {global_batch(trainer)} images for each optimizer step, of "
                f"{trainer.world_size} processes × {trainer.accumulate_grad_batches} batches"
            )
        if pl_module.device.type != "cpu":
            return
        seconds = seconds_per_step(trainer, pl_module) * trainer.num_training_batches
        epochs = (trainer.max_epochs or 0) - trainer.current_epoch
        total = f", {seconds * epochs / 60:.0f} min for {epochs} epochs" if epochs > 0 else ""
        reason = "" if gpu_found() else "No GPU found: "
        say(f"{reason}training on the CPU, about {seconds:.0f} s per epoch{total}")


class Throughput(Callback):
    """Logs `images_per_second` for each epoch: in training, validation apart, by all processes."""

    whole = False  # an epoch that goes on after an interruption isn't

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self.start, self.whole = 0.0, now(pl_module.device), True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.whole:
            self.seconds += now(pl_module.device) - self.start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = now(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.whole:
            self.seconds += now(pl_module.device) - self.start
            pl_module.log("images_per_second", images_seen(trainer) / self.seconds)
        self.whole = False


class Progress(TQDMProgressBar):
    """A line for each epoch and, in a terminal, a bar for the one that runs."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self.validated = -1  # the last epoch that was
        if not sys.stdout.isatty():
            self.disable()

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self.start, self.epochs_before = time.perf_counter(), trainer.current_epoch
        super().on_train_start(trainer, *args)

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        loader: Any = self.trainer.train_dataloader
        bar.unit, bar.unit_scale, bar.leave = " images", loader.batch_size, False
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch > self.epochs_before:
            self.say_epoch(trainer)
        super().on_train_epoch_start(trainer, *args)
        epoch = f"Epoch {trainer.current_epoch + 1}{of_epochs(trainer)}"
        self.train_progress_bar.set_description(epoch)

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_validation_end(trainer, *args)
        self.validated = trainer.current_epoch

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch > self.epochs_before:
            self.say_epoch(trainer)
        super().on_train_end(trainer, *args)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        wanted = ("loss", "train/acc", "val/acc")
        shown: dict[str, Any] = {name: metrics[name] for name in wanted if name in metrics}
        if trainer.sanity_checking or not trainer.training:
            return shown
        done = trainer.fit_loop.batch_idx / trainer.num_training_batches
        left = self.time_left(trainer, trainer.current_epoch - self.epochs_before + done)
        return shown | ({"left": left} if left else {})

    def time_left(self, trainer: Trainer, epochs_done: float) -> str:
        """The time left to train, as h:mm:ss; empty where there is none or nobody can know yet."""
        if trainer.max_epochs in (None, -1) or not epochs_done:
            return ""
        assert trainer.max_epochs is not None
        left = trainer.max_epochs - self.epochs_before - epochs_done
        seconds = (time.perf_counter() - self.start) / epochs_done * left
        return str(datetime.timedelta(seconds=round(seconds))) if left else ""

    def say_epoch(self, trainer: Trainer) -> None:
        """Says what the epoch that has just ended came to."""
        done = trainer.current_epoch
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [f"Epoch {done}{of_epochs(trainer)}"]
        stages = ["train", "val"] if self.validated == done - 1 else ["train"]
        for name in (f"{stage}/{metric}" for stage in stages for metric in ("loss", "acc")):
            if name in metrics:
                parts.append(f"{name} {metrics[name]:.4f}")
        if "images_per_second" in metrics:
            parts.append(f"{metrics['images_per_second']:,.0f} images/s")
        if left := self.time_left(trainer, done - self.epochs_before):
            parts.append(f"{left} left")
        self.print("  ".join(parts))

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar, where there is one."""
        if self.is_enabled:
            super().print(*args, **kwargs)
        else:
            say(*args)


def of_epochs(trainer: Trainer) -> str:
    return "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"


class Report(Callback):
    """Collects what `test` and `validate` predict: `result` is of the last of them.

    Args:
        mirror: Show the network each image's mirror image, too. `mirrored` is then what the means
            of both probabilities come to; `result` stays that of the images as they are.
    """

    result: tuple[Tensor, Tensor]
    mirrored: tuple[Tensor, Tensor] | None = None

    def __init__(self, mirror: bool = False) -> None:
        self.predictions = Predictions()
        self.means = Predictions() if mirror else None

    def _collect(
        self, trainer: Trainer, pl_module: LightningModule, logits: Tensor, batch: Any
    ) -> None:
        images, labels = batch
        self.predictions.update(logits, labels)
        if self.means:
            with trainer.precision_plugin.forward_context():
                others = pl_module(images.flip(3))
            mean = (logits.float().softmax(1) + others.float().softmax(1)) / 2
            self.means.update(mean.log(), labels)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *index: int
    ) -> None:
        self._collect(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *index: int
    ) -> None:
        self._collect(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def _finish(self) -> None:
        self.result = self.predictions.compute()
        self.mirrored = self.means.compute() if self.means else None


class Pictures(Callback):
    """Shows a run in TensorBoard: its data, its network, and what that gets right and wrong.

    At the start an augmented batch and the network's graph; after each validation the accuracy of
    each class (`val_class/NAME`); every few epochs, and at the end, the validation's confusion
    matrix and its most confident mistakes; at the end curves.png, in the run's folder.

    Args:
        every_n_epochs: Epochs from one drawing to the next. One that is due is left out if drawing
            has taken more than 1 % of the time so far. 0 draws nothing.

    Raises:
        ValueError: If `every_n_epochs` is negative.
    """

    SHARE = 0.01

    def __init__(self, every_n_epochs: int = 10) -> None:
        if every_n_epochs < 0:
            raise ValueError(f"pictures.every_n_epochs is {every_n_epochs}: it must be 0 or more")
        self.every_n_epochs = every_n_epochs
        self.active = False
        self.predictions = Predictions()
        self.seconds = 0.0  # that drawing has taken
        # Epoch, probabilities and labels of a validation that is not drawn yet.
        self.waiting: tuple[int, Tensor, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, self.seconds, self.waiting = time.perf_counter(), 0.0, None
        self.active = self.every_n_epochs > 0 and isinstance(trainer.logger, TensorBoardLogger)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.active or not trainer.is_global_zero:
            return
        start = time.perf_counter()
        names = class_names(pl_module)
        writer = trainer.logger.experiment  # type: ignore[union-attr]
        writer.add_custom_scalars(CHARTS)
        images, labels = augmented_batch(trainer)
        captions = [names[label] for label in labels]
        title = f"Training images as the network sees them in epoch {trainer.current_epoch + 1}"
        figure = gallery(images.cpu(), captions, title)
        writer.add_figure("augmented batch", figure, trainer.current_epoch)
        side = images.shape[-1]
        network = copy.deepcopy(pl_module.network).cpu().float().eval()  # type: ignore[union-attr]
        writer.add_graph(network, torch.zeros(1, 3, side, side))
        self.seconds += time.perf_counter() - start

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.predictions.reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *index: int
    ) -> None:
        if self.active:
            self.predictions.update(outputs, batch[1])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.active or trainer.sanity_checking:
            return
        epoch = trainer.current_epoch + 1
        probabilities, labels = self.predictions.compute()
        self.waiting = epoch, probabilities, labels
        counts = confusions(probabilities, labels)
        accuracies = {
            f"val_class/{name}": right / images
            for name, right, images in zip(
                class_names(pl_module), counts.diag(), counts.sum(dim=1), strict=True
            )
            if images
        }
        pl_module.log_dict(accuracies, sync_dist=True)
        share = self.seconds / (time.perf_counter() - self.start)
        if epoch % self.every_n_epochs == 0 and share < self.SHARE:
            self.draw(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.waiting:
            self.draw(trainer, pl_module)
        if self.active and trainer.is_global_zero:
            assert isinstance(trainer.logger, TensorBoardLogger)
            trainer.logger.experiment.flush()
            folder = Path(trainer.logger.log_dir)
            write(folder / "curves.png", as_png(curves_figure(scalars(folder))))

    @rank_zero_only
    def draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the latest validation's pictures."""
        assert self.waiting is not None
        start = time.perf_counter()
        (epoch, probabilities, labels), self.waiting = self.waiting, None
        names = class_names(pl_module)
        images = trainer.datamodule.val_set.images  # type: ignore[attr-defined]
        accuracy = (probabilities.argmax(dim=1) == labels).float().mean()
        title = f"Validation after epoch {epoch}: accuracy {accuracy:.2%}"
        figures = {
            "confusion matrix": confusion_figure(confusions(probabilities, labels), names, title),
            "mistakes": mistakes_figure(
                images, probabilities, labels, names, f"{title}, most confident mistakes"
            ),
        }
        for name, figure in figures.items():
            trainer.logger.experiment.add_figure(f"val/{name}", figure, epoch)  # type: ignore[union-attr]
        self.seconds += time.perf_counter() - start


class SaveRun(SaveConfigCallback):
    """Writes down what a run is: its options in config.yaml, its circumstances in run.json.

    TensorBoard shows the options, too, with the command that was given.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: what is refused before training begins must leave a run as it is."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # all processes have to ask for it
        if trainer.is_global_zero and folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            config = self.parser.dump(self.config, skip_none=False)
            write(Path(folder) / "config.yaml", config)
            file = Path(folder) / "run.json"
            starts = json.loads(file.read_text()) if file.is_file() else []
            write(file, as_json([*starts, self.start(trainer)]))
            self.show(trainer, config)

    def start(self, trainer: Trainer) -> dict[str, Any]:
        """What a run has to be started with to be repeated; it may have been started many times."""
        seed = self.config.get("seed_everything")
        return {
            "command": shlex.join(["python", *sys.argv]),
            "seed": seed,
            "processes": trainer.world_size,
            "global_batch": global_batch(trainer),
            "threads": torch.get_num_threads(),
            **circumstances(trainer),
        }

    def show(self, trainer: Trainer, config: str) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            command = shlex.join(["python", *sys.argv])
            text = f"    {command}\n\nwith all its options, as in config.yaml:\n\n"
            text += "".join(f"    {line}\n" for line in config.splitlines())
            trainer.logger.experiment.add_text("run", text, trainer.current_epoch)


def global_batch(trainer: Trainer) -> int:
    """Training images that an optimizer step takes, all processes together."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data.batch_size * trainer.world_size * trainer.accumulate_grad_batches


def circumstances(trainer: Trainer) -> dict[str, Any]:
    """What a figure has to be read with."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    packages = ("torch", "torchvision", "lightning", "torchmetrics")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "data": {
            "dataset": data.dataset,
            "checksum": data.checksum,
            "evaluation": data.evaluation,
        },
        "device": accelerator_name(trainer),
        "precision": trainer.precision,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def accelerator_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> dict[str, Any] | None:
    """The project's git commit, and whether files differ from it; None where git can't say."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def class_names(module: Any) -> list[str]:
    return list(module.class_names)


def scalars(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """A run's scalars, as (epoch, value), from all the files that it left in its folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def augmented_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """The first images (uint8) and labels that training is about to see."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader: Any = trainer.train_dataloader
    loader.sampler.set_epoch(trainer.current_epoch)
    positions = list(loader.sampler)[: min(SHOWN, data.batch_size)]
    images, labels, index = data.train_set.__getitems__(positions)
    return data.augment(images, index, trainer.current_epoch), labels


def seconds_per_step(trainer: Trainer, module: Any) -> float:
    """Times forward and backward of a copy of the network, on a batch of noise."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    network = copy.deepcopy(module.network)
    noise = torch.Generator().manual_seed(0)  # leaves the run's own random numbers alone
    images = torch.rand(data.batch_size, 3, data.image_size, data.image_size, generator=noise)
    images = trainer.precision_plugin.convert_input(images)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            loss = network(images).sum()
        loss.backward()
        times.append(time.perf_counter() - start)
    return min(times)


def now(device: torch.device) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def images_seen(trainer: Trainer) -> int:
    """Training images that the epoch so far has shown, in all processes."""
    loader: Any = trainer.train_dataloader
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    return int(min(batches * loader.batch_size, len(loader.sampler))) * trainer.world_size


def shown(path: Path) -> Path:
    """A path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def gpu_found() -> bool:
    return CUDAAccelerator.is_available() or MPSAccelerator.is_available()


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)
