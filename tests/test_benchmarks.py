"""The benchmark counts what it says it counts."""

import json
import subprocess
import sys
from pathlib import Path

import accuracy
import numpy as np
import pytest
import sides
import speed
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(speed.__file__).parent


def test_operations_of_a_training_step() -> None:
    """Against the formula: each convolution's products, once forward and twice backward."""
    # Stem; six convolutions of stage 1; in stages 2 and 3 two that widen and five that do not.
    stem = 32 * 32 * 9 * 3 * 16
    widening = 2 * 9 * (16 * 16 * 16 * 32 + 8 * 8 * 32 * 64)
    others = 9 * (6 * 32 * 32 * 16 * 16 + 5 * 16 * 16 * 32 * 32 + 5 * 8 * 8 * 64 * 64)
    products = 3 * (stem + widening + others + 64 * 10) - stem  # images need no gradient
    step = speed.training_step(batch_size=2)
    with FlopCounterMode(display=False) as counted:
        step()
    assert counted.get_total_flops() == 2 * 2 * products


def test_bytes_are_those_read_and_written() -> None:
    a, b = torch.ones(10, 10), torch.ones(10, 10, dtype=torch.float64)
    with speed.ByteCounter() as counted:
        a + a.t()
        b.add_(1)
    assert counted.bytes == 3 * 400 + 2 * 800


def test_a_turn_stands_for_an_epoch_without_its_validation() -> None:
    turns = sides.Turns(images=18_000)
    turns.marks = [11.0, 15.0, 16.0, 36.0]
    # 45,000 images would take 10 s in place of 4, and the 20 s after them.
    assert turns.figures() == {"images_per_s": 1500.0, "validation_s": 1.0}
    turns.marks = [0.0, 12.0]
    assert turns.figures() == {"images_per_s": 1500.0, "validation_s": 0.0}


def test_noise_is_shaped_like_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What sides.py changes of the project in its own process is undone in this one.
    monkeypatch.setattr(sides.cifar_datamodule, "CIFAR", {})
    monkeypatch.setattr(sides.cifar_datamodule, "provide", sides.cifar_datamodule.provide)
    images, labels = next(iter(sides.per_image_loader(str(tmp_path), num_workers=0)))
    assert images.shape == (100, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert labels.shape == (100,)


@pytest.mark.slow
def test_speed_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--quick", f"--output={output}"]
    done = subprocess.run(
        [*command, f"--data.root={tmp_path}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["sides"]["C"]["images_per_s"]["median"] > 0
    assert 0 < results["sides"]["validation_share"]["median"] < 1
    for row in ("| C |", "| C/A |", "| evaluation |", "| operations |", "| image_size | 64 |"):
        assert row in done.stdout


@pytest.fixture
def row() -> accuracy.Row:
    return {
        "recipe": "fast", "seed": 0, "options": "", "dataset": "cifar10", "device": "cpu",
        "precision": "32-true", "seconds": 60, "val": 90.0, "test": 91.0, "test_mirrored": 91.5,
    }  # fmt: skip


def test_table_gives_mean_deviation_and_interval(row: accuracy.Row) -> None:
    """Against scipy's interval of a mean."""
    values = [91.0, 92.0, 94.0]
    rows = [row | {"test": value, "seconds": None} for value in values]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    (line,) = accuracy.summary(rows)
    assert line[3] == "3"
    assert line[5] == f"92.33 ± {np.std(values, ddof=1):.2f} ({low:.2f} to {high:.2f})"
    assert line[6] == "91.50 ± 0.00 (91.50 to 91.50)"
    assert line[7] == "–"


def test_runs_of_other_options_and_data_have_lines_of_their_own(row: accuracy.Row) -> None:
    others = {"options": "--model.width 8", "dataset": "cifar100", "device": "gpu"}
    others["precision"] = "bf16-mixed"
    rows = [row, *(row | {name: value} for name, value in others.items())]
    assert [line[3] for line in accuracy.summary(rows)] == ["1"] * 5


@pytest.mark.slow
def test_accuracy_is_measured_once(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    recipe = str(BENCHMARKS.parent / "recipes" / "digits.yaml")
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), recipe, "--seeds", "3"]
    command += ["--runs", str(tmp_path), "--results", str(results), "--", "--trainer.max_epochs=1"]
    command.append("--model.width=4")
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    written = results.read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert [row["seed"] for row in rows] == [3]
    for name in ("val", "test", "test_mirrored"):
        assert all(0 < row[name] <= 100 for row in rows)
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert results.read_text() == written
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert "Checkpoint:" not in again
    results.unlink()  # the run's row is lost, and the run is not
    subprocess.run(command, capture_output=True, check=True)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert found == rows
