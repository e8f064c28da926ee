"""A command's checkpoint and its options: found, merged with those that are given, compared.

Each check raises a `UserError` for the first option that it refuses.
"""

import argparse
import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from cifar_resnet.checkpoint import TRAINING_ONLY, is_resumable, read_checkpoint
from cifar_resnet.datasets import DATASETS
from cifar_resnet.messages import UserError, print_once
from cifar_resnet.runs import LOGS, find_checkpoint

REMOVED = ("best_checkpoint.mode",)  # options that a run of an earlier version may have


@dataclass(frozen=True)
class Start:
    """What is needed before the options can be parsed, because a checkpoint brings some of them."""

    command: str
    ckpt: str | None  # `best`, `last` or a path; None: begin without a checkpoint
    root: Path  # of the runs


@dataclass(frozen=True)
class Source:
    """The checkpoint that a command begins with.

    Attributes:
        path: Where it lies.
        checkpoint: What `read_checkpoint` returns.
        trained_with: The options of model, data and seed that the checkpoint holds.
        run_options: All options of its run, for `fit`; None if it lies in no run's folder.
        run: The folder of the run that `fit` resumes, if it resumes one.
    """

    path: Path
    checkpoint: dict[str, Any]
    trained_with: dict[str, Any]
    run_options: dict[str, Any] | None = None
    run: Path | None = None


def first_look(args: list[str], commands: Collection[str]) -> Start:
    """Finds command, checkpoint and root among arguments, all of which the parser then reads."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # Of a root that is given and one in a configuration the later one counts.
    roots: Any = {"dest": "roots", "action": "append", "nargs": "?", "default": []}
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--ckpt", nargs="?", const=True)  # without a value
    parser.add_argument("--trainer.default_root_dir", **roots)
    parser.add_argument("--config", "-c", type=root_in, **roots)
    look, rest = parser.parse_known_args(args)
    command = next((arg for arg in rest if arg in commands), "")
    root = next((root for root in reversed(look.roots) if root), "")
    default = "last" if command == "fit" else "best"
    without = look.help or not command or (command == "fit" and look.ckpt is None)
    ckpt = default if look.ckpt in (None, True) else look.ckpt
    return Start(command, None if without else ckpt, Path(root).expanduser())


def root_in(config: str) -> str | None:
    """The root that a configuration file gives, if any; the parser tells what is wrong with it."""
    with contextlib.suppress(OSError, yaml.YAMLError, LookupError, TypeError):
        return str(yaml.safe_load(Path(config).read_text())["trainer"]["default_root_dir"] or "")
    return None


def find_source(command: str, ckpt: str, root: Path, defaults: Mapping[str, Any]) -> Source:
    """Reads the checkpoint that a command begins with, and the options that it brings.

    Args:
        command: fit, validate or test.
        ckpt: A path, or `best` or `last` of the newest run.
        root: Where the runs are.
        defaults: Of all options; a checkpoint of an earlier version may have others.

    Raises:
        UserError: If there is no such checkpoint, or it cannot be read.
    """
    path = find_checkpoint(ckpt, root / LOGS)
    checkpoint, run = read_checkpoint(path), path.absolute().parents[1]
    stored = stored_options(checkpoint, defaults)
    if command != "fit":  # an optimizer that is gone since must not hinder a test
        stored["model"] = {n: v for n, v in stored["model"].items() if n not in TRAINING_ONLY}
    if command != "fit" or not (run / "run.json").is_file():
        return Source(path, checkpoint, stored)
    # From an earlier checkpoint a new run branches off; the old one stays as it is.
    resumed = run if path.absolute() == run / "checkpoints" / "last.ckpt" else None
    return Source(path, checkpoint, stored, read_config(run / "config.yaml"), resumed)


def stored_options(checkpoint: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint holds, as a configuration."""
    model, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    options: dict[str, Any] = {
        "model": {name: value for name, value in model.items() if name in defaults["model"]},
        "data": {name: value for name, value in data.items() if name in defaults["data"]},
    }
    seed = options["data"].pop("seed", None)  # follows from seed_everything
    return options if seed is None else {"seed_everything": seed, **options}


def read_config(file: Path) -> dict[str, Any]:
    """The options of a run, without those that have been removed since."""
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for section, name in (option.split(".") for option in REMOVED):
        config[section].pop(name, None)
    return config


def check_options(config: Namespace, start: Start) -> None:
    """Refuses options that would silently do harm."""
    if config.ckpt is not None:
        raise UserError(f"ckpt is {config.ckpt!r} in a configuration: give it as --ckpt")
    root = Path(config.trainer.default_root_dir or "").expanduser()
    if start.ckpt in ("best", "last") and root.absolute() != start.root.absolute():
        raise UserError(
            f"trainer.default_root_dir is {str(root)!r}, but ckpt was looked for in "
            f"{str(start.root)!r}: give --trainer.default_root_dir, or a path as --ckpt"
        )
    if any(way in str(config.trainer.strategy) for way in ("spawn", "fork", "notebook")):
        raise UserError(
            f"trainer.strategy is {config.trainer.strategy}, whose processes a signal does not "
            "end: give ddp"
        )
    check_mode("model.lr_scheduler", config.model.get("lr_scheduler.init_args"))


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that change an option, or take the worst for the best."""
    for callback in callbacks:
        check_mode(type(callback).__name__, callback)
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise UserError(
                f"{type(callback).__name__} changes options that config.yaml then lacks: "
                "try values of --data.batch_size or --model.optimizer.lr in short runs instead"
            )


def check_mode(owner: str, options: Any) -> None:
    """Refuses to take the lowest accuracy, or the highest loss, for the best."""
    monitor, mode = str(getattr(options, "monitor", "")), getattr(options, "mode", None)
    for metric, wrong, right in (("loss", "max", "min"), ("acc", "min", "max")):
        if monitor.endswith(metric) and mode == wrong:
            raise UserError(
                f"{owner}.monitor is {monitor}, and mode {wrong} would keep the worst: "
                f"give mode {right}"
            )


def compare_with_checkpoint(
    command: str, config: Namespace, trained: Namespace, checkpoint: Mapping[str, Any]
) -> None:
    """Refuses options that the checkpoint does not allow; tells which others have changed.

    Args:
        command: fit, validate or test.
        config: Its options.
        trained: Those that the checkpoint was trained with; defaults where it has none.
        checkpoint: What `read_checkpoint` returns.
    """
    if command == "fit":
        check_resumable(checkpoint, config.trainer.max_steps)
    if command != "test" and "dataset" in checkpoint["datamodule_hyper_parameters"]:
        check_split(config.data, trained.data)
    if not checkpoint["class_names"]:
        return  # another project's weights, whose scaling is given
    # Code in Python may have chosen optimizer and scheduler; a checkpoint then has neither.
    ignored = {"compile"} | {
        name
        for name in TRAINING_ONLY
        if command != "fit" or name not in checkpoint["hyper_parameters"]
    }
    for name, (before, now) in changed_options(trained.model, config.model, ignored).items():
        raise UserError(
            f"model.{name} is {now}, but the checkpoint was trained with {before}: leave it out, "
            "or begin a new run"
        )
    if command == "fit":
        for name, (before, now) in changed_options(trained.data, config.data, {"urls"}).items():
            print_once(f"Note: data.{name} is {now}, and was {before} so far in this run")


def changed_options(
    trained: Namespace, options: Namespace, ignored: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """(before, now) of each option that has changed, such as `optimizer.init_args.lr`."""
    before, now = (dict(each.clone(with_meta=False).items()) for each in (trained, options))
    return {
        name: (before.get(name), now.get(name))
        for name in before | now
        if before.get(name) != now.get(name) and name.split(".")[0] not in ignored
    }


def check_split(data: Namespace, trained: Namespace) -> None:
    """Refuses to split another number of images off the same data set for validation."""
    before, now = (Path(each.dataset).expanduser().resolve() for each in (trained, data))
    has_own = data.dataset not in DATASETS and (now / "val").is_dir()
    if before != now or has_own:
        return
    if data.val_size not in (0, trained.val_size):
        raise UserError(
            f"data.val_size is {data.val_size}, but the checkpoint was trained with "
            f"{trained.val_size}: images that trained would validate; leave it out"
        )


def check_resumable(checkpoint: Mapping[str, Any], max_steps: int) -> None:
    """Refuses a run that could not resume as it would have gone on."""
    if not is_resumable(checkpoint):
        raise UserError("ckpt holds weights only, from which fit cannot go on; test can use them")
    if "dataset" not in checkpoint["datamodule_hyper_parameters"]:
        raise UserError("ckpt was trained in Python on other data: resume it there")
    progress = checkpoint["loops"].get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    if not progress.get("is_last_batch"):
        raise UserError("ckpt was saved within an epoch: resume from the run's last.ckpt instead")
    if max_steps != -1:
        raise UserError("trainer.max_steps cannot end a resumed run: give --trainer.max_steps=-1")
