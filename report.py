"""The report: what a network got right and wrong, in numbers, pictures and files.

It is made of predictions alone, the probabilities and the labels of images; `test` and `validate`
write all of it, training shows the pictures in TensorBoard.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.markup import escape
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from checkpoints import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15  # of confidence, for the calibration error: as in Guo et al. 2017
MOST_CONFUSED = 3  # pairs that the report names
MISTAKES = 24  # images in a gallery
COLUMNS = 8  # of a gallery


class Predictions(Metric):
    """Collects probabilities and labels, from all processes, in the order of the data.

    Images are expected as `CIFARDataModule` evaluates them: process r of n has every n-th, from r.
    """

    probabilities: list[Tensor]
    labels: list[Tensor]
    positions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("probabilities", "labels", "positions"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Takes the logits (N, C) and the labels (N,) of the next N images."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, processes = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size())
            if several
            else (0, 1)
        )
        first = sum(len(part) for part in self.labels)
        self.probabilities.append(logits.detach().float().softmax(dim=1))
        self.labels.append(labels)
        self.positions.append(
            torch.arange(first, first + len(labels), device=labels.device) * processes + rank
        )

    def compute(self) -> tuple[Tensor, Tensor]:
        """Probabilities (N, C) float32 and labels (N,) int64 of all images so far, on the CPU."""

        def cat(parts: Tensor | list[Tensor]) -> Tensor:  # the processes' parts come as a tensor
            return torch.cat(parts) if isinstance(parts, list) else parts

        order = cat(self.positions).argsort()
        return cat(self.probabilities)[order].cpu(), cat(self.labels)[order].cpu()


def confusions(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrix (C, C) int64: row i, column j counts images of class i taken for class j."""
    classes = probabilities.shape[1]
    return multiclass_confusion_matrix(probabilities, labels, classes, validate_args=False)


def summary(probabilities: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The report in numbers, ready for JSON.

    Args:
        probabilities: (N, C) float32.
        labels: (N,) int64.
        names: Of the C classes.

    Returns:
        images (their number), acc (the share that is right) and its 95 % interval of Wilson (1927),
        loss (cross-entropy), ece (expected calibration error, Guo et al. 2017, 15 bins), classes
        (precision, recall, F1 and number of images of each) and confused (the pairs of classes
        that are most often confused, one for the other).
    """
    from scipy.stats import binomtest  # slow to import: only where needed

    counts = confusions(probabilities, labels)
    right, images = int(counts.diag().sum()), len(labels)
    interval = binomtest(right, images).proportion_ci(0.95, method="wilson")
    calibration = multiclass_calibration_error(
        probabilities, labels, len(names), n_bins=BINS, validate_args=False
    )
    loss = F.nll_loss(probabilities.clamp(min=1e-12).log(), labels)
    return {
        "images": images,
        "acc": right / images,
        "acc_interval_95": [float(interval.low), float(interval.high)],
        "loss": float(loss),
        "ece": float(calibration),
        "classes": class_scores(counts, names),
        "confused": most_confused(counts, names),
    }


def class_scores(counts: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and images of each class; 0 where a share of nothing was asked for."""
    right, true, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    return [
        {
            "class": name,
            "precision": int(r) / max(int(p), 1),
            "recall": int(r) / max(int(t), 1),
            "f1": 2 * int(r) / max(int(p) + int(t), 1),
            "images": int(t),
        }
        for name, r, t, p in zip(names, right, true, predicted, strict=True)
    ]


def most_confused(counts: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs that are most often confused: both classes, and how often either way."""
    both = (counts + counts.T).triu(diagonal=1)
    top = both.flatten().topk(min(MOST_CONFUSED, both.numel()))
    pairs = [divmod(int(index), len(names)) for index in top.indices]
    return [
        {
            "classes": [names[i], names[j]],
            "first_taken_for_second": int(counts[i, j]),
            "second_taken_for_first": int(counts[j, i]),
        }
        for i, j in pairs
        if both[i, j]
    ]


def confident_mistakes(probabilities: Tensor, labels: Tensor, most: int = MISTAKES) -> Tensor:
    """Positions of at most `most` wrong predictions, the most confident first."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:most]]


def confusion_figure(counts: Tensor, names: Sequence[str], title: str) -> "Figure":
    """Draws a confusion matrix: a row shows what the images of a class were taken for."""
    from matplotlib.figure import Figure  # slow to import, as is all of matplotlib

    many = len(names) > 20  # too many for numbers in the cells
    side = 11.0 if many else 3.0 + 0.5 * len(names)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    percent = (shares * 100).round()
    axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    for cell, value in enumerate([] if many else percent.flatten().tolist()):
        row, column = divmod(cell, len(names))
        colour = "white" if value > 50 else "black" if value else "lightgrey"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    size = 5 if many else 10
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, rotation=0, fontsize=size)
    axes.set_xlabel("predicted", fontsize=11)
    axes.set_ylabel("true", fontsize=11)
    axes.set_title(f"{title}\n% of the images of each true class", fontsize=11)
    return figure


def mistakes_figure(
    images: Tensor, probabilities: Tensor, labels: Tensor, names: Sequence[str], title: str
) -> "Figure":
    """Draws the most confident mistakes.

    Args:
        images: (N, 3, H, W) uint8, of which those are drawn.
        probabilities: (N, C).
        labels: (N,).
        names: Of the C classes.
        title: Stands above them.
    """
    wrong = confident_mistakes(probabilities, labels)
    confidence, predicted = probabilities[wrong].max(dim=1)
    captions = [
        f"{names[label]}\n→ {names[taken_for]} {share:.0%}"
        for label, taken_for, share in zip(labels[wrong], predicted, confidence, strict=True)
    ]
    shown = images[wrong.to(images.device)].cpu()
    return gallery(shown, captions, title if captions else f"{title}: there are none")


def gallery(images: Tensor, captions: Sequence[str], title: str) -> "Figure":
    """Draws images (N, 3, H, W) uint8 in rows of eight, a caption of two lines under each."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    side, caption = images.shape[-1], math.ceil(images.shape[-1] * 0.4)
    rows = max(1, math.ceil(len(images) / COLUMNS))
    figure = Figure(figsize=(1.15 * COLUMNS, 1.6 * rows + 0.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    if len(images):
        gap = side // 8
        tiles = F.pad(images, (0, 0, 0, caption), value=255)
        grid = make_grid(tiles, COLUMNS, padding=gap, pad_value=255)
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        for index, text in enumerate(captions):
            row, column = divmod(index, COLUMNS)
            x = gap + column * (side + gap) + side / 2
            y = gap + row * (side + caption + gap) + side * 1.03
            axes.text(x, y, text, ha="center", va="top", fontsize=7, linespacing=1.1)
    return figure


def curves_figure(curves: dict[str, list[tuple[int, float]]]) -> "Figure":
    """Draws loss and accuracy in training and validation against epochs.

    Args:
        curves: (epoch, value) of `train/loss`, `val/loss`, `train/acc` and `val/acc`, as far as
            there are any.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("loss", "acc"), ("cross-entropy", "accuracy"), strict=True
    ):
        for stage, long_name in (("train", "training"), ("val", "validation")):
            if points := curves.get(f"{stage}/{name}"):
                axes.plot(*zip(*points, strict=True), label=long_name, marker=".", markersize=4)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def write_all(
    folder: Path,
    stage: str,
    images: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    names: Sequence[str],
    circumstances: dict[str, Any],
) -> list[str]:
    """Prints the report and writes its files into a folder.

    Args:
        folder: Where they go; those of an earlier report are replaced.
        stage: `test` or `val`, whose files are named differently.
        images: (N, 3, H, W) uint8, as the network saw them.
        probabilities: (N, C).
        labels: (N,).
        names: Of the C classes.
        circumstances: What else test.json is to say.

    Returns:
        The names of the files.
    """
    content = {**circumstances, **summary(probabilities, labels, names)}
    show(stage, content)
    title = f"{stage}/acc {content['acc']:.4f} on {len(labels):,} images"
    matrix = confusion_figure(confusions(probabilities, labels), names, title)
    mistakes = mistakes_figure(
        images, probabilities, labels, names, f"{title}: the most confident mistakes"
    )
    prefix, report = ("", "test.json") if stage == "test" else ("validate_", "validate.json")
    files: dict[str, bytes | str] = {
        f"{prefix}predictions.csv": as_csv(prediction_rows(probabilities, labels, names)),
        f"{prefix}confusion_matrix.png": as_png(matrix),
        f"{prefix}mistakes.png": as_png(mistakes),
        report: as_json(content),  # the last: where it is, the others are
    }
    for name, file in files.items():
        write(folder / name, file)
    return list(files)


def show(stage: str, content: dict[str, Any]) -> None:
    """Prints the report."""
    from rich.console import Console
    from rich.table import Table

    low, high = content["acc_interval_95"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    for name in ("precision", "recall", "F1", "images"):
        table.add_column(name, justify="right")
    for row in content["classes"]:
        shares = (f"{row[name]:.4f}" for name in ("precision", "recall", "f1"))
        table.add_row(escape(row["class"]), *shares, f"{row['images']:,}")
    pairs = [
        f"{pair['classes'][0]} and {pair['classes'][1]} "
        f"({pair['first_taken_for_second']} + {pair['second_taken_for_first']})"
        for pair in content["confused"]
    ]
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{stage}/acc {content['acc']:.4f}, 95 % interval {low:.4f} to {high:.4f}, "
        f"{content['images']:,} images"
    )
    if "acc_mirrored" in content:
        console.print(
            f"{stage}/acc_mirrored {content['acc_mirrored']:.4f}, a figure of its own: each image "
            "and its mirror image have a say"
        )
    console.print(f"{stage}/loss {content['loss']:.4f}, calibration error {content['ece']:.4f}")
    console.print(table)
    console.print(escape(f"Most confused: {', '.join(pairs) or 'none'}"))


def show_predictions(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line for each image: file, class, probability and the next classes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("file", "class", "probability", "next"):
        table.add_column(name, justify="right" if name == "probability" else "left")
    for row in rows:
        others = ", ".join(f"{o['class']} {o['probability']:.4f}" for o in row["next"])
        cells = (row["file"], row["class"], f"{row['probability']:.4f}", others)
        table.add_row(*map(escape, cells))
    console = Console(highlight=False)
    if not console.is_terminal:  # nothing is cut off in a file or a pipe
        console = Console(highlight=False, width=10_000)
    console.print(table)


def prediction_rows(
    probabilities: Tensor, labels: Tensor, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Index, true and predicted class, and the probability of the latter, of each image."""
    confidence, predicted = probabilities.max(dim=1)
    columns = zip(labels, predicted, confidence, strict=True)
    return [
        {"index": i, "true": names[true], "predicted": names[top], "probability": f"{share:.4f}"}
        for i, (true, top, share) in enumerate(columns)
    ]


def ranking(probabilities: Tensor, names: Sequence[str], most: int = 3) -> list[dict[str, Any]]:
    """For each row of probabilities (N, C): class, probability and the next classes."""
    top = probabilities.topk(min(most, len(names)), dim=1)
    ranked = [
        [
            {"class": names[index], "probability": round(share, 4)}
            for index, share in zip(indices, shares, strict=True)
        ]
        for indices, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return [{**best, "next": others} for best, *others in ranked]


def flat_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Predictions as a table: file, class, probability, and two columns for each next class."""
    flat = []
    for row in rows:
        columns = {name: value for name, value in row.items() if name != "next"}
        for place, other in enumerate(row["next"], start=2):
            columns |= {f"class_{place}": other["class"]}
            columns |= {f"probability_{place}": other["probability"]}
        flat.append(columns)
    return as_csv(flat)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A table with a line of headings."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def as_png(figure: "Figure") -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
