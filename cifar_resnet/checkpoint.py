"""Checkpoints: written atomically, found by name, read safely, loaded into a network.

A checkpoint is what `read_checkpoint` returns: the dictionary that Lightning saves, or one with the
same entries that is made of another project's weights.
"""

import inspect
import io
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from cifar_resnet.convert import convert_state_dict
from cifar_resnet.files import atomic_write
from cifar_resnet.messages import UserError

# Options of the model that training alone needs.
TRAINING_ONLY = ("optimizer", "lr_scheduler")
# Trained weights that come with the project; docs/results.md describes them.
PRETRAINED = Path(__file__).absolute().parents[1] / "weights" / "resnet20.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's, but writes atomically and never runs code that a checkpoint holds.

    Lightning writes to the temporary folder first. Where that is on another disk, what then
    replaces the old checkpoint is a copy, which a kill can cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), content.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)


class EpochCheckpoint(ModelCheckpoint):
    """Saves at the end of whole epochs only, from where a run resumes bit-identically.

    Args:
        filename: Name of the file, without its ending; `{epoch}` stands for the epoch.
        monitor: Metric of which the best epochs are kept: those with the lowest value of a loss,
            with the highest of any other. Without one the latest are kept.
        every_n_epochs: Epochs from one checkpoint to the next; 0 saves none.
        save_top_k: Number of checkpoints to keep; -1 keeps all.
    """

    def __init__(
        self,
        filename: str,
        monitor: str | None = None,
        every_n_epochs: NonNegativeInt = 1,
        save_top_k: int = 1,
    ) -> None:
        super().__init__(
            filename=filename,
            monitor=monitor,
            mode="min" if "loss" in (monitor or "") else "max",
            every_n_epochs=every_n_epochs,
            save_top_k=save_top_k,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        # Lightning's would be the same for two that differ in their file names alone.
        return f"EpochCheckpoint {self.filename}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["monitor"] != self.monitor:
            return  # a score of another metric says nothing of this one
        # Lightning forgets the best score where the folder's path differs; of a run that was moved,
        # whose best checkpoint lies here, the score still counts.
        old, new = str(state_dict["dirpath"]), str(self.dirpath)
        if Path(new, Path(state_dict["best_model_path"]).name).is_file():
            paths = {k: v.replace(old, new) for k, v in state_dict.items() if isinstance(v, str)}
            kept = {k.replace(old, new): v for k, v in state_dict["best_k_models"].items()}
            state_dict = {**state_dict, **paths, "best_k_models": kept}
        super().load_state_dict(state_dict)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:  # not where max_steps or max_time ends a run within an epoch
            super().on_train_epoch_end(trainer, pl_module)


class BestCheckpoint(EpochCheckpoint):
    """Keeps the best epoch in best.ckpt.

    Args:
        monitor: Metric by which an epoch is the best: a loss by its lowest value, any other by its
            highest.
    """

    def __init__(self, monitor: str = "val/acc") -> None:
        super().__init__("best", monitor)


class PeriodicCheckpoint(EpochCheckpoint):
    """Keeps every nth epoch in epoch_N.ckpt; N counts from 0, as Lightning does.

    Args:
        every_n_epochs: Epochs from one checkpoint to the next; 0 saves none.
    """

    def __init__(self, every_n_epochs: NonNegativeInt = 20) -> None:
        super().__init__("epoch_{epoch}", every_n_epochs=every_n_epochs, save_top_k=-1)


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The callbacks that save checkpoints: first those by a metric, then that of last.ckpt."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return sorted(found, key=lambda c: (c.monitor is None, c.filename != "last"))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of this project, or the weights of another one.

    Raises:
        UserError: If it is neither, or holds more than plain data.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # foreign bytes fail in any way
        reason = type(error).__name__
        raise UserError(
            f"{path} is not a checkpoint, or holds more than plain data ({reason}): of a network "
            "save the state_dict() alone"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if "class_names" not in content:
        try:
            return convert_state_dict(content)
        except UserError as error:
            raise UserError(f"{path} is {error}") from error
    # A checkpoint of other data, trained in Python, has none: such images are shown as they are.
    content.setdefault("datamodule_hyper_parameters", {}).setdefault("augmentation", "none")
    return content


def is_resumable(checkpoint: Mapping[str, Any]) -> bool:
    """Whether this is a whole checkpoint of this project, not weights and options only."""
    return "optimizer_states" in checkpoint


def completed_epochs(checkpoint: Mapping[str, Any]) -> int:
    """Number of epochs that a run had completed when it saved this checkpoint."""
    return int(checkpoint["epoch"]) + 1


def known_options(options: Mapping[str, Any], *classes: type) -> dict[str, Any]:
    """The options that these classes' signatures have; those of older versions are dropped."""
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    return {name: value for name, value in options.items() if name in names}


def load_weights(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Loads a checkpoint's weights into a module.

    Raises:
        UserError: If they do not fit.
    """
    # Files of PyTorch 0.3 lack the counters, and what was trained elsewhere has no input scaling.
    optional = {
        name: value
        for name, value in module.state_dict().items()
        if name in ("mean", "std") or name.endswith("num_batches_tracked")
    }
    try:
        module.load_state_dict(optional | checkpoint["state_dict"])
    except RuntimeError as error:
        reason = shorten(str(error), 300, placeholder=" …")
        raise UserError(
            f"{reason}: give the options that the checkpoint was trained with (layers, width, "
            "shortcut, dataset, ...)"
        ) from error
