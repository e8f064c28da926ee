"""Runs that are killed, interrupted or cannot write: they end in the weights of a quiet one."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_DIGITS, Run, Start, Started
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import callbacks
from cifar_datamodule import CIFARDataModule
from interruptions import Interruptions

EPOCHS = 3
QUICK = ["--pictures.every_n_epochs=0", "--trainer.enable_model_summary=false"]
# 25 steps in an epoch; the rate changes with each, and the best epoch need not be the last.
RUN = [
    *SMALL_DIGITS,
    *QUICK,
    "--data.batch_size=50",
    f"--trainer.max_epochs={EPOCHS}",
    "--model.lr_scheduler.step_size=1",
    "--model.optimizer.lr=0.01",
    "--seed_everything=3",
]
TRAINS = "training on the CPU"
WAITS = "waiting for a signal"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """All that TensorBoard shows of a run, but its speed."""
    events = EventAccumulator(str(run)).Reload()
    names = [name for name in events.Tags()["scalars"] if name != "images_per_second"]
    return {name: [(p.step, p.value) for p in events.Scalars(name)] for name in names}


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return a == b


def assert_same_run(run: Path, quiet: Path) -> None:
    """Weights, optimizer and scheduler, the best checkpoint and why, and every curve."""
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (load(folder / "checkpoints" / name) for folder in (run, quiet))
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            assert same(ours[key], theirs[key]), (name, key)
    best, expected = (
        next(s for s in content["callbacks"].values() if s.get("monitor") == "val/acc")
        for content in (ours, theirs)
    )
    assert same(best["best_model_score"], expected["best_model_score"])
    assert curves(run) == curves(quiet)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def wait_for(started: Started, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in started.out:
        assert time.monotonic() < deadline, started.out
        assert started.process.is_alive(), started.out
        time.sleep(0.002)


def wait_for_a_signal(trainer: Trainer, for_ever: bool = False) -> None:
    """Has a run's first process wait, in the middle of a step, until it is asked to stop."""
    run = next(c for c in trainer.callbacks if isinstance(c, Interruptions))  # type: ignore[attr-defined]
    os.write(1, f"{WAITS}\n".encode())
    deadline = time.monotonic() + 60
    while (for_ever or not run.received) and time.monotonic() < deadline:
        time.sleep(0.01)


class WaitInTheMiddle(Callback):
    """Waits in the second of the epochs."""

    def __init__(self, for_ever: bool = False) -> None:
        self.for_ever = for_ever

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1 and args[-1] == 14:
            wait_for_a_signal(trainer, self.for_ever)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, start_anywhere: Start) -> Path:
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    started = start_anywhere("fit", *RUN, folder=folder)
    assert started.wait() == 0, started.out
    return folder / "lightning_logs" / "version_0"


def newest(folder: Path) -> Path | None:
    """The newest run that can go on."""
    found = sorted(folder.glob("lightning_logs/version_*/checkpoints/last.ckpt"))
    return found[-1].parents[1] if found else None


def go_on(start: Start, folder: Path) -> Started:
    return start("fit", "--ckpt", "last") if newest(folder) else start("fit", *RUN)


def kill_at_random(started: Started, chance: random.Random) -> None:
    """Kills a run at a random moment of its training, or while it writes a checkpoint."""
    folder, process = started.output.parent, started.process
    while TRAINS not in started.out and process.is_alive():
        time.sleep(0.001)
    wanted, end = chance.choice(["any", "last", "best"]), time.monotonic() + chance.uniform(0, 1.5)
    while process.is_alive() and time.monotonic() < end:
        halves = folder.glob(f"lightning_logs/*/checkpoints/{wanted}.ckpt.part")
        if wanted != "any" and any(halves):
            break
    process.kill()
    process.join()


def be_killed(start: Start, folder: Path, quiet: Path, times: int) -> None:
    """Kills runs that go on, and compares each that reaches its end with the quiet one."""
    chance, kills, ended = random.Random(times), 0, 0
    while kills < times or not ended:
        started = go_on(start, folder)
        if kills < times:
            kill_at_random(started, chance)
            kills += started.process.exitcode == -signal.SIGKILL
        else:
            started.wait()
        if started.process.exitcode == -signal.SIGKILL:
            continue
        assert started.process.exitcode == 0, started.out
        run = newest(folder)
        assert run
        assert_same_run(run, quiet)
        ended += 1
        (folder / "lightning_logs").rename(folder / f"ended_{ended}")  # and once more


def test_killed_runs_go_on_to_the_same_end(start: Start, tmp_path: Path, quiet: Path) -> None:
    be_killed(start, tmp_path, quiet, times=3)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(start: Start, tmp_path: Path, quiet: Path) -> None:
    be_killed(start, tmp_path, quiet, times=20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_says_how_to_go_on_and_ends(
    start: Start, tmp_path: Path, quiet: Path, number: signal.Signals
) -> None:
    stopped = start("fit", *RUN, "--trainer.callbacks=test_interruptions.WaitInTheMiddle")
    wait_for(stopped, WAITS)
    os.kill(stopped.process.pid, number)
    assert stopped.wait() == 128 + number
    assert "Traceback" not in stopped.out
    command = "python train.py fit --ckpt lightning_logs/version_0/checkpoints/last.ckpt"
    assert f"Go on with: {command}\n" in stopped.out
    assert load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt")["global_step"] < 75
    resumed = start(*command.split()[2:])
    assert resumed.wait() == 0, resumed.out
    assert_same_run(tmp_path / "lightning_logs/version_0", quiet)


def test_a_second_ctrl_c_ends_it_at_once(start: Start, tmp_path: Path) -> None:
    forever = ["--trainer.callbacks=test_interruptions.WaitInTheMiddle"]
    started = start("fit", *RUN, *forever, "--trainer.callbacks.for_ever=true")
    wait_for(started, WAITS)
    os.kill(started.process.pid, signal.SIGINT)
    wait_for(started, "once more ends it at once")
    os.kill(started.process.pid, signal.SIGINT)
    assert started.wait(20) == 130
    assert "Traceback" not in started.out
    last = load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt")
    assert last["CIFARDataModule"]["epoch"] == 0


def test_a_signal_before_training_ends_it_without_a_traceback(start: Start, tmp_path: Path) -> None:
    started = start("fit", *RUN)
    wait_for(started, "Precision")
    os.kill(started.process.pid, signal.SIGTERM)
    assert started.wait() == 143
    assert "Traceback" not in started.out


def test_workers_leave_signals_to_the_main_process() -> None:
    data = CIFARDataModule(dataset="digits", val_size=200, num_workers=1)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        assert worker.pid
        os.kill(worker.pid, number)
    assert len(list(batches)) == 12
    assert worker.is_alive()


@pytest.fixture
def under_way(start: Start) -> Started:
    """A run that has an epoch behind it, and checkpoints of that."""
    started = start("fit", *RUN, "--trainer.max_epochs=1000")
    wait_for(started, "Epoch 2/")
    return started


def assert_ends_in_one_sentence(started: Started, *parts: str) -> None:
    assert started.wait() == 1
    lines = [line for line in started.out.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, started.out
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in started.out


def test_a_full_disk_leaves_the_checkpoints_whole(under_way: Started, tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs/version_0/checkpoints"
    too_little = (folder / "last.ckpt").stat().st_size - 1
    os.kill(under_way.process.pid, signal.SIGSTOP)
    resource.prlimit(under_way.process.pid, resource.RLIMIT_FSIZE, (too_little, too_little))
    os.kill(under_way.process.pid, signal.SIGCONT)
    assert_ends_in_one_sentence(
        under_way, ".ckpt could not be written: File too large", "before is still there, whole"
    )
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "best.ckpt"}
    assert load(folder / "last.ckpt")["epoch"] >= 1
    assert load(folder / "best.ckpt")["class_names"]


def test_a_folder_that_goes_is_missed(under_way: Started, tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs/version_0/checkpoints"
    folder.rename(tmp_path / "kept")
    assert_ends_in_one_sentence(
        under_way, "could not be written: No such file or directory", "checkpoints is gone"
    )
    assert not folder.exists()
    assert load(tmp_path / "kept/last.ckpt")["epoch"] >= 1


def test_a_folder_that_may_not_be_written_is_named(under_way: Started, tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs/version_0/checkpoints"
    folder.rename(tmp_path / "kept")
    folder.touch()  # root, as whom tests may run, could write into a read-only folder
    assert_ends_in_one_sentence(under_way, f"{folder}", "could not be written: Not a directory")


@pytest.mark.parametrize("val_size", [200, 0])
def test_a_loss_that_is_not_finite_stops_the_run(run: Run, val_size: int) -> None:
    """The rate is one that no network stands, after an epoch and not within it."""
    Path("step.yaml").write_text(
        "model:\n  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}\n"
        "  lr_scheduler:\n    class_path: torch.optim.lr_scheduler.StepLR\n"
        "    init_args: {step_size: 1, gamma: 1.0e+30}\n"
    )
    options = [*SMALL_DIGITS, "--data.batch_size=50", "--config=step.yaml"]
    outcome = run("fit", *options, f"--data.val_size={val_size}", "--trainer.max_epochs=3")
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    first = 25 if val_size else 29  # steps of the epoch that went well
    found = re.search(
        r"not finite .* in step (\d+), in epoch 2, at a learning rate of 1e\+28", line
    )
    assert found, line
    assert first < int(found[1]) <= first + 5
    for name in ("last", "best"):
        content = load(Path(f"lightning_logs/version_0/checkpoints/{name}.ckpt"))
        assert content["epoch"] == 0
        assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_a_cycles_own_rate_is_named_where_it_is_too_high(run: Run) -> None:
    rate = "--model.lr_scheduler.max_lr=1e30"
    outcome = run("fit", *RUN[:-3], *ONE_CYCLE, rate, "--model.optimizer=SGD")
    assert outcome.code == 1
    assert "Try a lower rate (--model.lr_scheduler.max_lr)" in outcome.err


def test_weights_that_are_not_finite_are_not_saved(run: Run) -> None:
    """The last step of an epoch may spoil what its loss did not show."""
    spoilt = "--trainer.callbacks=test_interruptions.SpoilTheLastStep"
    outcome = run("fit", *SMALL_DIGITS, "--trainer.max_epochs=2", "--data.val_size=0", spoilt)
    assert outcome.code == 1
    assert "error: a weight is not finite (nan or inf) after step 16, in epoch 2" in outcome.err
    assert load(Path("lightning_logs/version_0/checkpoints/last.ckpt"))["epoch"] == 0


class SpoilTheLastStep(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.get_parameter("network.fc.bias").data[0] = float("nan")


def test_a_moved_run_keeps_its_best(start: Start, tmp_path: Path) -> None:
    """Also in another place the best checkpoint is only replaced by a better one."""
    first = start("fit", *RUN, "--trainer.max_epochs=1")
    assert first.wait() == 0, first.out
    (tmp_path / "lightning_logs").rename(tmp_path / "moved")
    best, last = (tmp_path / f"moved/version_0/checkpoints/{n}.ckpt" for n in ("best", "last"))
    content = load(last)
    state = next(s for s in content["callbacks"].values() if s.get("monitor") == "val/acc")
    state["best_model_score"] = torch.tensor(1.0)  # not to be beaten
    for entry in state["best_k_models"]:
        state["best_k_models"][entry] = torch.tensor(1.0)
    state["kth_value"] = torch.tensor(1.0)
    torch.save(content, last)
    before = best.read_bytes()
    resumed = start("fit", "--ckpt", str(last), "--trainer.max_epochs=2")
    assert resumed.wait() == 0, resumed.out
    assert best.read_bytes() == before
    assert "moved/version_0/checkpoints/best.ckpt (val/acc 1.0000), after epoch 1" in resumed.out


def test_a_run_says_what_it_was_made_with(run: Run) -> None:
    run("fit", *SMALL_DIGITS, "--trainer.max_epochs=1", "--seed_everything=5")
    run("fit", "--ckpt=last", "--trainer.max_epochs=2")
    first, second = json.loads(Path("lightning_logs/version_0/run.json").read_text())
    assert first["seed"] == second["seed"] == 5
    assert "--seed_everything=5" in first["command"]
    assert "--ckpt=last" in second["command"]
    data = CIFARDataModule(dataset="digits", val_size=200)
    data.setup("fit")
    assert first["data"]["checksum"] == data.checksum
    assert first["versions"]["torch"] == torch.__version__.split("+")[0]
    assert first["global_batch"] == 200
    project = Path(callbacks.__file__).parent
    git = ["git", "-C", str(project), "rev-parse", "HEAD"]
    expected = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert (first["commit"] or {"id": ""})["id"] == expected


PLATEAU = [
    "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
    "--model.lr_scheduler.monitor=val/loss",
    "--model.lr_scheduler.patience=0",
    "--model.lr_scheduler.threshold=1e9",
    "--model.lr_scheduler.threshold_mode=abs",
]
ONE_CYCLE = [
    "--model.lr_scheduler=OneCycleLR",
    "--model.lr_scheduler.max_lr=0.02",
    "--model.lr_interval=step",
]


@pytest.mark.parametrize(
    "options",
    [
        PLATEAU,
        ONE_CYCLE,
        ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=0.5"],
        ["--trainer.check_val_every_n_epoch=2", "--last_checkpoint.every_n_epochs=3"],
        ["--best_checkpoint.every_n_train_steps=10"],
    ],
    ids=["plateau", "one_cycle", "accumulation", "rare", "best_within_epochs"],
)
def test_other_ways_to_train_go_on_alike(start: Start, tmp_path: Path, options: list[str]) -> None:
    """Stopped in the middle of the second epoch, and gone on with."""
    train = [arg for arg in RUN if "step_size" not in arg] + options
    stop = "--trainer.callbacks=test_interruptions.StopInTheMiddle"
    (tmp_path / "quiet").mkdir()
    quiet = start("fit", *train, folder=tmp_path / "quiet")
    assert quiet.wait() == 0, quiet.out
    assert start("fit", *train, stop).wait() == 143
    last = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    content = load(last)
    assert content["CIFARDataModule"]["epoch"] == 1
    assert 0 < content["CIFARDataModule"]["seen"] < 1237
    resumed = start("fit", "--ckpt=last", "--trainer.callbacks=null")
    assert resumed.wait() == 0, resumed.out
    assert_same_run(last.parents[1], tmp_path / "quiet/lightning_logs/version_0")


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        ("--trainer.max_epochs=4", 1, "takes 50 steps from here, and its scheduler has 25 left"),
        ("--data.batch_size=25", 1, "takes 50 steps from here, and its scheduler has 25 left"),
        ("--data.batch_size=125", 0, "The run ends 15 steps before its learning rate does"),
        ("--data.batch_size=50", 0, ""),
    ],
)
def test_a_cycle_goes_on_as_far_as_it_reaches(run: Run, change: str, code: int, line: str) -> None:
    """A run of three epochs, gone on with after two; one that is refused stays as it is."""
    options = [*RUN[:-3], "--seed_everything=3", *ONE_CYCLE]
    stop = "--trainer.callbacks=test_interruptions.StopAfterTwo"
    assert run("fit", *options, stop).code == 143
    folder = Path("lightning_logs/version_0")
    files = [folder / "config.yaml", folder / "run.json", folder / "checkpoints/last.ckpt"]
    before = [file.read_bytes() for file in files]
    resumed = run("fit", "--ckpt=last", "--trainer.callbacks=null", change)
    assert resumed.code == code, resumed.err
    if code:
        assert line in resumed.err
        assert [file.read_bytes() for file in files] == before
    else:
        assert ("The run ends" in resumed.err + resumed.out) == bool(line)
        assert line in resumed.err + resumed.out


class StopAfterTwo(Callback):
    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class StopInTheMiddle(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1 and args[-1] == 14:  # a validation may have been
            os.kill(os.getpid(), signal.SIGTERM)


def test_workers_change_nothing(run: Run) -> None:
    """Neither in a whole run, nor in one that goes on with other workers."""
    weights = []
    for workers, epochs in ((0, 2), (2, 2), (0, 1)):
        options = [f"--data.num_workers={workers}", f"--trainer.max_epochs={epochs}"]
        assert run("fit", *SMALL_DIGITS, *options).code == 0
    assert run("fit", "--ckpt=last", "--data.num_workers=2", "--trainer.max_epochs=2").code == 0
    for version in range(3):
        content = load(Path(f"lightning_logs/version_{version}/checkpoints/last.ckpt"))
        assert content["epoch"] == 1
        weights.append(content["state_dict"])
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


@pytest.mark.parametrize(
    "option", ["--trainer.limit_train_batches=6", "--trainer.check_val_every_n_epoch=2"]
)
def test_an_epoch_that_was_whole_is_not_gone_on_with(
    start: Start, tmp_path: Path, option: str
) -> None:
    """Where it is limited, or had no validation; and workers read ahead of what comes next."""
    options = [*RUN, option, "--trainer.max_epochs=2"]
    (tmp_path / "quiet").mkdir()
    quiet = start("fit", *options, folder=tmp_path / "quiet")
    assert quiet.wait() == 0, quiet.out
    assert start("fit", *options, "--trainer.max_epochs=1").wait() == 0
    events = next((tmp_path / "lightning_logs/version_0").glob("events*"))
    resumed = start("fit", "--ckpt=last", "--trainer.max_epochs=2", "--data.num_workers=1")
    assert resumed.wait() == 0, resumed.out
    assert events.exists()
    ours, theirs = (
        load(folder / "lightning_logs/version_0/checkpoints/last.ckpt")
        for folder in (tmp_path, tmp_path / "quiet")
    )
    assert same(ours["state_dict"], theirs["state_dict"])
    points = curves(tmp_path / "lightning_logs/version_0")
    expected = curves(tmp_path / "quiet/lightning_logs/version_0")
    for name in ("train/loss", "val/acc", "lr"):
        assert points[name] == expected[name]


def test_a_seed_given_anew_decides_the_order(run: Run) -> None:
    """Where training branches off; without one the checkpoint's goes on, wherever it lies."""
    assert run("fit", *SMALL_DIGITS, "--trainer.max_epochs=1", "--seed_everything=5").code == 0
    Path("lightning_logs/version_0/checkpoints/last.ckpt").rename("moved.ckpt")
    seeds = []
    for option in ([], ["--seed_everything=7"], ["--seed_everything=7", "--data.seed=8"]):
        options = [*SMALL_DIGITS, "--trainer.max_epochs=2", *option]
        assert run("fit", "--ckpt=moved.ckpt", *options).code == 0
        content = load(Path(f"lightning_logs/version_{len(seeds) + 1}/checkpoints/last.ckpt"))
        seeds.append(content["datamodule_hyper_parameters"]["seed"])
    assert seeds == [5, 7, 8]


def test_data_that_went_on_begin_anew_in_another_fit() -> None:
    data = CIFARDataModule(dataset="digits", val_size=200)
    data.setup("fit")
    data.load_state_dict({"epoch": 0, "seen": 600})
    sampler: Any = data.train_dataloader().sampler
    assert len(list(sampler)) == 637
    data.setup("fit")
    sampler = data.train_dataloader().sampler
    assert len(list(sampler)) == 1237
