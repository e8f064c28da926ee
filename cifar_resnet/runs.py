"""A run's folder: claimed for this run alone, and what is recorded there."""

import contextlib
import datetime
import json
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from cifar_resnet.checkpoint import EpochCheckpoint, model_checkpoints
from cifar_resnet.files import atomic_write, to_json
from cifar_resnet.messages import UserError, print_once

LOGS = Path("lightning_logs")  # where runs go, within the Trainer's default_root_dir


class RunFolder(Callback):
    """Gives a run its folder, `version_N`: a new one, or that of the run that is resumed.

    There are its checkpoints, its options (config.yaml), the command, commit and versions of each
    start (run.json) and TensorBoard's events. Loggers that the user chooses log where they choose.

    Args:
        config: All options of `fit`, as plain data.
        resumed: Folder of the run that is resumed.
        epochs: Number of epochs that it has completed.
    """

    def __init__(self, config: dict[str, Any], resumed: Path | None, epochs: int) -> None:
        self.config = without_unwritable(config)
        trainer = config["trainer"]
        self.logs = Path(trainer["default_root_dir"] or "").expanduser() / LOGS
        self.tensorboard = trainer["logger"] in (None, True)
        self.resumed = resumed
        self.epochs = epochs
        self.folder: Path | None = None
        self.begun = False  # whether the run has come to an epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = self.resumed or self.logs
        if not self.resumed and trainer.is_global_zero:
            folder = claim_folder(self.logs)
        folder = trainer.strategy.broadcast(folder)  # the others log where the first process does
        self.folder = folder
        for callback in model_checkpoints(trainer):
            if callback.dirpath is None:
                # The user's own must not overwrite best.ckpt or last.ckpt.
                is_own = isinstance(callback, EpochCheckpoint)
                callback.dirpath = str(folder / ("checkpoints" if is_own else "more_checkpoints"))
        if self.tensorboard:
            trainer.logger = TensorBoardLogger(
                folder.parent,
                name="",
                version=folder.name,
                default_hp_metric=False,
                # Epochs that are trained once more replace those that a killed run has logged.
                purge_step=self.epochs + 1 if self.resumed else None,
            )

    # Not on_train_start, where other callbacks may still refuse to train.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder and trainer.is_global_zero and not self.begun:
            self.record(trainer, self.folder)
        self.begun = True

    def record(self, trainer: Trainer, folder: Path) -> None:
        """Writes the options and this start, in files and in TensorBoard."""
        file = folder / "run.json"
        starts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        config = yaml.safe_dump(self.config, sort_keys=False)
        atomic_write(folder / "config.yaml", config)
        command = shlex.join(["python", *sys.argv])
        start = {"command": command, "seed": self.config["seed_everything"]}
        start |= describe_run(trainer)
        if starts and starts[-1]["data"]["checksum"] != start["data"]["checksum"]:
            print_once(
                "Note: the images are not those of the run's last start: where validation images "
                "are split off, some that trained may validate now"
            )
        atomic_write(file, to_json([*starts, start]))
        if logger := tensorboard_logger(trainer):
            lines = [command, "", "with all its options, as in config.yaml:", ""]
            text = "".join(f"    {line}\n" for line in [*lines, *config.splitlines()])
            logger.experiment.add_text("run", text, trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives TensorBoard's HPARAMS the options with the best score."""
        scores = {
            f"hp/best_{c.monitor}": c.best_model_score
            for c in model_checkpoints(trainer)
            if c.best_model_score is not None
        }
        if logger := tensorboard_logger(trainer):
            options = self.config["data"] | self.config["model"]
            options |= {name: self.config["trainer"][name] for name in ("max_epochs", "precision")}
            options |= {
                "seed": self.config["seed_everything"],
                "effective_batch_size": effective_batch_size(trainer),
            }
            without = {"hp/train/acc": trainer.callback_metrics["train/acc"]}
            logger.log_hyperparams(options, scores or without)
            logger.save()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing behind of a run that has not come to its first epoch."""
        if self.begun or self.resumed or not self.folder or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.finalize("failed")
        trainer.loggers = []
        shutil.rmtree(self.folder, ignore_errors=True)


def claim_folder(logs: Path) -> Path:
    """Makes the folder of a new run, `version_N`, N being the first number after all others.

    Of several commands that start at the same moment each gets a folder of its own.
    """
    logs.mkdir(parents=True, exist_ok=True)
    while True:
        number = max((version_number(folder) for folder in logs.iterdir()), default=-1) + 1
        folder = logs.absolute() / f"version_{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def find_checkpoint(name: str, logs: Path) -> Path:
    """The checkpoint called `name`: a path, or `best` or `last` of the newest run that has one.

    The best of a run without validation is its last.

    Raises:
        UserError: If there is none.
    """
    if name not in ("best", "last"):
        if not Path(name).is_file():
            reason = "that is a folder" if Path(name).is_dir() else "there is no such file"
            raise UserError(f"ckpt is {name!r}: {reason}")
        return Path(name)
    found = [*logs.glob("*/checkpoints/last.ckpt")]
    if name == "best":
        found += logs.glob("*/checkpoints/best.ckpt")
    if not found:
        raise UserError(
            f"no run in {logs}/ has a {name}.ckpt: train one with python train.py fit, or give "
            "--ckpt PATH"
        )
    newest = max(found, key=lambda path: (version_number(path.parents[1]), path.stat().st_mtime))
    wanted = newest.with_name(f"{name}.ckpt")
    return wanted if wanted.is_file() else newest


def version_number(run: Path) -> int:
    """N for the folder version_N of a run, -1 for one of another name."""
    number = run.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def without_unwritable(options: Any) -> Any:
    """Options without those that YAML cannot hold, such as a default that is a torch.device."""
    if isinstance(options, dict):
        return {
            name: without_unwritable(value)
            for name, value in options.items()
            if not str(value).startswith("Unable to serialize")
        }
    return [without_unwritable(each) for each in options] if isinstance(options, list) else options


def tensorboard_logger(trainer: Trainer) -> TensorBoardLogger | None:
    """The run's TensorBoard logger, if it has one."""
    return next((each for each in trainer.loggers if isinstance(each, TensorBoardLogger)), None)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """A run's scalars, as (epoch, value), from TensorBoard's files in its folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def effective_batch_size(trainer: Trainer) -> int:
    """Training images that an optimizer step takes, all processes together."""
    batch_size: int = trainer.datamodule.hparams["batch_size"]  # type: ignore[attr-defined]
    return batch_size * trainer.world_size * trainer.accumulate_grad_batches


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """The context of a result: data, device, precision, versions, commit."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    device = trainer.strategy.root_device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    packages = ("torch", "torchvision", "lightning", "torchmetrics")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "data": {
            "dataset": data.hparams["dataset"],
            "checksum": data.checksum,
            "evaluation": data.evaluation,
        },
        "device": gpu or f"{device.type}, {torch.backends.cpu.get_cpu_capability()}",
        "precision": trainer.precision,
        "processes": trainer.world_size,
        "effective_batch_size": effective_batch_size(trainer),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def git_commit() -> dict[str, Any] | None:
    """The project's commit, and whether files differ from it; None where git can't say."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # After each run accuracy.py adds a row to its results.
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None
