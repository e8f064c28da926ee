"""Files: written whole or not at all, and tables as CSV and JSON."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all: beside its target, to the disk, then renamed.

    Raises:
        OSError: If it can't be written; the file from before is then still there.
    """
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")  # a file's name may not be UTF-8
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows with the same keys, at least one, as CSV with a header."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def to_json(content: Any) -> str:
    """Formats content as JSON for people to read: indented, with all letters as they are."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
