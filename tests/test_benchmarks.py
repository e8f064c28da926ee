"""The benchmarks measure what they say, and go on where they were interrupted."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import pytest
import sides
import speed
from conftest import SMALL_DIGITS, Run
from scipy import stats

BENCHMARKS = Path(speed.__file__).parent


@pytest.fixture
def row() -> accuracy.Row:
    return {
        "recipe": "fast", "seed": 0, "options": "", "dataset": "cifar10", "device": "cpu",
        "precision": "32-true", "seconds": 60, "val": 90.0, "test": 91.0, "test_mirrored": 91.5,
    }  # fmt: skip


def test_table_gives_mean_std_and_interval_as_scipy(row: accuracy.Row) -> None:
    values = [91.0, 92.0, 94.0]
    rows = [row | {"test": value, "seconds": None} for value in values]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    (line,) = accuracy.summarize(rows)
    assert line[3] == "3"
    assert line[5] == f"92.33 ± {np.std(values, ddof=1):.2f} ({low:.2f} to {high:.2f})"
    assert line[6] == "91.50 ± 0.00 (91.50 to 91.50)"
    assert line[7] == "–"


def test_other_options_data_and_devices_have_their_own_lines(row: accuracy.Row) -> None:
    others = {"options": "--model.width 8", "dataset": "cifar100", "device": "gpu"}
    others["precision"] = "bf16-mixed"
    rows = [row, *(row | {name: value} for name, value in others.items())]
    assert [line[3] for line in accuracy.summarize(rows)] == ["1"] * 5


def test_rows_of_earlier_versions_are_read() -> None:
    rows = accuracy.read_rows(accuracy.RESULTS)
    assert sum(int(line[3]) for line in accuracy.summarize(rows)) == len(rows) > 0


@pytest.mark.parametrize("val_size", [200, 0])
def test_digits_are_trained_and_tested_once(
    val_size: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def train_py(*arguments: str) -> None:
        calls.append(" ".join(arguments[:2]))
        assert run(*arguments).code == 0

    monkeypatch.setattr(accuracy, "train_py", train_py)
    recipe = BENCHMARKS.parent / "recipes" / "digits.yaml"
    options = [*SMALL_DIGITS, "--trainer.max_epochs=1", f"--data.val_size={val_size}"]
    row = accuracy.measure(recipe, 3, options, tmp_path / "runs", "data")
    (tested,) = tmp_path.rglob("test.json")
    report = json.loads(tested.read_text())
    assert row["test"] == pytest.approx(100 * report["acc"], abs=0.005)
    assert row["test_mirrored"] == pytest.approx(100 * report["acc_mirrored"], abs=0.005)
    assert (row["recipe"], row["seed"], row["options"]) == ("digits", 3, " ".join(options))
    assert (row["val"] is None) == (val_size == 0)
    # The row is lost, but not the run.
    assert accuracy.measure(recipe, 3, options, tmp_path / "runs", "data") == row
    tests = ["validate --ckpt", "test --ckpt"][val_size == 0 :]
    assert calls == ["fit --config", *tests, "fit --ckpt", *tests]


@pytest.mark.parametrize(("starts", "seconds"), [(1, 100), (2, None)])
def test_time_is_that_of_an_uninterrupted_run(
    starts: int, seconds: int | None, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    os.utime(tmp_path / "checkpoints" / "last.ckpt", (1000, 1000))
    start = {"date": "1970-01-01T00:15:00+00:00", "commit": None, "device": "cpu"}  # 900 s
    start |= {"precision": "32-true", "threads": 1, "versions": {}, "data": {"dataset": "digits"}}
    (tmp_path / "run.json").write_text(json.dumps([start] * starts))
    assert accuracy.describe("recipe", 0, [], tmp_path)["seconds"] == seconds


def test_measured_run_is_skipped(
    row: accuracy.Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row | {"options": "--a=b"}) + "\n")
    happened: list[Any] = []

    def measure(recipe: Path, seed: int, *_: Any) -> accuracy.Row:
        happened.append(seed)
        return row | {"seed": seed, "options": "--a=b", "test": 93.0}

    def measure_sides(names: list[str], *_: Any, **__: Any) -> speed.Values:
        happened.extend(names)
        return {"A": [1.0, 250.0, 1000.0]}

    monkeypatch.setattr(accuracy, "measure", measure)
    monkeypatch.setattr(speed, "measure_sides", measure_sides)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = ["fast.yaml", "--seeds", "0", "1", "--results", str(results), "--beside_original"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments, "--", "--a=b"])
    accuracy.main()
    assert happened == ["A", 1, "A"]
    assert [row["seed"] for row in accuracy.read_rows(results)] == [0, 1]
    out = capsys.readouterr().out
    assert "| fast --a=b | cifar10 | cpu, 32-true | 2 | 90.00 ± 0.00" in out
    assert "267 and 267 minutes" in out  # 80 times 50,000 images at 250 a second


def test_turns_are_timed_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    clock = iter([0.0, 2.0, 10.0, 14.0])  # begin and end of two turns
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    turns = sides.take_turns(3)
    for _ in range(2 * 3):
        next(turns)
    with pytest.raises(SystemExit):
        next(turns)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [sides.SPEED + value for value in ("0", "150.0", "75.0")]


def test_sides_take_turns_after_a_warm_up(tmp_path: Path) -> None:
    """And ratios are those within a round."""
    script, turns = tmp_path / "side.py", tmp_path / "turns"
    script.write_text(
        "import sys\n"
        f"for speed in [0, *sys.argv[2:]]:\n    print('{sides.SPEED}', speed, flush=True)\n"
        "    sys.stdin.readline()\n"
        f"    open({str(turns)!r}, 'a').write(sys.argv[1])\n"
    )
    start = [sys.executable, str(script)]
    commands = {"C": [*start, "C", "7", "20", "60"], "D": [*start, "D", "9", "10", "40"]}
    speeds = speed.take_turns(commands, rounds=2)
    assert turns.read_text() == "CDCDCD"
    assert speeds == {"C": [20, 60], "D": [10, 40]}
    assert speed.divide(speeds) == {"C/D": [2, 1.5]}


@pytest.mark.slow
def test_speed_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--quick", f"--data.root={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("A", "B", "C", "D", "C/A", "C/B", "C/D"):
        (row,) = re.findall(rf"^\| {name} \| ([\d.,]+) \(", done.stdout, re.MULTILINE)
        assert float(row.replace(",", "")) > 0
