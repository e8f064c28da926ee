"""What `test` and `validate` say of predictions: metrics, a table, pictures, files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cifar_resnet.figures import FIGURES, PredictedImages, to_png
from cifar_resnet.files import atomic_write, to_csv, to_json
from cifar_resnet.messages import UserError

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
        """Adds the next images of this process: probabilities (N, ...) and labels (N,) int64."""
        rank, processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first = sum(len(part) for part in self.labels)
        indices = torch.arange(first, first + len(labels), device=labels.device)
        self.probabilities.append(probabilities)
        self.labels.append(labels)
        self.positions.append(indices * processes + rank)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns probabilities (N, ...) and labels (N,) int64 of all images, on the CPU."""
        order = dim_zero_cat(self.positions).argsort()
        probabilities, labels = dim_zero_cat(self.probabilities), dim_zero_cat(self.labels)
        return probabilities[order].cpu(), labels[order].cpu()


def summarize(predicted: PredictedImages) -> dict[str, Any]:
    """Computes the metrics of the report, ready for JSON.

    Returns:
        `images` (N), `acc` (accuracy) and `acc_interval_95` (Wilson 1927), `loss` (cross-entropy),
        `ece` (expected calibration error), `classes` (precision, recall, F1 and number of images of
        each class) and `confused` (the most confused pairs of classes).

    Raises:
        UserError: If there is no image.
    """
    from scipy.stats import binomtest
    from sklearn.metrics import classification_report

    probabilities, labels, names = predicted.probabilities, predicted.labels, predicted.class_names
    if not len(labels):
        raise UserError(
            "no image was tested: give --trainer.limit_test_batches, or limit_val_batches and "
            "--data.val_size, a number above 0"
        )
    correct, classes = int(predicted.counts.diag().sum()), range(len(names))
    interval = binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson")
    rows = classification_report(
        labels, probabilities.argmax(dim=1), labels=classes, output_dict=True, zero_division=0
    )
    return {
        "images": len(labels),
        "acc": correct / len(labels),
        "acc_interval_95": [float(interval.low), float(interval.high)],
        "loss": float(F.nll_loss(probabilities.clamp(min=1e-12).log(), labels)),
        "ece": predicted.calibration_error,
        "classes": {names[index]: rows[str(index)] for index in classes},
        "confused": most_confused(predicted.counts, names),
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
    folder: Path, stage: str, predicted: PredictedImages, metadata: Mapping[str, Any]
) -> list[str]:
    """Prints the report and writes its files, which replace those of an earlier report.

    Args:
        folder: Where the files go.
        stage: `test` or `val`; the names of the files depend on it.
        predicted: The images of that stage.
        metadata: More entries of test.json, such as the checkpoint; `acc_mirrored` is printed.

    Returns:
        The names of the files.

    Raises:
        UserError: If there is no image.
    """
    summary = {**metadata, **summarize(predicted)}
    print_report(stage, summary)
    title = f"{stage}/acc {summary['acc']:.4f} on {summary['images']:,} images"
    prefix, report = ("", "test.json") if stage == "test" else ("validate_", "validate.json")
    files: dict[str, bytes | str] = {f"{prefix}predictions.csv": to_csv(prediction_rows(predicted))}
    for name, draw in FIGURES.items():
        files[f"{prefix}{name}.png"] = to_png(draw(predicted, title))
    files[report] = to_json(summary)  # the last: where it is, the others are
    for name, content in files.items():
        atomic_write(folder / name, content)
    return list(files)


def prediction_rows(predicted: PredictedImages) -> list[dict[str, Any]]:
    """Returns index, true class, predicted class and its probability for each image."""
    names = predicted.class_names
    confidence, top = predicted.probabilities.max(dim=1)
    columns = zip(predicted.labels.tolist(), top.tolist(), confidence.tolist(), strict=True)
    return [
        {"index": i, "true": names[true], "predicted": names[best], "probability": f"{share:.4f}"}
        for i, (true, best, share) in enumerate(columns)
    ]
