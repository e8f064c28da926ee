"""What `test` and `validate` write: collected predictions, their metrics, tables and files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)
from torchmetrics.utilities import dim_zero_cat

from cifar_resnet.datasets import LabelledImages
from cifar_resnet.figures import confusion_figure, mistakes_figure, to_png
from cifar_resnet.files import atomic_write, to_csv, to_json

CALIBRATION_BINS = 15  # as in Guo et al. 2017
CONFUSED_PAIRS = 3


class Predictions(Metric):
    """Collects probabilities and labels of all processes, in the order of the data set.

    Of n processes, process r must see the images r, r + n, r + 2n, ..., as with an
    `UnrepeatedDistributedSampler` that does not shuffle.
    """

    probabilities: list[Tensor]
    labels: list[Tensor]
    positions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("probabilities", "labels", "positions"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds the next images of this process: probabilities (N, C) and labels (N,) int64."""
        rank, processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first = sum(len(part) for part in self.labels)
        indices = torch.arange(first, first + len(labels), device=labels.device)
        self.probabilities.append(probabilities)
        self.labels.append(labels)
        self.positions.append(indices * processes + rank)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns probabilities (N, C) float32 and labels (N,) int64, on the CPU."""
        order = dim_zero_cat(self.positions).argsort()
        probabilities, labels = dim_zero_cat(self.probabilities), dim_zero_cat(self.labels)
        return probabilities[order].cpu(), labels[order].cpu()


class PredictionCollector(Callback):
    """Collects the predictions of `validate`, `test` and `predict`.

    The steps of the module must return probabilities (N, C) float32.

    Args:
        mirror: Show the network the mirror image of each image, too.

    Attributes:
        result: Probabilities (N, C) float32 and labels (N,) int64 of the last loop, on the CPU.
        mirrored: The same, but each image's probabilities are the mean of its own and of those of
            its mirror image; None without `mirror`.
    """

    result: tuple[Tensor, Tensor]
    mirrored: tuple[Tensor, Tensor] | None = None

    def __init__(self, mirror: bool = False) -> None:
        self.predictions = Predictions()
        self.means = Predictions() if mirror else None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, labels = batch
        self.predictions.update(outputs, labels)
        if self.means:
            with trainer.precision_plugin.forward_context():
                mirrored = pl_module(images.flip(3))
            self.means.update((outputs + mirrored.float().softmax(dim=1)) / 2, labels)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result = self.predictions.compute()
        self.predictions.reset()
        if self.means:
            self.mirrored = self.means.compute()
            self.means.reset()

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end


def summarize(probabilities: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Computes the metrics of the report, ready for JSON.

    Args:
        probabilities: (N, C) float32.
        labels: (N,) int64.
        names: Of the C classes.

    Returns:
        `images` (N), `acc` (accuracy) and `acc_interval_95` (Wilson 1927), `loss` (cross-entropy),
        `ece` (expected calibration error, Guo et al. 2017), `classes` (precision, recall, F1 and
        number of images of each class) and `confused` (the most confused pairs of classes).
    """
    from scipy.stats import binomtest
    from sklearn.metrics import classification_report

    predicted, classes = probabilities.argmax(dim=1), range(len(names))
    correct = int((predicted == labels).sum())
    interval = binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson")
    ece = multiclass_calibration_error(probabilities, labels, len(names), CALIBRATION_BINS)
    counts = multiclass_confusion_matrix(probabilities, labels, len(names))
    rows = classification_report(
        labels, predicted, labels=classes, output_dict=True, zero_division=0
    )
    return {
        "images": len(labels),
        "acc": correct / len(labels),
        "acc_interval_95": [float(interval.low), float(interval.high)],
        "loss": float(F.nll_loss(probabilities.clamp(min=1e-12).log(), labels)),
        "ece": float(ece),
        "classes": {names[index]: rows[str(index)] for index in classes},
        "confused": most_confused(counts, names),
    }


def most_confused(counts: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Finds the most frequent confusions in a confusion matrix, counting both directions."""
    both = (counts + counts.T).triu(diagonal=1)
    top = both.flatten().topk(min(CONFUSED_PAIRS, both.numel()))
    pairs = [divmod(int(index), len(names)) for index in top.indices]
    return [
        {
            "classes": [names[i], names[j]],
            "first_predicted_as_second": int(counts[i, j]),
            "second_predicted_as_first": int(counts[j, i]),
        }
        for i, j in pairs
        if both[i, j]
    ]


def print_report(stage: str, summary: Mapping[str, Any]) -> None:
    """Prints the metrics of stage `test` or `val`, with `acc_mirrored` if it is among them."""
    low, high = summary["acc_interval_95"]
    print(
        f"{stage}/acc {summary['acc']:.4f}, 95 % interval {low:.4f} to {high:.4f}, "
        f"{summary['images']:,} images"
    )
    if "acc_mirrored" in summary:
        print(
            f"{stage}/acc_mirrored {summary['acc_mirrored']:.4f}: "
            "each image and its mirror image, probabilities averaged"
        )
    print(f"{stage}/loss {summary['loss']:.4f}, calibration error {summary['ece']:.4f}")
    width = max(len(name) for name in ("class", *summary["classes"]))
    print(f"{'class':{width}}  precision  recall      F1  images")
    for name, row in summary["classes"].items():
        scores = f"{row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1-score']:6.4f}"
        print(f"{name:{width}}  {scores}  {row['support']:6,.0f}")
    pairs = [
        f"{pair['classes'][0]} and {pair['classes'][1]} "
        f"({pair['first_predicted_as_second']} + {pair['second_predicted_as_first']})"
        for pair in summary["confused"]
    ]
    print(f"Most confused: {', '.join(pairs) or 'none'}")


def write_report(
    folder: Path,
    stage: str,
    data: LabelledImages,
    probabilities: Tensor,
    metadata: Mapping[str, Any],
) -> list[str]:
    """Prints the report and writes its files, which replace those of an earlier report.

    Args:
        folder: Where the files go.
        stage: `test` or `val`; the names of the files depend on it.
        data: The N images that were predicted, with their labels and the names of the C classes.
        probabilities: (N, C) float32.
        metadata: More entries of test.json, such as the checkpoint; `acc_mirrored` is printed.

    Returns:
        The names of the files.
    """
    images, labels, names = data
    summary = {**metadata, **summarize(probabilities, labels, names)}
    print_report(stage, summary)
    title = f"{stage}/acc {summary['acc']:.4f} on {len(labels):,} images"
    counts = multiclass_confusion_matrix(probabilities, labels, len(names))
    mistakes = f"{title}: the most confident mistakes"
    prefix, report = ("", "test.json") if stage == "test" else ("validate_", "validate.json")
    files: dict[str, bytes | str] = {
        f"{prefix}predictions.csv": to_csv(prediction_rows(probabilities, labels, names)),
        f"{prefix}confusion_matrix.png": to_png(confusion_figure(counts, names, title)),
        f"{prefix}mistakes.png": to_png(
            mistakes_figure(images, probabilities, labels, names, mistakes)
        ),
        report: to_json(summary),  # the last: where it is, the others are
    }
    for name, content in files.items():
        atomic_write(folder / name, content)
    return list(files)


def prediction_rows(
    probabilities: Tensor, labels: Tensor, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns index, true class, predicted class and its probability for each image."""
    confidence, predicted = probabilities.max(dim=1)
    columns = zip(labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    return [
        {"index": i, "true": names[true], "predicted": names[top], "probability": f"{share:.4f}"}
        for i, (true, top, share) in enumerate(columns)
    ]
