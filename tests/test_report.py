"""The report of `test` and `validate`: its numbers, pictures and files."""

import csv
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DigitsRun, Run
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import report
from cifar_datamodule import CIFARDataModule
from resnet_module import ResNetModule

NAMES = ["ant", "bee", "cow", "[dog]"]


def predictions(count: int = 500, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random, better than chance, unevenly spread over the classes."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice(classes, count, p=np.arange(1, classes + 1) / 10))
    logits = torch.from_numpy(rng.normal(size=(count, classes))).float()
    logits[torch.arange(count), labels] += 1
    return logits.softmax(dim=1), labels


def test_numbers_are_those_of_references() -> None:
    probabilities, labels = predictions()
    numbers = report.summary(probabilities, labels, NAMES)
    predicted = probabilities.argmax(dim=1)
    right, n, z = int((predicted == labels).sum()), len(labels), 1.959964
    assert numbers["images"] == n
    assert numbers["acc"] == right / n

    # Wilson 1927: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    p = right / n
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert numbers["acc_interval_95"] == pytest.approx(expected, abs=1e-6)

    expected = precision_recall_fscore_support(labels, predicted)
    for name, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [row[name] for row in numbers["classes"]] == pytest.approx(values.tolist())
    assert [row["class"] for row in numbers["classes"]] == NAMES

    confidence, hit = probabilities.max(dim=1).values.numpy(), (predicted == labels).numpy()
    bins = np.ceil(confidence * 15)
    ece = sum(
        (bins == b).mean() * abs(hit[bins == b].mean() - confidence[bins == b].mean())
        for b in np.unique(bins)
    )
    assert numbers["ece"] == pytest.approx(ece, abs=1e-5)

    counts = confusion_matrix(labels, predicted)
    assert report.confusions(probabilities, labels).tolist() == counts.tolist()
    pairs = {(i, j): counts[i, j] + counts[j, i] for i in range(4) for j in range(i + 1, 4)}
    worst = sorted(pairs, key=lambda pair: pairs[pair], reverse=True)[:3]
    assert {tuple(pair["classes"]) for pair in numbers["confused"]} == {
        (NAMES[i], NAMES[j]) for i, j in worst
    }
    first, (i, j) = numbers["confused"][0], worst[0]
    assert first["first_taken_for_second"] == counts[i, j]
    assert first["second_taken_for_first"] == counts[j, i]


def test_a_class_without_images_and_a_perfect_network() -> None:
    labels = torch.tensor([0, 1, 1])
    numbers = report.summary(torch.eye(3)[labels], labels, ["a", "b", "c"])
    assert numbers["classes"][2] == {
        "class": "c",
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "images": 0,
    }
    assert numbers["confused"] == []
    assert numbers["acc_interval_95"][1] == 1
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    figure = report.mistakes_figure(images, torch.eye(3)[labels], labels, ["a", "b", "c"], "None")
    assert "there are none" in figure.axes[0].get_title()


def test_predictions_of_several_processes_come_in_the_order_of_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, labels = torch.randn(7, 3), torch.arange(7) % 3
    whole = report.Predictions()
    whole.update(logits[:4], labels[:4])
    whole.update(logits[4:], labels[4:])
    torch.testing.assert_close(whole.compute()[0], logits.softmax(dim=1))
    assert torch.equal(whole.compute()[1], labels)

    parts = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        part = report.Predictions()
        for images in (slice(rank, 4, 2), slice(4 + rank, None, 2)):
            part.update(logits[images], labels[images])
        parts.append(part)
    monkeypatch.undo()
    gathered = report.Predictions()
    for name in ("probabilities", "labels", "positions"):  # as torchmetrics gathers states
        setattr(gathered, name, [torch.cat(getattr(part, name)) for part in parts])
    gathered._update_count = 1
    torch.testing.assert_close(gathered.compute()[0], logits.softmax(dim=1))
    assert torch.equal(gathered.compute()[1], labels)


def test_mistakes_are_shown_the_most_confident_first() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]])
    labels = torch.tensor([0, 0, 1, 0, 1])
    assert report.confident_mistakes(probabilities, labels).tolist() == [1, 3, 2]
    assert report.confident_mistakes(probabilities, labels, most=1).tolist() == [1]

    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    axes = report.mistakes_figure(images, probabilities, labels, ["ant", "bee"], "Title").axes[0]
    captions = [text.get_text() for text in axes.texts]
    assert captions == ["ant\n→ bee 80%", "ant\n→ bee 70%", "bee\n→ ant 60%"]
    drawn = np.asarray(axes.images[0].get_array())
    for text, position in zip(axes.texts, [1, 3, 2], strict=True):  # each above its caption
        middle, bottom = text.get_position()
        tile = drawn[: int(bottom), int(middle) - 16 : int(middle) + 16][-32:]
        assert np.array_equal(tile, images[position].permute(1, 2, 0))


def test_confusion_matrix_shows_the_share_of_each_true_class() -> None:
    counts = torch.tensor([[3, 1], [0, 10]])
    axes = report.confusion_figure(counts, ["ant", "bee"], "Title").axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "75", (1, 0): "25", (0, 1): "0", (1, 1): "100"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee"]
    assert axes.get_ylabel() == "true"
    hundred = report.confusion_figure(torch.eye(100), [f"c{i}" for i in range(100)], "Title")
    assert not hundred.axes[0].texts  # 10,000 numbers nobody could read


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    report.write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        report.write(path, "new \ud800")
    assert path.read_text() == "old"
    report.write(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_test_and_validate_write_their_reports(run: Run, best: Path, digits_run: DigitsRun) -> None:
    outcome = run("test", "--ckpt", str(best))
    assert outcome.code == 0, outcome.err
    content = json.loads(best.with_name("test.json").read_text())
    assert content["checkpoint"]["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert content["data"]["dataset"] == "digits"
    assert content["versions"]["torch"] == version("torch")
    low, high = content["acc_interval_95"]
    line = f"test/acc {content['acc']:.4f}, 95 % interval {low:.4f} to {high:.4f}, 360 images"
    assert line in outcome.out
    assert f"calibration error {content['ece']:.4f}" in outcome.out
    for row in content["classes"]:
        assert f"{row['precision']:.4f}  {row['recall']:.4f}  {row['f1']:.4f}" in outcome.out
    assert "Most confused: " in outcome.out

    with best.with_name("predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(360))
    data = CIFARDataModule(dataset="digits", val_size=200)
    data.setup("test")
    assert [int(row["true"]) for row in rows] == data.test_set.labels.tolist()
    assert sum(row["true"] == row["predicted"] for row in rows) / 360 == content["acc"]
    assert data.checksum == content["data"]["checksum"]
    for picture in ("confusion_matrix.png", "mistakes.png"):
        assert Image.open(best.with_name(picture)).width > 300

    outcome = run("validate", "--ckpt", str(best))
    assert outcome.code == 0, outcome.err
    validated = json.loads(best.with_name("validate.json").read_text())
    assert validated["images"] == 200
    assert f"(val/acc {validated['acc']:.4f})" in digits_run.out  # as training said
    assert validated["data"]["checksum"] != content["data"]["checksum"]
    assert json.loads(best.with_name("test.json").read_text()) == content
    assert best.with_name("validate_predictions.csv").read_text().count("\n") == 201
    assert not list(best.parent.glob("*.tmp"))


@pytest.mark.parametrize(("command", "name"), [("test", "test"), ("validate", "val")])
def test_mirror_images_make_a_figure_of_their_own(
    run: Run, best: Path, command: str, name: str
) -> None:
    plain = run(command, "--ckpt", str(best), "--trainer.precision=32-true")
    assert plain.code == 0, plain.err
    before = json.loads(best.with_name(f"{command}.json").read_text())
    mirrored = run(command, "--ckpt", str(best), "--trainer.precision=32-true", "--mirror")
    assert mirrored.code == 0, mirrored.err
    content = json.loads(best.with_name(f"{command}.json").read_text())

    module = ResNetModule.load_from_checkpoint(best, map_location="cpu").eval()
    data = CIFARDataModule(dataset="digits", val_size=200)
    data.setup(command)
    images, labels = vars(data)[f"{name}_set"].images / 255, vars(data)[f"{name}_set"].labels
    with torch.inference_mode():
        probabilities = module(images).softmax(1) + module(images.flip(-1)).softmax(1)
    share = float((probabilities.argmax(1) == labels).double().mean())
    assert content["acc_mirrored"] == pytest.approx(share)
    assert share != before["acc"]  # or the figures could be mixed up
    times = {"date", "acc_mirrored"}
    assert {k: content[k] for k in content if k not in times} == {
        k: before[k] for k in before if k not in times
    }
    assert "acc_mirrored" not in before
    assert f"{name}/acc_mirrored {share:.4f}" in mirrored.out
    assert "mirrored" not in plain.out
