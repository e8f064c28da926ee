"""The benchmarks measure what they say, and go on where they were interrupted."""

import copy
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import accuracy
import batch_statistics
import numpy as np
import pytest
import sides
import speed
import time_to_accuracy
import torch
import yaml
from conftest import SMALL_DIGITS, Run, save_checkpoint
from scipy import stats
from sklearn.metrics import accuracy_score
from torch import Tensor
from torch.optim import Adam
from torchvision.datasets import CIFAR10

from cifar_datamodule import CIFARDataModule
from cifar_resnet.datasets import DATASETS
from cifar_resnet.images import evaluation_view
from resnet_module import ResNetModule

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


def write_checkpoint(path: Path, dataset: str = "digits") -> None:
    """Writes what a run of the digits would."""
    module = ResNetModule(layers=(1, 1, 1), width=4)
    save_checkpoint(path, module, "0123456789", dataset=dataset)


class FakeTraining:
    """Takes the place of `accuracy.train_py`: writes what train.py would, and notes the calls."""

    def __init__(self, folder: Path, val_size: int = 5) -> None:
        self.run = folder / "lightning_logs" / "version_0"
        self.val_size = val_size
        self.calls: list[str] = []

    def write_run(self) -> None:
        checkpoints = self.run / "checkpoints"
        write_checkpoint(checkpoints / "last.ckpt")
        config = {"data": {"val_size": self.val_size}}
        (self.run / "config.yaml").write_text(yaml.safe_dump(config))
        os.utime(checkpoints / "last.ckpt", (1000, 1000))
        date = "1970-01-01T00:15:00+00:00"  # 900 s
        start = {"date": date, "commit": None, "device": "cpu", "precision": "32-true"}
        figures = {"threads": 1, "versions": {}, "data": {"dataset": "digits"}}
        (self.run / "run.json").write_text(json.dumps([start | figures]))

    def __call__(self, verb: str, *arguments: str) -> None:
        self.calls.append(" ".join([verb, *arguments[:2]]))
        if verb == "fit":
            self.write_run()
        else:
            report = {"acc": 0.5 if verb == "test" else 0.25, "acc_mirrored": 0.75}
            (self.run / "checkpoints" / f"{verb}.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("begun", "expected"), [(False, "fit --config recipe.yaml"), (True, "fit --ckpt last")]
)
def test_run_is_started_or_resumed(
    begun: bool,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTraining(tmp_path)
    monkeypatch.setattr(accuracy, "train_py", fake)
    if begun:
        fake.write_run()
    row = accuracy.measure(Path("recipe.yaml"), 3, ["--a=b"], tmp_path, "data")
    assert fake.calls == [expected, "validate --ckpt best", "test --ckpt best"]
    assert (row["recipe"], row["seed"], row["options"]) == ("recipe", 3, "--a=b")
    assert (row["val"], row["test"], row["test_mirrored"]) == (25.0, 50.0, 75.0)
    assert row["seconds"] == 100


def test_run_without_validation_images_is_only_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTraining(tmp_path, val_size=0)
    monkeypatch.setattr(accuracy, "train_py", fake)
    row = accuracy.measure(Path("recipe.yaml"), 0, [], tmp_path, "data")
    assert [call.split()[0] for call in fake.calls] == ["fit", "test"]
    assert row["val"] is None


def test_duration_of_interrupted_run_is_unknown(tmp_path: Path) -> None:
    fake = FakeTraining(tmp_path)
    fake.write_run()
    starts = json.loads((fake.run / "run.json").read_text())
    (fake.run / "run.json").write_text(json.dumps(starts * 2))
    assert accuracy.describe("recipe", 0, [], fake.run)["seconds"] is None


def test_measured_run_is_skipped(
    row: accuracy.Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, recipe = tmp_path / "results.jsonl", tmp_path / "fast.yaml"
    results.write_text(json.dumps(row | {"options": "--a=b"}) + "\n")
    recipe.touch()
    measured: list[int] = []

    def measure(recipe: Path, seed: int, *_: Any) -> accuracy.Row:
        measured.append(seed)
        return row | {"seed": seed, "options": "--a=b", "test": 93.0}

    monkeypatch.setattr(accuracy, "measure", measure)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = [str(recipe), "--seeds", "0", "1", "--results", str(results), "--", "--a=b"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    accuracy.main()
    assert measured == [1]
    assert [row["seed"] for row in accuracy.read_rows(results)] == [0, 1]
    out = capsys.readouterr().out
    assert f"fast with seed 0 is in {results}: skipped" in out
    assert "| fast --a=b | cifar10 | cpu, 32-true | 2 | 90.00 ± 0.00" in out


@pytest.mark.parametrize(("ended", "code"), [(3, 3), (-15, 143)], ids=["exit code", "signal"])
def test_failed_command_ends_the_measurement(
    ended: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], ended)
    monkeypatch.setattr(subprocess, "run", lambda command: done)
    with pytest.raises(SystemExit) as end:
        accuracy.train_py("fit")
    assert end.value.code == code


@pytest.mark.slow
def test_signal_ends_the_running_command_too(tmp_path: Path) -> None:
    pid_file, recipe = tmp_path / "pid", tmp_path / "recipe.yaml"
    recipe.touch()
    (tmp_path / "train.py").write_text(
        f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    (tmp_path / "start.py").write_text(
        "import accuracy, pathlib\n"
        f"accuracy.PROJECT = pathlib.Path({str(tmp_path)!r})\naccuracy.main()"
    )
    command = [sys.executable, "start.py", str(recipe), "--runs", str(tmp_path)]
    command += ["--results", str(tmp_path / "results.jsonl")]
    paths = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    while not (pid_file.is_file() and pid_file.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


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
    figures = [json.loads(line.removeprefix(sides.FIGURES)) for line in lines]
    assert figures[0] == {}
    assert [turn["images_per_s"] for turn in figures[1:]] == [150.0, 75.0]


def test_compared_actions_run_in_turn_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate(itertools.count(1))  # intervals of 2, 4, 6, ... seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls: list[str] = []
    actions = {"a": (6, lambda: calls.append("a")), "b": (80, lambda: calls.append("b"))}
    rates = speed.measure_rates(actions, rounds=2)
    assert "".join(calls) == "ababab"
    assert rates == {"a": [6 / 6, 6 / 10], "b": [80 / 8, 80 / 12]}


def test_evaluation_and_steps_are_measured_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # whatever is measured takes a second
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(speed, "WARM_UP", 0)
    assert speed.measure_evaluation(2, 20) == {"this project": [20, 20], "the note": [20, 20]}
    grid = {"layers": (1, 9), "width": (4, 9), "batch_size": (8, 9), "image_size": (36, 99)}
    monkeypatch.setattr(speed, "GRID", grid)
    milliseconds = {name: [10.0] for name in ("the defaults", "layers 1", "width 4")}
    milliseconds |= {"batch_size 8": [125.0], "image_size 36": [10.0]}
    assert speed.measure_scaling(rounds=1, values=1) == milliseconds


def test_random_images_replace_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "cifar10", None)  # undone at the end
    images, labels = next(iter(sides.per_image_loader(str(tmp_path), num_workers=0)))
    assert (images.shape, images.dtype) == ((100, 3, 32, 32), torch.float32)
    assert 0 <= images.min() < images.max() <= 1
    assert labels.shape == (100,)
    dataset = DATASETS["cifar10"]
    dataset.prepare(tmp_path, [])
    ours = dataset.load(tmp_path, train=True)
    assert (ours.images.shape, ours.images.dtype) == ((50_000, 3, 32, 32), torch.uint8)
    assert len(ours.class_names) == dataset.num_classes == 10
    (tmp_path / CIFAR10.base_folder).mkdir()
    assert sides.find_source(str(tmp_path)) is CIFAR10


def test_recipe_is_timed_between_turns_of_the_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    speeds = iter([[1000.0, 2000.0], [2000.0, 2000.0]])

    def measure_sides(names: list[str], *_: Any) -> dict[str, Any]:
        calls.extend(names)
        return {"training, images/s": {"A": next(speeds)}}

    def train_py(verb: str, *arguments: str) -> None:
        calls.append(verb)
        folder = arguments[arguments.index("--trainer.default_root_dir") + 1]
        FakeTraining(Path(folder))(verb, *arguments)

    monkeypatch.setattr(time_to_accuracy, "measure_sides", measure_sides)
    monkeypatch.setattr(time_to_accuracy, "train_py", train_py)
    clock = itertools.count(0, 200)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", "recipes/fast.yaml", "--a=b"])
    time_to_accuracy.main()
    assert calls == ["A", "fit", "test", "A"]
    assert capsys.readouterr().out == (
        "fast: 50.00 % in 3.3 min; the note's script takes 33 min for 80 epochs, "
        "10.0 times as long\n"
    )


def test_unknown_side_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--sides", "C,E"])
    with pytest.raises(SystemExit) as end:
        speed.parse_arguments()
    assert end.value.code == 2
    assert "error: sides is 'C,E': there is no E" in capsys.readouterr().err


@pytest.mark.slow
def test_speed_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--quick", "--sides=A,B,C,D"]
    command.append(f"--output={output}")
    done = subprocess.run(
        [*command, f"--data.root={tmp_path}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    for ratio in ("C/A", "C/B", "C/D"):
        assert f"\n| {ratio} |" in done.stdout
        assert len(results["ratio"][ratio]) == 2
    for rows in results.values():
        assert all(value > 0 for values in rows.values() for value in values)


def test_digits_are_measured_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs: list[str] = []

    def train_py(*arguments: str) -> None:
        verbs.append(arguments[0])
        assert run(*arguments).code == 0

    monkeypatch.setattr(accuracy, "train_py", train_py)
    recipe = BENCHMARKS.parent / "recipes" / "digits.yaml"
    measure = partial(accuracy.measure, recipe, 3, [*SMALL_DIGITS, "--trainer.max_epochs=1"])
    row = measure(tmp_path / "runs", "data")
    (tested,) = tmp_path.rglob("test.json")
    report = json.loads(tested.read_text())
    assert row["test"] == pytest.approx(100 * report["acc"], abs=0.005)
    assert row["test_mirrored"] == pytest.approx(100 * report["acc_mirrored"], abs=0.005)
    assert measure(tmp_path / "runs", "data") == row  # the row is lost, but not the run
    assert verbs == ["fit", "validate", "test"] * 2


def run_batch_statistics(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["batch_statistics.py", *arguments])
        batch_statistics.main()


def trained_on_darker_images(images: Tensor, labels: Tensor) -> ResNetModule:
    """A network that knows some digits, but whose running statistics are those of darker ones."""
    torch.manual_seed(0)
    module = ResNetModule(layers=(1, 1, 1), width=4).train()
    optimizer = Adam(module.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        module.losses(module(images[:50]), labels[:50]).mean().backward()
        optimizer.step()
    for _ in range(20):
        module(images[:50] / 4)
    return module


def test_batch_statistics_are_those_of_each_hundred_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And leave the network's own as they are for what is measured afterwards."""
    data = CIFARDataModule(dataset="digits")
    data.setup("test")
    images, labels = data.test_set.images / 255, data.test_set.labels
    module = trained_on_darker_images(images, labels)
    save_checkpoint(tmp_path / "run.ckpt", module, "0123456789", dataset="digits")
    run_batch_statistics(str(tmp_path / "run.ckpt"))
    lines = [line.rsplit(None, 2) for line in capsys.readouterr().out.splitlines()]
    found = {name: float(percent) for name, percent, _ in lines}

    def percent(*logits: Tensor) -> Any:
        return pytest.approx(100 * accuracy_score(labels, torch.cat(logits).argmax(1)), abs=0.3)

    assert found["native batch statistics"] > found["native eval mode"] + 10
    for view in ("native", "zoom", "crop"):
        shown = evaluation_view(images, view)
        assert found[f"{view:6} eval mode"] == percent(module.eval()(shown))
        trained = copy.deepcopy(module).train()
        parts = [trained(shown[first : first + 100]) for first in range(0, len(shown), 100)]
        assert found[f"{view:6} batch statistics"] == percent(*parts)


@pytest.mark.parametrize("name", ["nowhere.ckpt", "last", "broken.ckpt"])
def test_wrong_checkpoint_is_one_line(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as end:
        run_batch_statistics(name)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "run.ckpt", dataset=str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as end:
        run_batch_statistics(str(tmp_path / "run.ckpt"))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: dataset is ")
