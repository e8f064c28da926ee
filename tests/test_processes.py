"""Several processes: the same images, the same figures, the same checkpoints as one."""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_DIGITS, Start, Started
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_interruptions import WAITS, curves, load, wait_for, wait_for_a_signal

import train
from cifar_datamodule import CIFARDataModule, TrainingOrder

IMAGES = 1437 - 200  # that train
RUN = [
    *SMALL_DIGITS,
    "--data.batch_size=50",
    "--pictures.every_n_epochs=0",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=2",
    "--trainer.callbacks=test_processes.Recorder",
]


class Recorder(Callback):
    """Writes down which images a process was shown, each as a number made of its pixels."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}

    def note(self, kind: str, epoch: int, images: torch.Tensor) -> None:
        numbers = [str(hash(image.numpy().tobytes())) for image in images.contiguous()]
        self.seen.setdefault(f"{kind}_{epoch}", []).extend(numbers)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.note("train", trainer.current_epoch, batch[0])
        if os.environ.get("WAIT") == str(batch_idx) and trainer.is_global_zero:
            wait_for_a_signal(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *index: int
    ) -> None:
        if not trainer.sanity_checking:
            self.note("val", trainer.current_epoch, batch[0])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number = len(list(Path.cwd().glob(f"seen_{trainer.global_rank}_*")))
        Path(f"seen_{trainer.global_rank}_{number}.json").write_text(json.dumps(self.seen))


def several(start: Start, processes: int, *args: str, **env: str) -> list[Started]:
    """Starts a command as so many processes, with what torchrun tells each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    everybody = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "PYTHONHASHSEED": "0",
    }
    options = ["--trainer.strategy=ddp", f"--trainer.devices={processes}"]
    return [
        start(*args, *options, **everybody, RANK=str(rank), LOCAL_RANK=str(rank), **env)
        for rank in range(processes)
    ]


def wait(started: list[Started]) -> str:
    for one in started:
        assert one.wait() == 0, one.out
    return started[0].out


def seen(folder: Path, kind: str) -> list[Counter[str]]:
    """What each process of a run was shown."""
    files = sorted(folder.glob("seen_*.json"))
    return [Counter(json.loads(file.read_text()).get(kind, [])) for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, start_anywhere: Start) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    wait([start_anywhere("fit", *RUN, folder=folder, PYTHONHASHSEED="0")])
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, start_anywhere: Start) -> Path:
    """A run of two."""
    folder = tmp_path_factory.mktemp("two")

    def start(*args: str, **env: str) -> Started:
        return start_anywhere(*args, folder=folder, **env)

    out = wait(several(start, 2, "fit", *RUN))
    assert "Global batch: 100 images for each optimizer step, of 2 processes" in out
    return folder


def test_two_processes_share_the_images_that_one_would_see(alone: Path, two: Path) -> None:
    """As augmented, too: each image in its own way, in whichever process."""
    for epoch in range(2):
        (whole,) = seen(alone, f"train_{epoch}")
        first, second = seen(two, f"train_{epoch}")
        assert whole.total() == IMAGES
        assert first.total() == second.total() == IMAGES // 2 + 1
        assert set(first | second) == set(whole)
        assert (first + second - whole).total() == 1  # what makes an odd number even
        (whole,) = seen(alone, f"val_{epoch}")
        first, second = seen(two, f"val_{epoch}")
        assert first + second == whole
        assert whole.total() == 200


def test_only_the_first_process_writes(alone: Path, two: Path) -> None:
    def names(folder: Path) -> list[str]:
        return sorted(path.name.split(".")[0] for path in folder.iterdir())

    (run,) = (two / "lightning_logs").iterdir()
    assert names(run) == names(alone / "lightning_logs/version_0")
    assert json.loads((run / "run.json").read_text())[0]["global_batch"] == 100


def test_figures_are_those_of_one_process(start: Start, two: Path, tmp_path: Path) -> None:
    """On 200 and 360 images, which 3 and 7 do not divide: nothing is counted twice."""
    checkpoints = two / "lightning_logs/version_0/checkpoints"
    (tmp_path / "copies").mkdir()
    ours = {}
    for processes in (1, 3):
        last = tmp_path / "copies" / f"{processes}.ckpt"
        last.write_bytes((checkpoints / "last.ckpt").read_bytes())
        for command, report in (("validate", "validate.json"), ("test", "test.json")):
            args = [command, f"--ckpt={last}", "--data.eval_batch_size=7"]
            wait(several(start, processes, *args) if processes > 1 else [start(*args)])
            content = json.loads((last.parent / report).read_text())
            with (last.parent / report.replace("test.json", "predictions.csv")).open() as file:
                rows = list(csv.DictReader(file)) if command == "test" else []
            ours[processes, command] = content, rows
    for command in ("validate", "test"):
        (one, rows), (three, expected) = ours[1, command], ours[3, command]
        assert one["images"] == three["images"] == (200 if command == "validate" else 360)
        for name in ("acc", "classes", "confused"):
            assert one[name] == three[name]
        assert one["loss"] == pytest.approx(three["loss"], rel=1e-6)
        assert rows == expected
    # And what was logged in training, by two.
    logged = curves(checkpoints.parent)
    assert logged["val/acc"][-1][1] == pytest.approx(ours[1, "validate"][0]["acc"], rel=1e-7)
    assert logged["val/loss"][-1][1] == pytest.approx(ours[1, "validate"][0]["loss"], rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_an_interrupted_epoch_goes_on_in_another_number_of_processes(
    start: Start, tmp_path: Path, alone: Path, before: int, after: int
) -> None:
    """Every image of the epoch is still shown, and only those that make up for the rest twice."""
    once = "--trainer.max_epochs=1"
    stopped = several(start, before, "fit", *RUN, once, "--data.batch_size=5", WAIT="30")
    wait_for(stopped[0], WAITS)
    os.kill(stopped[0].process.pid, signal.SIGTERM)  # the others learn of it
    for one in stopped:
        assert one.wait() == 143, one.out
        assert "Traceback" not in one.out
    content = load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt")
    done = content["CIFARDataModule"]["seen"]
    assert done == content["global_step"] * 5 * before
    assert done == 31 * 5 * before
    out = wait(several(start, after, "fit", "--ckpt=last"))
    assert "Traceback" not in out
    shown: Counter[str] = sum(seen(tmp_path, "train_0"), Counter())
    (whole,) = seen(alone, "train_0")
    assert set(shown) == set(whole)
    assert (shown - whole).total() < after
    steps = math.ceil(math.ceil((IMAGES - done) / after) / 5)
    content = load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt")
    assert content["global_step"] == done // (5 * before) + steps
    # Its figures are of the whole epoch.
    events = EventAccumulator(str(tmp_path / "lightning_logs/version_0")).Reload()
    (point,) = events.Scalars("train/acc")
    images = IMAGES + (shown - whole).total()
    assert point.value * images == pytest.approx(round(point.value * images), abs=1e-2)


def test_a_finished_epoch_goes_on_in_another_number_of_processes(
    start: Start, tmp_path: Path
) -> None:
    wait([start("fit", *RUN, "--trainer.max_epochs=1")])
    wait(several(start, 2, "fit", "--ckpt=last", "--trainer.max_epochs=2"))
    alone_again = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.max_epochs=3"]
    wait([start("fit", "--ckpt=last", *alone_again)])
    content = load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt")
    assert content["epoch"] == 2
    assert content["global_step"] == 25 + 13 + 25
    assert [step for step, _ in curves(tmp_path / "lightning_logs/version_0")["val/acc"]] == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_orders_of_the_processes_make_up_that_of_one(processes: int) -> None:
    data = CIFARDataModule(dataset="digits", val_size=200)
    data.setup("fit")

    def orders(behind: int, processes: int) -> list[list[int]]:
        samplers = [TrainingOrder(data.train_set, processes, r, seed=3) for r in range(processes)]
        for sampler in samplers:
            sampler.interrupted, sampler.seen = 4, behind
            sampler.set_epoch(4)
        return [list(sampler) for sampler in samplers]

    (whole,) = orders(0, 1)
    for behind in (0, 1, 600, IMAGES - 1):
        parts = orders(behind, processes)
        assert len({len(part) for part in parts}) == 1
        together = [position for turn in zip(*parts, strict=True) for position in turn]
        assert together[: IMAGES - behind] == whole[behind:]
        assert len(together) < IMAGES - behind + processes


PROJECT = Path(train.__file__).parent
# What the launchers of others do is slow, for each of their processes imports everything.
PLAIN = [*RUN[:-1], "--trainer.max_epochs=1000"]


def python(*args: str, folder: Path, **env: str) -> subprocess.Popen[str]:
    """Starts python with these arguments as a group of processes of its own."""
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=(folder / "out.txt").open("a"),
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=heed_ctrl_c,
    )


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background ignores


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_lightning_launches_processes_and_ctrl_c_saves_them(tmp_path: Path) -> None:
    options = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    script = str(PROJECT / "train.py")
    started = python(script, "fit", *PLAIN, *options, folder=tmp_path)
    last = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    wait_until(last.is_file)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(30) == 130
    out = (tmp_path / "out.txt").read_text()
    assert out.count("Go on with: python ") == 1
    assert "Traceback" not in out
    assert load(last)["CIFARDataModule"]["seen"] % 100 in (0, (IMAGES + 1) % 100)


@pytest.mark.slow
def test_torchrun_joins_two_nodes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
        torchrun += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        options = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
        args = [*torchrun, str(PROJECT / "train.py"), "fit", *PLAIN, *options]
        nodes.append(python(*args, "--trainer.max_epochs=1", folder=tmp_path / str(rank)))
    assert [node.wait(120) for node in nodes] == [0, 0]
    first = (tmp_path / "0/out.txt").read_text()
    assert "Global batch: 100 images for each optimizer step, of 2 processes" in first
    assert not (tmp_path / "1/lightning_logs/version_0/config.yaml").exists()
    content = load(tmp_path / "0/lightning_logs/version_0/checkpoints/last.ckpt")
    assert content["global_step"] == 13


SRUN = """#!/usr/bin/env bash
export SLURM_NTASKS=2 SLURM_JOB_NAME=cifar SLURM_STEP_NODELIST=127.0.0.1 SLURM_NODELIST=127.0.0.1
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" &
    echo $! >> srun_pids
done
wait -n; code=$?; wait; exit $code
"""


@pytest.mark.slow
def test_slurm_starts_the_job_anew_and_its_script_goes_on(tmp_path: Path) -> None:
    """With stand-ins for srun, which starts a process on each of two nodes, and for scontrol."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text(SRUN)
    (commands / "scontrol").write_text('#!/usr/bin/env bash\necho "$@" >> scontrol_calls\n')
    (commands / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {PROJECT}/"$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "4217",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
    }

    def job(*options: str) -> subprocess.Popen[bytes]:
        script = ["bash", str(PROJECT / "recipes/slurm.sh"), *PLAIN, *options]
        out = (tmp_path / "out.txt").open("a")
        return subprocess.Popen(script, cwd=tmp_path, env=env, stdout=out, stderr=out)

    first = job()
    last = tmp_path / "runs/4217/lightning_logs/version_0/checkpoints/last.ckpt"
    wait_until(last.is_file)
    for pid in (tmp_path / "srun_pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert first.wait(30) == 128 + signal.SIGUSR1
    assert (tmp_path / "scontrol_calls").read_text() == "requeue 4217\n"
    epoch = load(last)["epoch"]
    assert job(f"--trainer.max_epochs={epoch + 2}").wait(120) == 0
    assert load(last)["epoch"] == epoch + 1
    assert len(list((tmp_path / "runs/4217/lightning_logs").iterdir())) == 1
    assert "Traceback" not in (tmp_path / "out.txt").read_text()
