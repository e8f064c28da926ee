"""Runs that are killed, stopped or cannot write: resumed, they end as an uninterrupted run."""

import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_DIGITS, Run, Start, Started, file_size_limit, wait_for
from lightning.pytorch import Callback, LightningModule, Trainer

from cifar_resnet.callbacks import StopAtSignal, read_scalars

EPOCHS = 3
# 25 steps in an epoch; the rate changes with each, and the best epoch need not be the last.
SHORT = [f"--trainer.max_epochs={EPOCHS}", "--model.optimizer.lr=0.01", "--seed_everything=3"]
PLAIN = ["--pictures.every_n_epochs=0", "--trainer.enable_model_summary=false"]
RUN = [*SMALL_DIGITS, "--data.batch_size=50", *SHORT, *PLAIN]
STEP_LR = ["--model.lr_scheduler.step_size=1"]
ONE_CYCLE = [
    "--model.lr_scheduler=OneCycleLR",
    "--model.lr_scheduler.max_lr=0.02",
    "--model.lr_interval=step",
]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """All that TensorBoard shows of a run, but its speed."""
    return {name: c for name, c in read_scalars(run).items() if name != "images_per_second"}


def is_same(a: Any, b: Any) -> bool:
    """Whether two nested structures are bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(is_same(*pair) for pair in zip(a, b, strict=True))
    return a == b


def best_score(checkpoint: dict[str, Any]) -> Any:
    return checkpoint["callbacks"]["EpochCheckpoint best"]["best_model_score"]


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    """Weights, optimizer and scheduler, the best checkpoint and its score, and every curve."""
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (load(folder / "checkpoints" / name) for folder in (run, uninterrupted))
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            assert is_same(ours[key], theirs[key]), (name, key)
        assert is_same(best_score(ours), best_score(theirs))
    assert curves(run) == curves(uninterrupted)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


class StopInEpoch(Callback):
    """Stops a run in the middle of an epoch, as Ctrl-C does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch and args[-1] == 14:
            raise KeyboardInterrupt


@pytest.fixture
def steps25(small: list[str]) -> list[str]:
    """Options of a run whose epochs have 25 steps of 8 images."""
    return [*small, "--data.batch_size=8", *SHORT]


STOP = ["--trainer.callbacks=test_resume.StopInEpoch", "--trainer.callbacks.epoch=1"]


@pytest.mark.parametrize(
    "options",
    [
        STEP_LR,
        ONE_CYCLE,
        ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=0.5"],
        ["--trainer.check_val_every_n_epoch=2"],
    ],
    ids=["step", "cycle", "accumulation", "rare validation"],
)
def test_resumed_run_equals_an_uninterrupted_one(
    run: Run, steps25: list[str], options: list[str]
) -> None:
    assert run("fit", *steps25, *options, "--trainer.default_root_dir=whole").code == 0
    stopped = run("fit", *steps25, *options, *STOP)
    assert stopped.code == 1
    assert "Stopped in epoch 2. Resume with: python" in stopped.out
    last = Path("lightning_logs/version_0/checkpoints/last.ckpt")
    assert load(last)["epoch"] == 0
    resumed = run("fit", "--ckpt=last", "--trainer.callbacks=null")
    assert resumed.code == 0, resumed.err
    assert_same_run(last.parents[1], Path("whole/lightning_logs/version_0"))


def test_cycle_limits_a_resumed_run(run: Run, steps25: list[str]) -> None:
    """A run that is refused stays as it is."""
    stop = [*STOP[:1], "--trainer.callbacks.epoch=2"]
    assert run("fit", *steps25, *ONE_CYCLE, *stop).code == 1
    folder = Path("lightning_logs/version_0")
    files = [folder / "config.yaml", folder / "run.json", folder / "checkpoints/last.ckpt"]
    before = [file.read_bytes() for file in files]
    for change, steps in (("--trainer.max_epochs=4", 100), ("--data.batch_size=4", 150)):
        refused = run("fit", "--ckpt=last", "--trainer.callbacks=null", change)
        assert refused.code == 1
        assert f"the run takes {steps} steps " in refused.err
        assert "but OneCycleLR only 75" in refused.err
        assert [file.read_bytes() for file in files] == before
    resumed = run("fit", "--ckpt=last", "--trainer.callbacks=null", "--data.batch_size=20")
    assert resumed.code == 0, resumed.err
    assert "the run ends 45 steps before the cycle" in resumed.out


class FillTheDisk(Callback):
    """Lets the second epoch's checkpoints fail."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


def test_full_disk_leaves_the_checkpoints_whole(run: Run, steps25: list[str]) -> None:
    # Larger than what TensorBoard and matplotlib write meanwhile.
    network = ["--model.width=8", "--trainer.callbacks=test_resume.FillTheDisk"]
    with file_size_limit(2**40):
        outcome = run("fit", *steps25, *network)
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert ".ckpt could not be written: File too large" in line
    folder = Path("lightning_logs/version_0/checkpoints")
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "best.ckpt"}
    assert load(folder / "last.ckpt")["epoch"] == load(folder / "best.ckpt")["epoch"] == 0


class PauseInEpoch2(Callback):
    """Holds a run within its second epoch, once, until a signal has reached it."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if (trainer.current_epoch, args[-1]) != (1, 14) or Path("paused").exists():
            return
        Path("paused").touch()
        (hint,) = (c for c in trainer.callbacks if isinstance(c, StopAtSignal))
        while not hint.terminated:  # SIGINT ends it by an exception
            time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, start_anywhere: Start) -> Path:
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    started = start_anywhere("fit", *RUN, *STEP_LR, folder=folder)
    assert started.wait() == 0, started.out
    return folder / "lightning_logs" / "version_0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_signal_ends_a_run_that_then_resumes(
    start: Start, tmp_path: Path, uninterrupted: Path, number: int, code: int
) -> None:
    stopped = start("fit", *RUN, *STEP_LR, "--trainer.callbacks=test_resume.PauseInEpoch2")
    wait_for(tmp_path / "paused")
    os.kill(stopped.process.pid, number)
    assert stopped.wait() == code, stopped.out
    assert "Traceback" not in stopped.out
    run = tmp_path / "lightning_logs/version_0"
    (command,) = [line for line in stopped.out.splitlines() if "Stopped in epoch 2. Resume" in line]
    resumed = start(*command.split("Resume with: ")[1].split()[2:])
    assert resumed.wait() == 0, resumed.out
    assert_same_run(run, uninterrupted)


def kill_at_random(started: Started, chance: random.Random) -> None:
    """Kills a run at a random moment of its training, or while it writes a checkpoint."""
    folder, process = started.output.parent, started.process
    while "GPU" not in started.out and process.is_alive():
        time.sleep(0.001)
    wanted, end = chance.choice(["any", "last", "best"]), time.monotonic() + chance.uniform(0, 2)
    while process.is_alive() and time.monotonic() < end:
        halves = folder.glob(f"lightning_logs/*/checkpoints/{wanted}.ckpt.part")
        if wanted != "any" and any(halves):
            break
    process.kill()
    process.join()


@pytest.mark.slow
def test_ten_kills_leave_no_trace(start: Start, tmp_path: Path, uninterrupted: Path) -> None:
    """Runs resume until they end, and each that does equals the uninterrupted one."""
    chance, kills, ended = random.Random(0), 0, 0
    while kills < 10 or not ended:
        last = list(tmp_path.glob("lightning_logs/version_*/checkpoints/last.ckpt"))
        started = start("fit", "--ckpt=last") if last else start("fit", *RUN, *STEP_LR)
        if kills < 10:
            kill_at_random(started, chance)
        if started.wait() == -signal.SIGKILL:
            kills += 1
            continue
        assert started.process.exitcode == 0, started.out
        (last,) = tmp_path.glob("lightning_logs/version_*/checkpoints/last.ckpt")
        assert_same_run(last.parents[1], uninterrupted)
        ended += 1
        (tmp_path / "lightning_logs").rename(tmp_path / f"ended_{ended}")  # and once more
