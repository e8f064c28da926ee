"""Class probabilities for image files, by a trained network.

    python predict.py cat.jpg holiday/
    python predict.py cat.jpg --ckpt resnet20.th --output out.csv  # or out.json

Without --ckpt it is the best network of the newest run or, where there is no run, the one that
comes with the project. The shorter side of an image is resized to what the network takes, and the
centre is cropped.
"""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_datamodule import CIFARDataModule
from cifar_resnet.files import atomic_write, to_csv, to_json
from cifar_resnet.images import evaluation_view, image_files, read_square
from cifar_resnet.messages import one_line_errors, relative
from cifar_resnet.scripts import ScriptParser, choose_checkpoint, file_ending_in
from resnet_module import ResNetModule

FORMATS = {".csv": to_csv, ".json": to_json}


def main(args: Sequence[str] | None = None) -> int:
    """Prints and writes the predictions; returns 1 if a file could not be read, else 0."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be UTF-8
    parser = ScriptParser(__doc__)
    parser.add_argument("images", nargs="+", help="files, or folders with images at any level")
    parser.add_argument(
        "--output", type=file_ending_in(FORMATS), help="file for the table: .csv or .json"
    )
    with one_line_errors():
        options = parser.parse_args(args)
        files = image_files(options.images)
        path, checkpoint = choose_checkpoint(options)
        module = ResNetModule.from_checkpoint(checkpoint)
        if str(path) != options.ckpt:
            print(f"Checkpoint: {relative(path)}", file=sys.stderr)
        rows = list(predict(files, module, CIFARDataModule.from_checkpoint(checkpoint)))
        if rows:
            print_table(rows)
        if rows and options.output:
            atomic_write(options.output, FORMATS[options.output.suffix](rows))
    return 0 if len(rows) == len(files) else 1


def predict(
    files: Iterable[Path], module: ResNetModule, data: CIFARDataModule
) -> Iterator[dict[str, Any]]:
    """Yields a row of the table for each file; reports what is not an image."""
    for file in files:
        try:
            image = read_square(file, data.hparams["image_size"])
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        with torch.inference_mode():
            logits = module(evaluation_view(image[None] / 255, data.evaluation))
        yield {"file": str(file), **top_classes(logits.softmax(1)[0], module.class_names)}


def top_classes(probabilities: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The three most probable classes (fewer if there are no more), of probabilities (C,)."""
    top = probabilities.topk(min(3, len(names)))
    columns: dict[str, Any] = {}
    for suffix, index, share in zip(("", "_2", "_3"), top.indices, top.values, strict=False):
        columns[f"class{suffix}"] = names[index]
        columns[f"probability{suffix}"] = round(float(share), 4)
    return columns


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows with the same keys in aligned columns."""
    cells = [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    columns = list(zip(rows[0], *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print("  ".join(map(str.ljust, line, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
