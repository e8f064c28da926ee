"""What predict.py and export.py share: their options, and the checkpoint that these choose."""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse.typing import PositiveFloat

from cifar_resnet.checkpoint import PRETRAINED, read_checkpoint
from cifar_resnet.messages import UserError
from cifar_resnet.runs import LOGS, find_checkpoint


class ScriptParser(argparse.ArgumentParser):
    """A parser that has the shared options, and whose errors are `UserError`s."""

    def __init__(self, description: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)
        self.add_argument("--ckpt", help="best or last of the newest run, or a path")
        for name, kind in (("--input_mean", float), ("--input_std", PositiveFloat)):
            scaling = "of other projects' weights, by channel"
            self.add_argument(name, nargs=3, type=kind, help=scaling)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def file_ending_in(endings: Collection[str]) -> Callable[[str], Path]:
    """The type of an option that names such a file, known before the work begins."""

    def convert(text: str) -> Path:
        path = Path(text)
        if path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(endings)}")
        return path

    return convert


def choose_checkpoint(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, path and content: by default the newest run's best, or else `PRETRAINED`.

    Args:
        options: Those of a `ScriptParser`.

    Raises:
        UserError: If there is no such checkpoint, if it can't be read, or if it has a scaling of
            its own and another one is given.
    """
    try:
        path = find_checkpoint(options.ckpt or "best", LOGS)
    except UserError:
        if options.ckpt:
            raise
        path = PRETRAINED
    checkpoint = read_checkpoint(path)
    scaling = {"input_mean": options.input_mean, "input_std": options.input_std}
    if any(scaling.values()):
        if "mean" in checkpoint["state_dict"]:
            raise UserError(f"{path} has its own input scaling: leave input_mean and _std out")
        checkpoint["hyper_parameters"] |= scaling
    return path, checkpoint
