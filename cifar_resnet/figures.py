"""Pictures: those of predictions, all in one table; image grids; training curves.

A new picture is one function and one line in `FIGURES`: `test`, `validate` and TensorBoard then
show it. All are plain `matplotlib.figure.Figure` objects, which need no display and which no global
state of pyplot keeps alive.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15  # of confidence, as in Guo et al. 2017
COLUMNS = 8  # of an image grid
MAX_MISTAKES = 24
MAX_CLASSES_WITH_NUMBERS = 20  # numbers in the cells of a larger confusion matrix are illegible
MAX_CLASSES_WITH_NAMES = 200  # beside a larger one names are illegible, and take seconds to draw


@dataclass(frozen=True)
class PredictedImages:
    """Images with what a network makes of them: all that pictures and reports are made of.

    Attributes:
        images: (N, 3, H, W) uint8; where a limit left the last ones out, those may follow.
        probabilities: (N, C) float32.
        labels: (N,) int64.
        class_names: Of the C classes.
    """

    images: Tensor
    probabilities: Tensor
    labels: Tensor
    class_names: Sequence[str]

    @cached_property
    def counts(self) -> Tensor:
        """(C, C) int64; row i, column j counts images of class i predicted as class j."""
        return multiclass_confusion_matrix(self.probabilities, self.labels, len(self.class_names))

    @cached_property
    def calibration_error(self) -> float:
        """The expected calibration error, 0 to 1 (Guo et al. 2017, arXiv:1706.04599)."""
        classes = len(self.class_names)
        return float(multiclass_calibration_error(self.probabilities, self.labels, classes, BINS))


def shorten(names: Sequence[str], length: int) -> list[str]:
    """Cuts long names of classes, which would leave no room for the figure."""
    return [name if len(name) <= length else f"{name[: length - 1]}…" for name in names]


def confusion_figure(predicted: PredictedImages, title: str) -> "Figure":
    """Draws a confusion matrix in percent of the images of each true class."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    counts, names = predicted.counts, predicted.class_names
    percent = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(3 + 0.5 * len(names), 14)
    figure = Figure(figsize=(side, side), dpi=100, layout="compressed")
    axes = figure.add_subplot()
    ConfusionMatrixDisplay(percent.numpy(), display_labels=shorten(names, 20)).plot(
        ax=axes,
        cmap="Blues",
        include_values=len(names) <= MAX_CLASSES_WITH_NUMBERS,
        values_format=".0f",
        xticks_rotation="vertical",
        colorbar=len(names) > MAX_CLASSES_WITH_NUMBERS,
    )
    if len(names) > MAX_CLASSES_WITH_NAMES:
        axes.set(xticks=[], yticks=[])
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        label.set(fontsize=min(10, 600 / len(names)), parse_math=False)  # a "$" is no formula
    figure.suptitle(f"{title}\n% of the images of each true class", fontsize=11)
    return figure


def image_grid(images: Tensor, captions: Sequence[str], title: str) -> "Figure":
    """Draws images in rows of eight, each with a caption under it.

    Args:
        images: (N, 3, H, W) uint8.
        captions: Of each image, one or two lines.
        title: Stands above the grid.
    """
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    height, width = images.shape[2:]
    gap, caption_height = width // 8, math.ceil(height * 0.4)
    rows = max(1, math.ceil(len(images) / COLUMNS))
    missing = rows * COLUMNS - len(images)  # white tiles, so that every grid has the same scale
    tiles = F.pad(images, (0, 0, 0, caption_height, 0, 0, 0, missing), value=255)
    grid = make_grid(tiles, COLUMNS, padding=gap, pad_value=255)
    figure = Figure(figsize=(1.15 * COLUMNS, 1.6 * rows + 0.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    for index, caption in enumerate(captions):
        row, column = divmod(index, COLUMNS)
        x = gap + column * (width + gap) + width / 2
        y = gap + row * (height + caption_height + gap) + height * 1.03
        axes.text(x, y, caption, ha="center", va="top", fontsize=7, parse_math=False)
    return figure


def mistakes_figure(predicted: PredictedImages, title: str) -> "Figure":
    """Draws the wrong predictions of which the network was most confident, at most 24."""
    labels, short = predicted.labels, shorten(predicted.class_names, 13)
    confidence, top = predicted.probabilities.max(dim=1)
    wrong = (top != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)[:MAX_MISTAKES]]
    captions = [f"{short[labels[i]]}\n→ {short[top[i]]} {confidence[i]:.0%}" for i in wrong]
    title = f"{title}: the most confident mistakes{'' if captions else ', none'}"
    return image_grid(predicted.images[wrong], captions, title)


def reliability_figure(predicted: PredictedImages, title: str) -> "Figure":
    """Draws a reliability diagram (Guo et al. 2017): accuracy at each confidence.

    Where a bar ends below its mark, the network was more confident than right. The lower bars
    are the numbers of images.
    """
    from matplotlib.figure import Figure

    confidence, top = predicted.probabilities.double().max(dim=1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    images = bins.bincount(minlength=BINS)
    right = bins.bincount((top == predicted.labels).double(), BINS)
    accuracy = (right / images).numpy()  # NaN, which is not drawn, where there are no images
    mean_confidence = (bins.bincount(confidence, BINS) / images).numpy()
    figure = Figure(figsize=(6.5, 7), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    place = {"x": [i / BINS for i in range(BINS)], "width": 1 / BINS, "align": "edge"}
    upper.bar(height=accuracy, color="lightblue", edgecolor="white", label="accuracy", **place)
    upper.plot(mean_confidence, mean_confidence, "k_", markersize=15, label="mean confidence")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    upper.legend(loc="upper left", frameon=False)
    bars = lower.bar(height=images.numpy(), color="gray", edgecolor="white", **place)
    lower.bar_label(bars, [f"{count:,}" if count else "" for count in images], fontsize=7)
    lower.set(xlabel="confidence", ylabel="images", yscale="log")
    lower.margins(y=0.2)
    error = f"expected calibration error {predicted.calibration_error:.4f} in {BINS} bins"
    figure.suptitle(f"{title}\n{error}", fontsize=11)
    return figure


FIGURES: dict[str, Callable[[PredictedImages, str], "Figure"]] = {
    "confusion_matrix": confusion_figure,
    "mistakes": mistakes_figure,
    "reliability": reliability_figure,
}


def curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> "Figure":
    """Draws loss and accuracy of training and validation against epochs.

    Args:
        curves: (epoch, value) points of `train/loss`, `val/loss`, `train/acc` and `val/acc`; a
            curve that is missing is left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    metrics = {"loss": "cross-entropy", "acc": "accuracy"}
    for axes, (metric, label) in zip(figure.subplots(1, 2), metrics.items(), strict=True):
        for stage, long_name in (("train", "training"), ("val", "validation")):
            if points := curves.get(f"{stage}/{metric}"):
                axes.plot(*zip(*points, strict=True), label=long_name, marker=".", markersize=4)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def to_png(figure: "Figure") -> bytes:
    """Renders a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
