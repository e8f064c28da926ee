"""Options that are refused before a command begins, because of it or of its checkpoint."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from cifar_resnet.checkpoint import PRETRAINED, completed_epochs, is_resumable, read_checkpoint
from cifar_resnet.runs import LOGS, find_checkpoint

# Options that, when 0, leave a command nothing to do.
LIMITS = {
    "fit": ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}


def check_options(command: str, config: Any) -> None:
    """Refuses options with which a command cannot do what it is for.

    Args:
        command: fit, validate, test or predict.
        config: All its options.

    Raises:
        ValueError: With the first of them.
    """
    if config.mirror and command not in ("test", "validate"):
        raise ValueError("mirror is an option of test and validate")
    if command == "validate" and config.data.val_size == 0:
        raise ValueError("data.val_size is 0: there are no validation images; use test")
    if config.trainer.check_val_every_n_epoch == 0:
        raise ValueError("trainer.check_val_every_n_epoch is 0: give 1, or data.val_size 0")
    check_mode("best_checkpoint", config.best_checkpoint)
    scheduler = config.model.lr_scheduler
    check_mode("model.lr_scheduler", getattr(scheduler, "init_args", None))
    for limit in LIMITS[command]:
        if config.trainer[limit] == 0:
            raise ValueError(f"trainer.{limit} is 0: there is nothing to {command}")
    if any(way in str(config.trainer.strategy) for way in ("spawn", "fork", "notebook")):
        raise ValueError(
            f"trainer.strategy is {config.trainer.strategy}, whose processes no signal ends: "
            "give ddp"
        )
    if config.model.compile and command == "fit":
        torch.compile(torch.sin)(torch.zeros(8))  # fails where there is no compiler


def check_mode(owner: str, options: Any) -> None:
    """Refuses to take the lowest accuracy, or the highest loss, for the best.

    Raises:
        ValueError: If `options` has such a `monitor` and `mode`.
    """
    monitor, mode = str(getattr(options, "monitor", "")), getattr(options, "mode", None)
    for metric, worst, right in (("loss", "max", "min"), ("acc", "min", "max")):
        if monitor.endswith(metric) and mode == worst:
            raise ValueError(
                f"{owner}.monitor is {monitor}, of which mode {worst} takes the worst for the "
                f"best: give mode {right}"
            )


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that change an option, or take the worst for the best.

    Raises:
        ValueError: If there is one.
    """
    for callback in callbacks:
        check_mode(type(callback).__name__, callback)
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise ValueError(
                f"{type(callback).__name__} changes options that config.yaml then lacks: "
                "try values of --data.batch_size or --model.optimizer.lr in short runs instead"
            )


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested options as {"optimizer.init_args.lr": "0.001"}.

    The values are JSON, which makes no difference between tuples and lists.
    """
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat[f"{prefix}{name}"] = json.dumps(value.get("class_path"))
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            if callable(value):  # a function, which a checkpoint holds as its import path
                value = f"{value.__module__}.{value.__qualname__}"
            flat[f"{prefix}{name}"] = json.dumps(value)
    return flat


def changed_options(
    options: Mapping[str, Any], stored: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """(before, now) of each option that differs from the one stored in a checkpoint."""
    before, now = flatten(stored), flatten(options)
    return {n: (before[n], v) for n, v in now.items() if n in before and before[n] != v}


def check_model_options(model: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Refuses model options that differ from those a checkpoint was trained with.

    Raises:
        ValueError: With the first that differs.
    """
    for name, (before, now) in changed_options(model, checkpoint["hyper_parameters"]).items():
        raise ValueError(
            f"model.{name} is {now}, but the checkpoint was trained with {before}: leave it out, "
            "or begin a new run"
        )


def check_split(data: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Refuses to validate on images that a checkpoint was trained on.

    Raises:
        ValueError: If another number of images would be split off the same data set.
    """
    stored, now = checkpoint["datamodule_hyper_parameters"], data["val_size"]
    own = Path(data["dataset"]).expanduser() / "val"
    if str(stored.get("dataset")).rstrip("/") != data["dataset"].rstrip("/") or own.is_dir():
        return
    if now and now != stored.get("val_size", now):
        raise ValueError(
            f"data.val_size is {now}, but the checkpoint was trained with {stored['val_size']}: "
            "images that trained would validate; leave it out"
        )


def check_resume(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Refuses a run that could not resume as it would have gone on.

    Args:
        config: All options of `fit`.
        checkpoint: The one that the run is to resume from.

    Raises:
        ValueError: With the reason.
    """
    if not is_resumable(checkpoint):
        raise ValueError("ckpt holds weights only, from which fit cannot go on; test can use them")
    if "dataset" not in checkpoint["datamodule_hyper_parameters"]:
        raise ValueError("ckpt was trained in Python on data of one's own: resume it there")
    progress = checkpoint["loops"].get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    if not progress.get("is_last_batch"):
        raise ValueError("ckpt was saved within an epoch: resume from the run's last.ckpt instead")
    trainer, done = config["trainer"], completed_epochs(checkpoint)
    if trainer["max_steps"] != -1:
        raise ValueError(
            "trainer.max_steps cannot end a resumed run: give --trainer.max_steps=-1 and "
            "--trainer.max_epochs"
        )
    if trainer["max_epochs"] is not None and 0 <= trainer["max_epochs"] < done:
        raise ValueError(
            f"trainer.max_epochs is {trainer['max_epochs']}, but the checkpoint has {done} epochs "
            "behind it"
        )
    check_model_options(config["model"], checkpoint)


def choose_checkpoint(
    name: str | None, mean: list[float] | None, std: list[float] | None
) -> tuple[Path, dict[str, Any]]:
    """A checkpoint's path and content: that of `name`, or the newest run's best, or `PRETRAINED`.

    Args:
        name: `best` or `last` of the newest run, or a path. None means `best` or, if there is no
            run, `PRETRAINED`.
        mean: Subtracted from each channel: the input scaling that other projects' files lack.
        std: What each channel is then divided by.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it can't be read, or if the scaling is one that it has already, or is not
            positive.
    """
    try:
        path = find_checkpoint(name or "best", LOGS)
    except FileNotFoundError:
        if name:
            raise
        path = PRETRAINED
    checkpoint = read_checkpoint(path)
    if mean or std:
        if std and min(std) <= 0:
            raise ValueError(f"input_std is {std}: each must be more than 0")
        if "mean" in checkpoint["state_dict"]:
            raise ValueError(f"{path} has its own input scaling: leave input_mean and _std out")
        checkpoint["hyper_parameters"] |= {"input_mean": mean, "input_std": std}
    return path, checkpoint
