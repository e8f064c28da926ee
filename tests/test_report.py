"""The report of `test` and `validate`: its metrics, figures and files, against references."""

import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cifar_resnet.datasets import LabelledImages
from cifar_resnet.figures import (
    confusion_figure,
    curves_figure,
    image_grid,
    mistakes_figure,
    to_png,
)
from cifar_resnet.files import to_csv
from cifar_resnet.report import (
    PredictionCollector,
    Predictions,
    prediction_rows,
    print_report,
    summarize,
    write_report,
)

NAMES = ["$ant$", "b_e^2", 'cow, "C"', "[döner]"]


def random_predictions(count: int = 500, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Better than chance, unevenly spread over the classes."""
    rng = np.random.default_rng(0)
    shares = np.arange(1, classes + 1)
    labels = torch.from_numpy(rng.choice(classes, count, p=shares / shares.sum()))
    logits = torch.from_numpy(rng.normal(size=(count, classes))).float()
    logits[torch.arange(count), labels] += 1
    return logits.softmax(dim=1), labels


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


# Metrics


def test_accuracy_and_its_interval_match_wilsons_formula() -> None:
    probabilities, labels = random_predictions()
    summary = summarize(probabilities, labels, NAMES)
    n, z = len(labels), 1.959964
    p = int((probabilities.argmax(dim=1) == labels).sum()) / n
    assert summary["images"] == n
    assert summary["acc"] == p
    # Wilson 1927: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert summary["acc_interval_95"] == pytest.approx(expected, abs=1e-6)


def test_loss_and_calibration_error_match_a_plain_computation() -> None:
    probabilities, labels = random_predictions()
    summary = summarize(probabilities, labels, NAMES)
    of_true_class = [float(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    assert summary["loss"] == pytest.approx(-np.log(of_true_class).mean(), rel=1e-5)

    confidence, predicted = (part.numpy() for part in probabilities.max(dim=1))
    correct, bins = predicted == labels.numpy(), np.ceil(confidence * 15)
    gaps = [
        (bins == b).mean() * abs(correct[bins == b].mean() - confidence[bins == b].mean())
        for b in np.unique(bins)
    ]
    assert summary["ece"] == pytest.approx(sum(gaps), abs=1e-5)


def test_class_scores_match_sklearn() -> None:
    probabilities, labels = random_predictions()
    rows = summarize(probabilities, labels, NAMES)["classes"]
    assert list(rows) == NAMES
    expected = precision_recall_fscore_support(labels, probabilities.argmax(dim=1))
    for score, values in zip(("precision", "recall", "f1-score", "support"), expected, strict=True):
        assert [row[score] for row in rows.values()] == pytest.approx(values.tolist())


def test_most_confused_pairs_count_both_directions() -> None:
    probabilities, labels = random_predictions()
    confused = summarize(probabilities, labels, NAMES)["confused"]
    counts = confusion_matrix(labels, probabilities.argmax(dim=1))
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    pairs.sort(key=lambda pair: counts[pair] + counts[pair[::-1]], reverse=True)
    totals = [counts[pair] + counts[pair[::-1]] for pair in pairs]
    assert len(set(totals[:4])) == 4  # no ties: the order is defined
    assert confused == [
        {
            "classes": [NAMES[i], NAMES[j]],
            "first_predicted_as_second": counts[i, j],
            "second_predicted_as_first": counts[j, i],
        }
        for i, j in pairs[:3]
    ]


def test_class_without_images_scores_zero() -> None:
    labels = torch.tensor([0, 1, 1])
    summary = summarize(torch.eye(3)[labels], labels, ["a", "b", "c"])
    assert summary["classes"]["c"] == {"precision": 0, "recall": 0, "f1-score": 0, "support": 0}
    assert summary["acc_interval_95"][1] == 1
    assert summary["confused"] == []


def test_class_may_have_the_name_of_a_row_of_sklearn() -> None:
    labels = torch.tensor([0, 1, 1])
    names = ["accuracy", "macro avg"]
    rows = summarize(torch.eye(2)[labels], labels, names)["classes"]
    assert [rows[name]["support"] for name in names] == [1, 2]


def test_print_report_shows_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarize(*random_predictions(), NAMES)
    print_report("val", summary)
    lines = capsys.readouterr().out.splitlines()
    low, high = summary["acc_interval_95"]
    assert lines[0] == (
        f"val/acc {summary['acc']:.4f}, 95 % interval {low:.4f} to {high:.4f}, 500 images"
    )
    assert lines[1] == f"val/loss {summary['loss']:.4f}, calibration error {summary['ece']:.4f}"
    assert lines[2].split() == ["class", "precision", "recall", "F1", "images"]
    for line, (name, row) in zip(lines[3:7], summary["classes"].items(), strict=True):
        scores = [f"{row[score]:.4f}" for score in ("precision", "recall", "f1-score")]
        assert line.startswith(name)
        assert line.removeprefix(name).split() == [*scores, f"{row['support']:.0f}"]
    assert len({len(line) for line in lines[2:7]}) == 1  # aligned
    pair = summary["confused"][0]
    assert lines[7].startswith(f"Most confused: {pair['classes'][0]} and {pair['classes'][1]} (")

    print_report("test", {**summary, "acc_mirrored": 0.87914})
    assert capsys.readouterr().out.splitlines()[1] == (
        "test/acc_mirrored 0.8791: each image and its mirror image, probabilities averaged"
    )


# Collecting predictions


def test_predictions_of_two_processes_come_in_the_order_of_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, labels = torch.rand(7, 3), torch.arange(7)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    ranks = [Predictions(), Predictions()]
    for rank, metric in enumerate(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        for images in (slice(rank, 4, 2), slice(4 + rank, None, 2)):
            metric.update(given[images], labels[images])
    monkeypatch.undo()

    gathered = iter(
        [torch.cat(getattr(metric, name)) for metric in ranks]
        for name in ("probabilities", "labels", "positions")
    )
    ranks[0].distributed_available_fn = lambda: True
    ranks[0].dist_sync_fn = lambda *_, **__: next(gathered)  # instead of all_gather
    probabilities, collected = ranks[0].compute()
    assert torch.equal(collected, labels)
    assert torch.equal(probabilities, given)


class LinearModule(LightningModule):
    """Returns what `ResNetModule` returns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 4 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch[0]).float().softmax(dim=1)

    validation_step = test_step = predict_step


def collect(
    verb: str, mirror: bool, precision: Any = "32-true"
) -> tuple[PredictionCollector, LinearModule, Tensor, Tensor]:
    torch.manual_seed(0)
    module, images, labels = LinearModule(), torch.randn(10, 3, 4, 4), torch.arange(10) % 3
    collector = PredictionCollector(mirror)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[collector],
        logger=False,
        precision=precision,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    for _ in range(2):  # the result is that of the last loop alone
        loader = DataLoader(TensorDataset(images, labels), batch_size=4)
        getattr(trainer, verb)(module, loader)
    return collector, module, images, labels


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_collector_collects_the_last_loop(verb: str) -> None:
    collector, module, images, labels = collect(verb, mirror=False)
    with torch.inference_mode():
        expected = module(images).softmax(dim=1)
    torch.testing.assert_close(collector.result[0], expected)
    assert torch.equal(collector.result[1], labels)
    assert collector.mirrored is None


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_mirrored_probabilities_are_means_of_both_images(verb: str) -> None:
    collector, module, images, labels = collect(verb, mirror=True)
    assert collector.mirrored is not None
    with torch.inference_mode():
        own = module(images).softmax(dim=1)
        other = module(images.flip(-1)).softmax(dim=1)
    torch.testing.assert_close(collector.result[0], own)
    torch.testing.assert_close(collector.mirrored[0], (own + other) / 2)
    assert torch.equal(collector.mirrored[1], labels)


def test_mirror_image_is_predicted_in_the_precision_of_the_trainer() -> None:
    collector, module, images, _ = collect("test", mirror=True, precision="bf16-mixed")
    assert collector.mirrored is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        own = module(images).float().softmax(dim=1)
        other = module(images.flip(-1)).float().softmax(dim=1)
    torch.testing.assert_close(collector.mirrored[0], (own + other) / 2)


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
    figure = mistakes_figure(images, probabilities, labels, ["ant", "bee"], "Title")
    captions = [text.get_text() for text in figure.axes[0].texts]
    assert captions == ["ant\n→ bee 80%", "ant\n→ bee 70%", "bee\n→ ant 60%"]
    for tile, position in zip(drawn_tiles(figure), [1, 3, 2], strict=True):
        assert np.array_equal(tile, images[position].permute(1, 2, 0))


def test_mistakes_figure_draws_24_at_most_and_says_if_there_are_none() -> None:
    probabilities, labels = torch.eye(2)[torch.zeros(30, dtype=torch.long)], torch.ones(30).long()
    figure = mistakes_figure(random_images(30), probabilities, labels, ["ant", "bee"], "Title")
    assert len(figure.axes[0].texts) == 24
    figure = mistakes_figure(random_images(30), probabilities, 1 - labels, ["ant", "bee"], "Title")
    assert not figure.axes[0].texts
    assert figure.axes[0].get_title() == "Title: none"
    assert Image.open(BytesIO(to_png(figure))).width > 300


@pytest.mark.parametrize("count", [1, 8, 11])
def test_image_grid_draws_each_image_above_its_caption(count: int) -> None:
    images, captions = random_images(count), [f"image {i}\n$" for i in range(count)]
    figure = image_grid(images, captions, "Title")
    assert [text.get_text() for text in figure.axes[0].texts] == captions
    for tile, image in zip(drawn_tiles(figure), images, strict=True):
        assert np.array_equal(tile, image.permute(1, 2, 0))


def test_confusion_figure_shows_percent_of_each_true_class() -> None:
    axes = confusion_figure(torch.tensor([[3, 1], [0, 10]]), ["ant", "bee"], "Title").axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "75", (1, 0): "25", (0, 1): "0", (1, 1): "100"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee"]
    assert axes.get_ylabel() == "True label"


@pytest.mark.parametrize("classes", [2, 10, 100, 201])
def test_figures_are_png_files_with_any_number_of_classes(classes: int) -> None:
    names = [f"${i}_$".ljust(60, "x") for i in range(classes)]  # long, and no formulas
    probabilities, labels = random_predictions(1000, classes)
    predicted = probabilities.argmax(dim=1)
    counts = torch.from_numpy(confusion_matrix(labels, predicted, labels=range(classes)))
    matrix = confusion_figure(counts, names, "Title")
    assert len(matrix.axes[0].texts) == (classes**2 if classes <= 20 else 0)
    assert len(matrix.axes[0].get_yticklabels()) == (classes if classes <= 200 else 0)
    mistakes = mistakes_figure(random_images(1000), probabilities, labels, names, "Title")
    for figure in (matrix, mistakes):
        image = Image.open(BytesIO(to_png(figure)))
        assert image.format == "PNG"
        assert all(300 < side < 1500 for side in image.size)
        assert figure.axes[0].get_position().width > 0.3  # names leave room for the figure
    assert not plt.get_fignums()  # nothing is left in the state of pyplot
    captions = [text.get_text() for text in mistakes.axes[0].texts]
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


def test_write_report_writes_all_files_of_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probabilities, labels = random_predictions()
    data = LabelledImages(random_images(500), labels, NAMES)
    metadata = {"checkpoint": "best.ckpt", "acc_mirrored": 0.5}
    test_files = write_report(tmp_path, "test", data, probabilities, metadata)
    expected = {"confusion_matrix.png", "mistakes.png", "predictions.csv", "test.json"}
    assert {path.name for path in tmp_path.iterdir()} == set(test_files) == expected
    assert "test/acc_mirrored 0.5000" in capsys.readouterr().out

    content = json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))
    assert content == {**metadata, **summarize(probabilities, labels, NAMES)}
    assert "[döner]" in (tmp_path / "test.json").read_text(encoding="utf-8")
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(500))
    assert [row["true"] for row in rows] == [NAMES[label] for label in labels]
    assert sum(row["true"] == row["predicted"] for row in rows) / 500 == content["acc"]
    assert rows[7]["probability"] == f"{probabilities[7].max():.4f}"

    names = write_report(tmp_path, "val", data, probabilities, {})
    assert "acc_mirrored" not in json.loads((tmp_path / "validate.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {*names, *test_files}
    assert all("validate" in name for name in names)
    assert "mirrored" not in capsys.readouterr().out


def test_csv_quotes_names_with_commas() -> None:
    rows = prediction_rows(torch.tensor([[0.25, 0.75]]), torch.tensor([0]), ["a, b", 'c "d"'])
    text = to_csv(rows)
    assert text == 'index,true,predicted,probability\n0,"a, b","c ""d""",0.7500\n'
