"""A run's folder: its own, whatever else starts or logs there, and what is recorded in it."""

import json
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL_DIGITS, Run, Start
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar_resnet.callbacks import read_scalars
from cifar_resnet.checkpoint import read_checkpoint
from cifar_resnet.runs import claim_folder, git_commit

LOGS = Path("lightning_logs")
RUN = LOGS / "version_0"


# The folder


def test_each_of_many_starts_claims_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "version_7").mkdir()
    (tmp_path / "mine").mkdir()
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(claim_folder, [tmp_path] * 64))
    assert {folder.name for folder in folders} == {f"version_{n}" for n in range(8, 72)}


@pytest.mark.parametrize(
    "logger",
    [
        ["--trainer.logger=false"],
        [f"--trainer.logger{o}" for o in ("+=CSVLogger", ".save_dir=csv")]
        + [f"--trainer.logger{o}" for o in ("+=TensorBoardLogger", ".save_dir=elsewhere")],
    ],
    ids=["none", "two"],
)
def test_resumed_run_keeps_folder_and_best_with_any_logger(
    logger: list[str], run: Run, small: list[str]
) -> None:
    options = [*small, "--trainer.max_epochs=1", "--best_checkpoint.monitor=lr", *logger]
    assert run("fit", *options).code == 0
    (claimed,) = LOGS.glob("*/run.json")
    best = claimed.parent / "checkpoints" / "best.ckpt"
    content = best.read_bytes()
    # The second epoch has the same rate, which is no better.
    assert run("fit", "--ckpt=last", "--trainer.max_epochs=2").code == 0
    assert list(LOGS.glob("*/run.json")) == [claimed]
    assert len(json.loads(claimed.read_text())) == 2
    assert best.read_bytes() == content
    assert read_checkpoint(best.with_name("last.ckpt"))["epoch"] == 1
    tested = run("test", "--ckpt")
    assert tested.code == 0, tested.err
    assert f"Checkpoint: {best}\n" in tested.out


def test_checkpoints_of_the_user_leave_the_runs_own_alone(run: Run, small: list[str]) -> None:
    """Whatever they are called; each has the name of its optimizer step."""
    own = ["=ModelCheckpoint", ".every_n_train_steps=3", ".save_top_k=-1", ".save_last=true"]
    stop = "--trainer.max_steps=7"  # within the second epoch
    assert run("fit", *small, *(f"--trainer.callbacks{o}" for o in own), stop).code == 0
    assert read_checkpoint(RUN / "checkpoints" / "last.ckpt")["global_step"] == 4
    saved = {file.name for file in (RUN / "more_checkpoints").iterdir()}
    assert saved == {"epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"}


@pytest.mark.parametrize(
    "options",
    [
        ["--data.val_size=999"],  # found when the data are loaded
        [f"--model.lr_scheduler{o}" for o in ("=OneCycleLR", ".max_lr=0.1", ".total_steps=1")],
        ["--trainer.callbacks=LearningRateFinder"],
        ["--trainer.callbacks=BatchSizeFinder"],
        ["--trainer.strategy=ddp_spawn"],
    ],
    ids=["data", "cycle", "rate", "batch size", "spawn"],
)
def test_refused_run_leaves_no_folder(options: list[str], run: Run, small: list[str]) -> None:
    outcome = run("fit", *small, "--trainer.max_epochs=2", *options)
    assert outcome.code == 1
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    assert not list(LOGS.glob("*"))


@pytest.mark.parametrize("limit", ["max_epochs", "limit_train_batches"])
def test_run_without_an_epoch_leaves_no_folder(limit: str, run: Run, small: list[str]) -> None:
    assert run("fit", *small, f"--trainer.{limit}=0").code == 0
    assert not list(LOGS.glob("*"))


class StopInEpoch2(Callback):
    """Ends a run after the second batch of its second epoch; wants a logger, as some do."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        assert trainer.loggers

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.should_stop or (trainer.current_epoch, batch_idx) == (1, 1)


REASON = "The run was ended by a callback that has set trainer.should_stop\n"
STOP = ["--trainer.callbacks=test_runs.StopInEpoch2"]
STOP += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"]


@pytest.mark.parametrize(
    ("end", "lift", "reason"),
    [
        (["--trainer.max_steps=6"], "--trainer.max_steps=-1", ""),
        (STOP, "--trainer.callbacks=null", REASON),
    ],
    ids=["steps", "callback"],
)
def test_run_ended_within_an_epoch_resumes_from_its_last_whole_one(
    end: list[str], lift: str, reason: str, run: Run, small: list[str]
) -> None:
    small = [*small, "--trainer.max_epochs=3"]
    stopped = run("fit", *small, *end)
    assert stopped.code == 0
    assert f"The run ended within epoch 2, which is not saved\n{reason}Best" in stopped.out
    for name in ("best", "last"):
        assert read_checkpoint(RUN / f"checkpoints/{name}.ckpt")["epoch"] == 0
    assert run("fit", "--ckpt=last", lift).code == 0
    assert run("fit", *small).code == 0
    resumed, undisturbed = (LOGS / f"version_{n}" for n in (0, 1))
    assert read_scalars(resumed)["train/loss"] == read_scalars(undisturbed)["train/loss"]
    one, other = (read_checkpoint(r / "checkpoints/last.ckpt") for r in (resumed, undisturbed))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name])


def test_early_stopping_resumes_with_the_patience_given_now(run: Run, small: list[str]) -> None:
    stopping = [f"--trainer.callbacks{o}" for o in ("=EarlyStopping", ".monitor=train/loss")]
    stopping += ["--trainer.callbacks.min_delta=99", "--trainer.callbacks.patience=1"]
    stopped = run("fit", *small, "--trainer.max_epochs=9", *stopping)
    reason = "The run was ended by EarlyStopping: Monitored metric train/loss did not improve"
    assert reason in stopped.out
    assert len(read_scalars(RUN)["train/loss"]) == 2
    resumed = run("fit", "--ckpt=last", "--trainer.callbacks.patience=3")
    assert reason in resumed.out
    assert len(read_scalars(RUN)["train/loss"]) == 4


@pytest.mark.slow
def test_start_and_resume_show_no_warning(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in the terminal nor in TensorBoard, which warns of a second graph."""
    # One of this callback's defaults, a torch.device, cannot be written to config.yaml.
    averaging = ["--trainer.callbacks=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"]
    first = [*SMALL_DIGITS, "--trainer.max_epochs=2", *averaging]
    for args in (first, ["--ckpt", "--trainer.max_epochs=4"]):
        started = start("fit", *args)
        assert started.wait() == 0
        assert not re.search(r"\.py:\d+:|[Ww]arning", started.out), started.out
    EventAccumulator(str(tmp_path / RUN)).Reload()
    assert not caplog.records


def test_time_limit_counts_from_each_start(run: Run, small: list[str]) -> None:
    """Lightning restores the time that has passed, here two hours."""
    assert run("fit", *small, "--trainer.max_epochs=1", "--trainer.max_time=00:01:00:00").code == 0
    last = RUN / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last)
    for stage in checkpoint["callbacks"]["Timer"]["time_elapsed"]:
        checkpoint["callbacks"]["Timer"]["time_elapsed"][stage] = 7200.0
    torch.save(checkpoint, last)
    assert run("fit", "--ckpt=last", "--trainer.max_epochs=2").code == 0
    assert read_checkpoint(last)["epoch"] == 1


def test_run_branches_off_from_an_earlier_checkpoint(run: Run, small: list[str]) -> None:
    options = ["--periodic_checkpoint.every_n_epochs=2", "--trainer.max_epochs=4"]
    assert run("fit", *small, *options).code == 0
    saved = {file.name: file for file in RUN.glob("checkpoints/epoch_*.ckpt")}
    assert {name: read_checkpoint(file)["epoch"] for name, file in saved.items()} == {
        "epoch_1.ckpt": 1,  # epochs count from 0 here
        "epoch_3.ckpt": 3,
    }
    own = RUN / "more_checkpoints" / "last.ckpt"  # where a callback of the user's would save it
    own.parent.mkdir()
    shutil.copy(saved["epoch_1.ckpt"], own)
    before = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    earlier = ["--ckpt", str(saved["epoch_1.ckpt"]), "--trainer.max_epochs=3"]
    assert run("fit", *earlier, "--pictures.every_n_epochs=9").code == 0
    assert read_checkpoint(LOGS / "version_1/checkpoints/last.ckpt")["epoch"] == 2
    assert [epoch for epoch, _ in read_scalars(LOGS / "version_1")["train/loss"]] == [3]
    assert EventAccumulator(str(LOGS / "version_1")).Reload().Tags()["graph"]
    without = ["--trainer.max_epochs=3", "--data.val_size=0"]
    unvalidated = run("fit", "--ckpt", str(own), *without)  # the best of such a run is its last
    assert f"Best checkpoint: {LOGS / 'version_2/checkpoints/last.ckpt'}\n" in unvalidated.out
    assert {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()} == before


def test_finished_run_is_left_as_it_is(run: Run, small: list[str]) -> None:
    assert run("fit", *small, "--trainer.max_epochs=1").code == 0
    before = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    assert run("fit", "--ckpt=last").code == 0
    assert all(file.read_bytes() == content for file, content in before.items())


def test_root_in_a_configuration_is_where_runs_are_looked_for(
    run: Run, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never is the run of another root taken."""
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("c.yaml").write_text("trainer: {default_root_dir: ~/runs, max_epochs: 1}")
    assert run("fit", *small, "--config=c.yaml").code == 0
    shutil.copytree("home/runs/lightning_logs", LOGS)
    best = str(RUN / "checkpoints/best.ckpt")
    for options, found in (
        (["--config=c.yaml", "--trainer.default_root_dir=."], best),
        (["--trainer.default_root_dir=.", "--config=c.yaml"], f"home/runs/{best}"),
    ):
        assert f"Checkpoint: {found}\n" in run("test", *options).out
    resumed = run("fit", "--ckpt=last", "--config=c.yaml", "--trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert read_checkpoint(Path("home/runs", RUN, "checkpoints/last.ckpt"))["epoch"] == 1
    Path("trainer.yaml").write_text("{default_root_dir: ~/runs}")
    outcome = run("test", "--trainer=trainer.yaml")
    assert outcome.code == 1
    assert "/runs', but ckpt was looked" in outcome.err


# Its records


def test_config_repeats_its_run(run: Run, small: list[str]) -> None:
    # One of this callback's defaults, a torch.device, cannot be written.
    averaging = ["--trainer.callbacks=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"]
    small = [*small, "--trainer.max_epochs=2", "--seed_everything=7", *averaging]
    for options in (small, [f"--config={RUN / 'config.yaml'}"]):
        assert run("fit", *options).code == 0
    again = RUN.with_name("version_1")
    first, second = (yaml.safe_load((f / "config.yaml").read_text()) for f in (RUN, again))
    assert first == second
    assert "Unable to serialize" not in str(first)
    assert first["seed_everything"] == 7
    assert read_scalars(RUN)["train/loss"] == read_scalars(again)["train/loss"]
    one, other = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (RUN, again))
    assert one["datamodule_hyper_parameters"]["seed"] == 7
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name])


def test_each_start_of_a_run_is_recorded(run: Run, small: list[str]) -> None:
    small = [*small, "--trainer.accumulate_grad_batches=2"]
    assert run("fit", *small, "--trainer.max_epochs=1").code == 0
    more = ["--trainer.max_epochs=2", "--data.batch_size=50"]
    assert run("fit", "--ckpt", "last", *more).code == 0
    first, second = json.loads((RUN / "run.json").read_text())
    for start, options in ((first, [*small, "--trainer.max_epochs=1"]), (second, more)):
        assert start["command"].startswith("python train.py fit ")
        assert start["command"].endswith(shlex.join(options))
        assert start["seed"] == 0
        assert start["versions"]["torch"] == version("torch")
    assert [start["effective_batch_size"] for start in (first, second)] == [128, 100]
    assert first["data"] == second["data"]
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
@pytest.mark.parametrize(
    ("changed", "dirty"),
    [("train.py", True), ("cifar_resnet/new.py", True), ("benchmarks/results/a.jsonl", False)],
)
def test_commit_is_dirty_if_code_differs(
    changed: str, dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("train.py", "cifar_resnet/runs.py", "benchmarks/results/a.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("committed")
    monkeypatch.setattr("cifar_resnet.runs.__file__", str(tmp_path / "cifar_resnet/runs.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook's, which name another repository
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "All"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert (git_commit() or {})["dirty"] is False
    (tmp_path / changed).write_text("changed")
    assert (git_commit() or {})["dirty"] is dirty
