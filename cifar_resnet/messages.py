"""What a user reads in the terminal: errors as one line, and what of Lightning's is left out."""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm


class UserError(ValueError):
    """An error that the user can mend: one line with name, value and way out."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line on stderr for an error that is no bug; bugs pass."""
    try:
        yield
    except (UserError, argparse.ArgumentError, MisconfigurationException, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before training, where Lightning sees to it
        sys.exit(130)


def relative(path: Path) -> str:
    """The path as one would type it in the current folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


@rank_zero_only
def print_once(line: str) -> None:
    """Prints a line, above a progress bar if there is one, in the first of several processes."""
    tqdm.write(line)


def silence_lightning() -> None:
    """Leaves out, by name, messages of Lightning's that tell nothing new."""
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
