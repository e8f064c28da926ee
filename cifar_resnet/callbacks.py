"""What happens beside training, one callback each: checks, summaries, predictions, pictures.

Callbacks get the module and the data from the Trainer; they import neither.
"""

import copy
import datetime
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, Timer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cifar_resnet.augment import dominant_labels
from cifar_resnet.checkpoint import model_checkpoints
from cifar_resnet.figures import FIGURES, PredictedImages, curves_figure, image_grid, to_png
from cifar_resnet.files import atomic_write
from cifar_resnet.messages import UserError, print_once, relative
from cifar_resnet.report import Predictions
from cifar_resnet.runs import effective_batch_size, read_scalars, tensorboard_logger

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


class TerminateOnNaN(Callback):
    """Ends a run whose weights are not finite, before a checkpoint holds them."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Buffers, too: a step that float16 skips leaves NaN in batch statistics alone.
        finite = [value.isfinite().all() for value in pl_module.state_dict().values()]
        if not trainer.strategy.reduce_boolean_decision(bool(torch.stack(finite).all())):
            raise UserError(
                f"the weights are not finite (nan or inf) after epoch {trainer.current_epoch + 1}, "
                f"at a learning rate of {pl_module.lr:g}: the checkpoints are those of earlier "
                "epochs. Try a lower rate (--model.optimizer.lr, or --model.lr_scheduler.max_lr "
                "of a cycle) or --trainer.gradient_clip_val 1"
            )


class CycleLengthCheck(Callback):
    """Refuses a run that is longer than the cycle of its OneCycleLR; notes one that is shorter.

    OneCycleLR would end the run with an error, but only when the cycle is over. A shorter run ends
    at a high rate.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            cycle = getattr(config.scheduler, "total_steps", None)
            by_step = config.interval == "step"
            run = (trainer.estimated_stepping_batches if by_step else trainer.max_epochs) or 0
            if cycle and not 0 <= run <= cycle:
                raise UserError(
                    f"the run takes {run} {config.interval}s (-1 and inf: without an end), but "
                    f"OneCycleLR only {cycle}: give fewer --trainer.max_epochs, or begin a new run"
                )
            if cycle and run < cycle:
                left = f"{cycle - run:.0f} {config.interval}s"
                print_once(f"Note: the run ends {left} before the cycle of its OneCycleLR")


class CurrentLimits(Callback):
    """Resumes with the limits that are given now: EarlyStopping's patience, and a time from now on.

    Otherwise Lightning would restore the patience and the time that had passed: each resume of a
    run that max_time has ended would end at once.
    """

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for callback in trainer.early_stopping_callbacks:
            if state := checkpoint["callbacks"].get(callback.state_key):
                state["patience"] = callback.patience
        checkpoint["callbacks"].pop(Timer.__qualname__, None)


class StopAtSignal(Callback):
    """Ends a run at SIGTERM, in all processes before the same step; says how to resume it.

    Lightning's own handler broadcasts from within whatever operation the signal interrupts: of
    several processes some then fail, or wait for ever.
    """

    terminated = False  # SIGTERM has reached this process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.terminate)  # until Lightning restores the one before

    def terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.strategy.reduce_boolean_decision(self.terminated, all=False):
            raise SIGTERMException

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
            return
        if isinstance(exception, SIGTERMException):
            exception.code = 143  # as shells have it; Lightning would end with 0
        saved = [Path(c.best_model_path) for c in model_checkpoints(trainer) if has_saved(c)]
        last = [path for path in saved if path.name == "last.ckpt"]
        if last:
            command = shlex.join(["python", sys.argv[0], "fit", "--ckpt", relative(last[0])])
            print_once(f"Stopped in epoch {trainer.current_epoch + 1}. Resume with: {command}")
        else:
            print_once("Stopped before the first epoch was saved")


class NetworkSummary(ModelSummary):
    """Lightning's table, of the network's stem, stages and head alone."""

    @staticmethod
    def summarize(summary_data: list[tuple[str, list[str]]], *args: Any, **kwargs: Any) -> None:
        names = dict(summary_data)["Name"]
        rows = [row for row, name in enumerate(names) if name.startswith("network.")]
        shown = [(column, [values[row] for row in rows]) for column, values in summary_data]
        ModelSummary.summarize(shown, *args, **kwargs)


class EpochSummary(Callback):
    """Prints a line for each epoch, and at the end which checkpoint is best.

    Logs `images_per_second` of each epoch: in training, without validation, by all processes.
    """

    validated = False  # since the last line
    validation_start = validation_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_start, self.first_epoch = time.perf_counter(), trainer.current_epoch
        if trainer.world_size > 1 or trainer.accumulate_grad_batches > 1:
            images = effective_batch_size(trainer)
            print_once(f"Each optimizer step takes {images} images, of all processes together")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch's metrics are complete when the next one starts.
        if trainer.current_epoch > self.first_epoch:
            self.print_epoch(trainer, (trainer.max_epochs or -1) - trainer.current_epoch)
        self.epoch_start, self.images, self.validation_seconds = time.perf_counter(), 0, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *index: int
    ) -> None:
        self.images += len(batch[0])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_seconds += time.perf_counter() - self.validation_start
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = time.perf_counter() - self.epoch_start - self.validation_seconds
        pl_module.log("images_per_second", self.images * trainer.world_size / seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > self.first_epoch:
            self.print_epoch(trainer, 0)
        if not trainer.is_last_batch:  # Lightning counts this epoch as ended
            print_once(f"The run ended within epoch {trainer.current_epoch}, which is not saved")
        if trainer.should_stop:
            print_once(f"The run was ended by {stop_reason(trainer)}")
        saved = [c for c in model_checkpoints(trainer) if has_saved(c)]
        if saved:
            best, score = relative(Path(saved[0].best_model_path)), saved[0].best_model_score
            reached = "" if score is None else f" ({saved[0].monitor} {score:.4f})"
            print_once(f"Best checkpoint: {best}{reached}")
            print_once(f"Test it: {shlex.join(['python', sys.argv[0], 'test', '--ckpt', best])}")

    def print_epoch(self, trainer: Trainer, epochs_left: int) -> None:
        """Prints what the epoch that has just ended came to."""
        done, last = trainer.current_epoch, trainer.max_epochs or -1  # -1: without an end
        metrics = trainer.callback_metrics
        parts = [f"Epoch {done}/{last}" if last >= done else f"Epoch {done}"]
        for stage in ("train", "val") if self.validated else ("train",):
            names = [name for name in (f"{stage}/loss", f"{stage}/acc") if name in metrics]
            parts += [f"{name} {float(metrics[name]):.4f}" for name in names]
        parts.append(f"{float(metrics['images_per_second']):,.0f} images/s")
        if epochs_left > 0:
            each = (time.perf_counter() - self.run_start) / (done - self.first_epoch)
            parts.append(f"{datetime.timedelta(seconds=round(each * epochs_left))} left")
        print_once("  ".join(parts))
        self.validated = False


def has_saved(callback: ModelCheckpoint) -> bool:
    """Whether its best file is this run's; one that branches off begins with the old run's."""
    return Path(callback.best_model_path).is_relative_to(str(callback.dirpath))


def stop_reason(trainer: Trainer) -> str:
    """Which callback has ended a run before its last epoch, and why."""
    for callback in trainer.early_stopping_callbacks:
        # stopped_epoch is 0, an epoch like any other, while it has not stopped the run.
        stopped = callback.stopping_reason_message is not None
        if stopped and callback.stopped_epoch == trainer.current_epoch - 1:
            return f"{type(callback).__name__}: {callback.stopping_reason_message}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and (callback.time_remaining() or 0) <= 0:
            return "trainer.max_time"
    return "a callback that has set trainer.should_stop"


class PredictionCollector(Callback):
    """Collects the predictions of each validation and test, from all processes.

    The steps of the module must return probabilities (N, C) float32.

    Args:
        mirror: Show the network the mirror image of each image, too.

    Attributes:
        result: Probabilities (N, C) float32 and labels (N,) int64 of the last loop, on the CPU.
        mirrored: (N, C) float32, the mean probabilities of each image and its mirror image; None
            without `mirror`.
    """

    mirrored: Tensor | None = None

    def __init__(self, mirror: bool = False) -> None:
        self.mirror = mirror
        self.predictions = Predictions()
        self.result = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, labels = batch
        views = [outputs]
        if self.mirror:
            with trainer.precision_plugin.forward_context():
                views.append(pl_module(images.flip(3)).float().softmax(dim=1))
        self.predictions.update(torch.stack(views, dim=1), labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        probabilities, labels = self.predictions.compute()
        self.predictions.reset()
        self.result = probabilities[:, 0], labels
        self.mirrored = probabilities.mean(dim=1) if self.mirror else None

    on_test_batch_end, on_test_epoch_end = on_validation_batch_end, on_validation_epoch_end


class TensorBoardImages(Callback):
    """Shows a run in TensorBoard: its data, its network, and what that gets right and wrong.

    At the start an augmented batch and the network's graph; after each validation the accuracy of
    each class (`val_class/NAME`); every few epochs, and at the end, the validation's pictures
    (`FIGURES`); at the end curves.png, in the run's folder.

    Args:
        every_n_epochs: Epochs from one drawing to the next. 0 turns all of this off, the accuracies
            of the classes and curves.png included.
    """

    def __init__(self, every_n_epochs: NonNegativeInt = 10) -> None:
        self.every_n_epochs = every_n_epochs
        self.collector = PredictionCollector()
        self.batch_shown = False
        self.undrawn: PredictedImages | None = None  # of the latest validation

    def writer(self, trainer: Trainer) -> SummaryWriter | None:
        """TensorBoard's, unless the run does without it or without pictures."""
        logger = tensorboard_logger(trainer)
        return logger.experiment if logger and self.every_n_epochs else None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        writer = self.writer(trainer)
        if not writer or not trainer.is_global_zero:
            return
        resumed_from = Path(trainer.ckpt_path or "").absolute()
        if resumed_from.is_relative_to(writer.log_dir):
            return  # the run has its graph already, and TensorBoard takes one
        writer.add_custom_scalars(CHARTS)
        network = copy.deepcopy(pl_module.network).cpu().float().eval()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.trace", FutureWarning)
            writer.add_graph(network, pl_module.example_input_array)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        writer = self.writer(trainer)
        if self.batch_shown or not writer or not trainer.is_global_zero:
            return
        self.batch_shown = True
        images, labels = (part[:SHOWN].cpu() for part in batch)
        captions = [pl_module.class_names[label] for label in dominant_labels(labels)]
        title = f"Training images as the network sees them in epoch {trainer.current_epoch + 1}"
        figure = image_grid((images * 255).round().to(torch.uint8), captions, title)
        writer.add_figure("augmented batch", figure, trainer.current_epoch)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.writer(trainer):
            self.collector.on_validation_batch_end(trainer, *args)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        writer = self.writer(trainer)
        if not writer:
            return
        self.collector.on_validation_epoch_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        predicted = PredictedImages(
            data.val_set.images, *self.collector.result, pl_module.class_names
        )
        counts = predicted.counts
        rows = zip(predicted.class_names, counts.diag(), counts.sum(dim=1), strict=True)
        pl_module.log_dict({f"val_class/{name}": float(right / n) for name, right, n in rows if n})
        self.undrawn, self.epoch = predicted, trainer.current_epoch + 1
        if self.epoch % self.every_n_epochs == 0:
            self.draw(writer, predicted)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = self.writer(trainer)
        if not writer or not trainer.is_global_zero:
            return
        if self.undrawn:
            self.draw(writer, self.undrawn)
        writer.flush()
        folder = Path(writer.log_dir)
        atomic_write(folder / "curves.png", to_png(curves_figure(read_scalars(folder))))

    @rank_zero_only
    def draw(self, writer: SummaryWriter, predicted: PredictedImages) -> None:
        """Draws all pictures of a validation."""
        accuracy = predicted.counts.diag().sum() / predicted.counts.sum()
        title = f"Validation after epoch {self.epoch}: accuracy {accuracy:.2%}"
        for name, figure in FIGURES.items():
            tag = f"val/{name.replace('_', ' ')}"
            writer.add_figure(tag, figure(predicted, title), self.epoch)
        self.undrawn = None
