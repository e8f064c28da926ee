"""What a user reads in the terminal: an error as one line, while bugs keep their traceback."""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm


class UserError(ValueError):
    """What a user can mend: one line that names the value and the way out."""


def fail(message: str, exit_code: int) -> NoReturn:
    """Ends the command with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


@contextlib.contextmanager
def one_line_errors(exit_code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with one line for an error of these kinds."""
    try:
        yield
    except (NameError, AttributeError, TypeError, LookupError, AssertionError):
        raise  # a bug of the code, whatever it was doing
    except kinds as error:
        fail(str(error) or type(error).__name__, exit_code)


class ScriptParser(argparse.ArgumentParser):
    """The options that predict.py and export.py share; errors without the usage before them."""

    def __init__(self, description: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw)
        self.add_argument("--ckpt", help="best or last of the newest run, or a path")
        for name in ("--input_mean", "--input_std"):
            scaling = "of other projects' weights, by channel"
            self.add_argument(name, nargs=3, type=float, help=scaling)

    def error(self, message: str) -> NoReturn:
        fail(message, 2)


def output_path(text: str, endings: Iterable[str]) -> Path:
    """A path, given on the command line, of a file that can be written and ends so."""
    path = Path(text)
    if path.suffix not in endings:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(endings)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    return path


class CommandParser(LightningArgumentParser):
    """Lightning's, with its errors in one line and without the usage before them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries whether a value fits one of several types
            super().error(message, ex)
        fail(message, 2)


def relative(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


@rank_zero_only
def print_once(line: str) -> None:
    """Prints a line, above a progress bar if there is one, in the first of several processes."""
    tqdm.write(line)


def silence_lightning() -> None:
    """Leaves out, by name, messages of Lightning's that are no news here."""
    for message in (
        "does not have many workers",  # the data lies in memory
        "exists and is not empty",  # a resumed run's folder
        "dirpath has changed",  # a run that branches off has best checkpoints of its own
        "not supported by the model summary",  # bf16-mixed
        "could not find the monitored key",  # before the first validation
        "on epoch level in distributed setting",  # the first process's values are logged
        "LeafSpec",  # Lightning 2.6 with newer torch
        "Unable to serialize instance",  # jsonargparse's: config.yaml leaves it out
        "smaller than the logging interval",  # metrics are logged for each epoch, not by steps
    ):
        warnings.filterwarnings("ignore", f"(?s).*{message}")
    silent = ("litlogger", "Tensor Cores")  # an advert; convolutions use Tensor Cores as they are
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: not any(text in record.getMessage() for text in silent))
