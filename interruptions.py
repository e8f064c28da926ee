"""Interruptions: a run that a signal stops is saved where it is, and goes on as if never stopped.

Ctrl-C, SIGTERM, SIGHUP (the terminal has gone) and SIGUSR1 (sent by SLURM when time is nearly up)
let the current step end, save last.ckpt, and print the command that goes on with the run. The exit
code is 128 plus the signal's number, as a shell has it.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks import say, scalars, shown
from checkpoints import HALF_WRITTEN

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has but two of them
]

UNLOGGED = ("step", "loss")  # metrics that are not for the logger


class Interruptions(Callback):
    """Saves a run that a signal stops, and readies one that goes on in the middle of an epoch."""

    def __init__(self) -> None:
        self.received: int | None = None  # the signal that has asked to stop
        self.validations: list[dict[str, float]] = []  # of this epoch
        self.loaded: dict[str, Any] = {}  # metrics and validations when the checkpoint was saved

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Over those of Lightning, which ends a run without saving it.
        handle(exit_at_once)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.speaks = trainer.is_global_zero
        handle(self.stop)
        if trainer.is_global_zero and (path := last_checkpoint(trainer)):
            path.parent.mkdir(parents=True, exist_ok=True)
            for litter in path.parent.glob(f"*{HALF_WRITTEN}"):
                litter.unlink()  # of a run that was killed
        self.count_batches(trainer)
        if self.loaded:
            known = trainer._logger_connector._callback_metrics
            known.update({k: torch.tensor(v) for k, v in self.loaded["metrics"].items()})
            self.validations = [] if self.loaded["whole"] else [*self.loaded["validations"]]
            self.log_what_was_lost(trainer)

    def count_batches(self, trainer: Trainer) -> None:
        """Tells Lightning how many of today's batches an interrupted epoch has behind it.

        It has counted others, if the run was another number of processes, or of another batch size.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        done = data.batches_done() if hasattr(data, "batches_done") else None
        if done is not None:
            progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            being_saved = progress.processed - progress.completed
            progress.ready = progress.started = progress.processed = done
            progress.completed = done - being_saved

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["logged"] = {
            "whole": trainer.fit_loop.epoch_loop.batch_progress.is_last_batch,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "validations": [*self.validations],
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.loaded = checkpoint.get("logged", {})
        # In a folder that has been moved the best checkpoint would not be known for the best.
        path = trainer.ckpt_path
        if path and (folder := last_checkpoint(trainer)) == Path(path).absolute():
            for state in checkpoint["callbacks"].values():
                if state.get("dirpath"):
                    move(state, str(folder.parent))

    @rank_zero_only
    def log_what_was_lost(self, trainer: Trainer) -> None:
        """Logs what a run that was killed after its last checkpoint had not logged yet."""
        logger, checkpoint = trainer.logger, trainer.ckpt_path
        if not isinstance(logger, TensorBoardLogger) or not checkpoint:
            return
        folder, epoch = Path(logger.log_dir).resolve(), trainer.current_epoch
        if Path(checkpoint).resolve().parents[1] != folder:
            return
        for values in self.validations:  # of the epoch that goes on, and so is shown anew
            logger.log_metrics(values, epoch + 1)
        if self.loaded["whole"]:
            there = scalars(folder)
            # Without a validation in this epoch, its metrics are those of an earlier one.
            stale = () if self.loaded["validations"] else ("val/", "val_class/")
            lost = {
                name: value
                for name, value in self.loaded["metrics"].items()
                if name not in UNLOGGED
                and not name.startswith(stale)
                and epoch not in [step for step, _ in there.get(name, [])]
            }
            logger.log_metrics(lost, epoch)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Asks the run to stop after its current step; a second Ctrl-C does not wait for that."""
        if self.received == number == signal.SIGINT:
            os._exit(128 + number)
        if self.received is None:
            self.received = number
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            line = f"{signal.Signals(number).name}: the run is saved after this step{again}\n"
            if self.speaks:
                os.write(1, line.encode())  # print might be interrupted in the middle of itself

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # An epoch's end saves itself, and gradients that wait for others to join them cannot be.
        loop = trainer.fit_loop.epoch_loop
        between = not loop.batch_progress.is_last_batch and not loop._should_accumulate()
        if between and self.asked(trainer):
            self.save(trainer)
            self.end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()  # a checkpoint has no epoch behind it that is not on the disk
        if self.asked(trainer):
            self.save(trainer)  # for last.ckpt may not be due; the other checkpoints follow

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            values = {name: float(value) for name, value in metrics if name.startswith("val")}
            self.validations.append(values)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations = []
        if self.asked(trainer):
            self.end(trainer)

    def asked(self, trainer: Trainer) -> bool:
        """Whether the run is to stop: all processes agree on the step after which they do."""
        several = trainer.world_size > 1
        here = self.received is not None
        return trainer.strategy.reduce_boolean_decision(here, all=False) if several else here

    def save(self, trainer: Trainer) -> None:
        if path := last_checkpoint(trainer):
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(path)

    def end(self, trainer: Trainer) -> None:
        """Says how to go on, has SLURM do it where it runs the job, and ends the process."""
        number = self.received or signal.SIGTERM  # which another process has received
        if path := last_checkpoint(trainer):
            command = shlex.join(["python", sys.argv[0], "fit", "--ckpt", str(shown(path))])
            say(f"Saved in epoch {trainer.current_epoch + 1}. Go on with: {command}")
        environment = trainer._accelerator_connector.cluster_environment
        by_slurm = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if by_slurm and trainer.is_global_zero and number != signal.SIGINT:
            requeue()
        handle(ignore)  # nothing disturbs the end
        sys.exit(128 + number)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.received and isinstance(exception, RuntimeError):
            # The signal has reached the loader's workers too, and the step could not end.
            say(f"The step could not end ({exception}): the last checkpoint goes on, if any")
            sys.exit(128 + self.received)


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Where the run's last.ckpt is, or is going to be."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return Path(folders[0]) / "last.ckpt" if folders and folders[0] else None


def move(state: dict[str, Any], folder: str) -> None:
    """Has the state of a ModelCheckpoint speak of another folder."""

    def moved(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    state["dirpath"] = folder
    state["best_k_models"] = {moved(k): v for k, v in state["best_k_models"].items()}
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state[name])


def requeue() -> None:
    """Has SLURM start the job anew: its script goes on with the run."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{job}_{task}" if job else os.environ["SLURM_JOB_ID"]
    assert re.fullmatch("[0-9_]+", job)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        say(f"SLURM starts job {job} anew")
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"SLURM could not start job {job} anew: {error}")


Handler = Callable[[int, FrameType | None], Any]


def handle(handler: Handler) -> None:
    """Has a handler called at each signal that stops a run, but for those that nohup ignores."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def exit_at_once(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def ignore(number: int, frame: FrameType | None) -> None:
    pass


@contextlib.contextmanager
def signals_exit() -> Iterator[None]:
    """Has signals end the process without a traceback, with their conventional exit code."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handle(exit_at_once)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
