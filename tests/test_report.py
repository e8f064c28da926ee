"""The report of `test` and `validate`: its metrics, figures and files, against references."""

import csv
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import QUIET
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

from cifar_resnet.callbacks import PredictionCollector
from cifar_resnet.figures import (
    FIGURES,
    PredictedImages,
    curves_figure,
    image_grid,
    to_png,
)
from cifar_resnet.report import (
    summarize,
    write_report,
)

NAMES = ["$ant$", "b_e^2", 'cow, "C"', "[döner]"]


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def random_predictions(count: int = 500, names: Sequence[str] = NAMES) -> PredictedImages:
    """Better than chance, unevenly spread over the classes."""
    rng, classes = np.random.default_rng(0), len(names)
    shares = np.arange(1, classes + 1)
    labels = torch.from_numpy(rng.choice(classes, count, p=shares / shares.sum()))
    logits = torch.from_numpy(rng.normal(size=(count, classes))).float()
    logits[torch.arange(count), labels] += 1
    return PredictedImages(random_images(count), logits.softmax(dim=1), labels, names)


def certain(predicted: list[int], labels: list[int], names: Sequence[str]) -> PredictedImages:
    """Predictions with a probability of 1."""
    probabilities = one_hot(torch.tensor(predicted), len(names)).float()
    return PredictedImages(random_images(len(labels)), probabilities, torch.tensor(labels), names)


# Metrics


def test_metrics_match_formulas_and_sklearn() -> None:
    given = random_predictions()
    summary, probabilities, labels = summarize(given), given.probabilities, given.labels
    n, z = len(labels), 1.959964
    p = int((probabilities.argmax(dim=1) == labels).sum()) / n
    assert summary["images"] == n
    assert summary["acc"] == p
    # Wilson 1927: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert summary["acc_interval_95"] == pytest.approx(expected, abs=1e-6)

    of_true_class = [float(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    assert summary["loss"] == pytest.approx(-np.log(of_true_class).mean(), rel=1e-5)

    confidence, predicted = (part.numpy() for part in probabilities.max(dim=1))
    correct, bins = predicted == labels.numpy(), np.ceil(confidence * 15)
    gaps = [
        (bins == b).mean() * abs(correct[bins == b].mean() - confidence[bins == b].mean())
        for b in np.unique(bins)
    ]
    assert summary["ece"] == pytest.approx(sum(gaps), abs=1e-5)

    rows = summary["classes"]
    assert list(rows) == NAMES
    expected = precision_recall_fscore_support(labels, predicted)
    for score, values in zip(("precision", "recall", "f1-score", "support"), expected, strict=True):
        assert [row[score] for row in rows.values()] == pytest.approx(values.tolist())


def test_most_confused_pairs_count_both_directions() -> None:
    pairs = [(0, 1)] * 3 + [(1, 0)] * 2 + [(3, 2)] * 4 + [(1, 2)] * 2 + [(0, 3)] + [(0, 0)] * 9
    labels, predicted = (list(column) for column in zip(*pairs, strict=True))
    given = certain(predicted, labels, NAMES)
    assert given.counts.tolist() == confusion_matrix(labels, predicted).tolist()
    keys = ("classes", "first_predicted_as_second", "second_predicted_as_first")
    expected = [(NAMES[:2], 3, 2), (NAMES[2:], 0, 4), (NAMES[1:3], 2, 0)]
    found = summarize(given)["confused"]
    assert found == [dict(zip(keys, each, strict=True)) for each in expected]


def test_class_without_images_scores_zero_and_may_have_the_name_of_a_row_of_sklearn() -> None:
    summary = summarize(certain([0, 1, 1], [0, 1, 1], ["accuracy", "macro avg", "c"]))
    assert [row["support"] for row in summary["classes"].values()] == [1, 2, 0]
    assert summary["classes"]["c"] == {"precision": 0, "recall": 0, "f1-score": 0, "support": 0}
    assert summary["acc_interval_95"][1] == 1
    assert summary["confused"] == []


class LinearModule(LightningModule):
    """Returns what `ResNetModule` returns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 4 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))

    def validation_step(self, batch: Any) -> Tensor:
        return self(batch[0]).float().softmax(dim=1)

    test_step = validation_step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_collector_collects_the_last_loop_and_means_with_mirror_images(
    verb: str, mirror: bool, precision: Any
) -> None:
    torch.manual_seed(0)
    module, images, labels = LinearModule(), torch.randn(10, 3, 4, 4), torch.arange(10) % 3
    collector = PredictionCollector(mirror)
    trainer = Trainer(precision=precision, callbacks=[collector], **QUIET)
    for _ in range(2):  # the result is that of the last loop alone
        loader = DataLoader(TensorDataset(images, labels), batch_size=4)
        getattr(trainer, verb)(module, loader)
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        own, other = (module(view).float().softmax(dim=1) for view in (images, images.flip(-1)))
    torch.testing.assert_close(collector.result[0], own)
    assert torch.equal(collector.result[1], labels)
    if mirror:
        torch.testing.assert_close(collector.mirrored, (own + other) / 2)
    else:
        assert collector.mirrored is None


# Figures


def drawn_tiles(figure: Any) -> list[np.ndarray[Any, Any]]:
    """The image above each caption of a grid of 32 × 32 images."""
    axes = figure.axes[0]
    grid = np.asarray(axes.images[0].get_array())
    corners = [(int(x) - 16, int(y)) for x, y in (text.get_position() for text in axes.texts)]
    return [grid[:bottom, left : left + 32][-32:] for left, bottom in corners]


def test_mistakes_are_sorted_by_confidence() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]])
    labels, images = torch.tensor([0, 0, 1, 0, 1]), random_images(5)
    given = PredictedImages(images, probabilities, labels, ["ant", "bee"])
    figure = FIGURES["mistakes"](given, "Title")
    captions = [text.get_text() for text in figure.axes[0].texts]
    assert captions == ["ant\n→ bee 80%", "ant\n→ bee 70%", "bee\n→ ant 60%"]
    for tile, position in zip(drawn_tiles(figure), [1, 3, 2], strict=True):
        assert np.array_equal(tile, images[position].permute(1, 2, 0))


def test_mistakes_are_24_at_most_and_a_picture_says_if_there_are_none() -> None:
    many, none = (
        FIGURES["mistakes"](certain([0] * 30, [label] * 30, NAMES), "Title").axes[0]
        for label in (1, 0)
    )
    assert (len(many.texts), len(none.texts)) == (24, 0)
    assert none.get_title() == "Title: the most confident mistakes, none"


def bars(axes: Any) -> dict[int, float]:
    """The height of each bar that is drawn, by its bin."""
    shown = [bar for bar in axes.patches if bar.get_height() > 0]
    assert all(bar.get_width() == pytest.approx(1 / 15) for bar in shown)
    return {round(bar.get_x() * 15): bar.get_height() for bar in shown}


def test_reliability_diagram_matches_sklearns_calibration_curve() -> None:
    given = random_predictions()
    confidence, top = given.probabilities.max(dim=1)
    accuracy, mean_confidence = calibration_curve(top == given.labels, confidence, n_bins=15)
    counts, _ = np.histogram(confidence, bins=15, range=(0, 1))
    figure = FIGURES["reliability"](given, "Title")
    upper, lower = figure.axes
    assert bars(lower) == {i: n for i, n in enumerate(counts) if n}
    assert [text.get_text() for text in lower.texts] == [str(n or "") for n in counts]
    assert list(bars(upper)) == list(bars(lower))
    assert [*bars(upper).values()] == pytest.approx(accuracy)
    marks = upper.lines[0].get_ydata()
    assert marks[~np.isnan(marks)] == pytest.approx(mean_confidence)
    assert f"calibration error {summarize(given)['ece']:.4f} in 15 bins" in figure.get_suptitle()


def test_reliability_diagram_of_certain_predictions_fills_the_last_bin() -> None:
    figure = FIGURES["reliability"](certain([0, 1, 1, 1], [0, 1, 0, 1], ["a", "b"]), "Title")
    assert [bars(axes) for axes in figure.axes] == [{14: 0.75}, {14: 4}]


def test_image_grid_draws_each_image_above_its_caption() -> None:
    images, captions = random_images(11), [f"image {i}\n$" for i in range(11)]
    figure = image_grid(images, captions, "Title")
    assert [text.get_text() for text in figure.axes[0].texts] == captions
    for tile, image in zip(drawn_tiles(figure), images, strict=True):
        assert np.array_equal(tile, image.permute(1, 2, 0))


def test_confusion_matrix_shows_percent_of_each_true_class() -> None:
    given = certain([0, 0, 0, 1] + [1] * 10, [0, 0, 0, 0] + [1] * 10, ["ant", "bee"])
    axes = FIGURES["confusion_matrix"](given, "Title").axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "75", (1, 0): "25", (0, 1): "0", (1, 1): "100"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee"]
    assert axes.get_ylabel() == "True label"


@pytest.mark.parametrize("classes", [2, 100, 201])
def test_pictures_are_png_files_with_any_number_of_classes(classes: int) -> None:
    names = [f"${i}_$".ljust(60, "x") for i in range(classes)]  # long, and no formulas
    given = random_predictions(1000, names)
    figures = {name: draw(given, "Title") for name, draw in FIGURES.items()}
    for figure in figures.values():
        image = Image.open(BytesIO(to_png(figure)))
        assert image.format == "PNG"
        assert all(300 < side < 1500 for side in image.size)
        assert figure.axes[0].get_position().width > 0.3  # names leave room for the figure
    assert not plt.get_fignums()  # nothing is left in the state of pyplot
    matrix = figures["confusion_matrix"].axes[0]
    assert len(matrix.texts) == (classes**2 if classes <= 20 else 0)
    assert len(matrix.get_yticklabels()) == (classes if classes <= 200 else 0)
    captions = [text.get_text() for text in figures["mistakes"].axes[0].texts]
    assert captions
    assert all(len(line) <= 20 for caption in captions for line in caption.split("\n"))


def test_curves_figure_draws_the_curves_that_are_there() -> None:
    loss = [(1, 2.0), (2, 1.5)]
    figure = curves_figure({"train/loss": loss, "val/loss": loss[1:], "val/acc": [(2, 0.5)]})
    lines: list[Any] = [line for axes in figure.axes for line in axes.lines]
    assert [line.get_label() for line in lines] == ["training", "validation", "validation"]
    assert lines[0].get_xydata().tolist() == [[1, 2], [2, 1.5]]
    assert [axes.get_ylabel() for axes in figure.axes] == ["cross-entropy", "accuracy"]
    assert Image.open(BytesIO(to_png(figure))).width == 900
    to_png(curves_figure({}))


# Files


def test_report_has_all_files_with_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, metadata = random_predictions(), {"checkpoint": "best.ckpt", "acc_mirrored": 0.5}
    probabilities, labels = given.probabilities, given.labels
    names = write_report(tmp_path, "test", given, metadata)
    expected = {*(f"{name}.png" for name in FIGURES), "predictions.csv", "test.json"}
    assert {path.name for path in tmp_path.iterdir()} == set(names) == expected
    out = capsys.readouterr().out
    assert "test/acc_mirrored 0.5000" in out
    assert f"test/acc {summarize(given)['acc']:.4f}, " in out
    content = json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))
    assert content == {**metadata, **summarize(given)}
    assert "[döner]" in (tmp_path / "test.json").read_text(encoding="utf-8")
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(500))
    assert [row["true"] for row in rows] == [NAMES[label] for label in labels]
    assert sum(row["true"] == row["predicted"] for row in rows) / 500 == content["acc"]
    assert rows[7]["probability"] == f"{probabilities[7].max():.4f}"
