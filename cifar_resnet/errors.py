"""Errors that a user can cause end a command with one line; bugs keep their traceback."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn


def fail(message: str, exit_code: int) -> NoReturn:
    """Ends the command with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


@contextlib.contextmanager
def one_line_errors(exit_code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with one line for an error of these kinds."""
    try:
        yield
    except (NameError, AttributeError):
        raise  # a bug of the code, whatever it was doing
    except kinds as error:
        fail(str(error) or type(error).__name__, exit_code)


class ScriptParser(argparse.ArgumentParser):
    """argparse's parser, without the usage before an error."""

    def error(self, message: str) -> NoReturn:
        fail(message, 2)
