"""Several processes: the same images, the same results and the same checkpoints as one.

Most of the processes are forks of a server that has imported everything (conftest.py). Those that
Lightning, torchrun and SLURM start import it anew, which takes each of them seconds.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FLOAT32, SMALL_DIGITS, Run, Start, Started, wait_for
from lightning.pytorch import Callback, LightningModule, Trainer

import train
from cifar_resnet.callbacks import read_scalars

IMAGES = 1437 - 200  # training images
STEPS, STEPS_OF_TWO = 25, 13  # of an epoch in one process and in two
PROJECT = Path(train.__file__).parent
LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")
FIT = [
    "fit",
    *SMALL_DIGITS,
    "--data.batch_size=50",
    "--model.optimizer.lr=0.01",
    "--pictures.every_n_epochs=0",
    "--trainer.enable_model_summary=false",
]
TWO_EPOCHS = [*FIT, "--trainer.max_epochs=2", "--trainer.callbacks=test_processes.Recorder"]
ENDLESS = [*FIT, "--trainer.max_epochs=1000"]


class Recorder(Callback):
    """Writes down which images a process is shown in each epoch, as digests of their pixels."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.digests: list[str] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        images = batch[0].contiguous().numpy()
        self.digests += [hashlib.md5(image.tobytes()).hexdigest() for image in images]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = Path(f"images_{trainer.current_epoch}_{trainer.global_rank}.json")
        file.write_text(json.dumps(self.digests))


def recorded(folder: Path, epoch: int) -> list[Counter[str]]:
    """The images of each process."""
    files = sorted(folder.glob(f"images_{epoch}_*.json"))
    return [Counter(json.loads(file.read_text())) for file in files]


def load_whole_epochs(path: Path) -> dict[str, Any]:
    """Loads a checkpoint; fails if it was saved within an epoch."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    return checkpoint


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_several(start: Start, processes: int, *args: str) -> list[Started]:
    """Starts a command in so many processes, with what torchrun tells each of them."""
    env = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    args = (*args, "--trainer.strategy=ddp", f"--trainer.devices={processes}")
    ranks = [str(rank) for rank in range(processes)]
    return [start(*args, **env, RANK=rank, LOCAL_RANK=rank) for rank in ranks]


def wait(*started: Started, code: int = 0) -> None:
    for process in started:
        assert process.wait() == code, process.out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, start_anywhere: Start) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    wait(start_anywhere(*TWO_EPOCHS, folder=folder))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, start_anywhere: Start) -> Path:
    """The folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    wait(*start_several(partial(start_anywhere, folder=folder), 2, *TWO_EPOCHS))
    return folder


@pytest.mark.slow
def test_two_processes_share_the_augmented_images_of_one(one: Path, two: Path) -> None:
    for epoch in range(2):
        (whole,) = recorded(one, epoch)
        first, second = recorded(two, epoch)
        assert whole.total() == IMAGES
        assert first.total() == second.total() == (IMAGES + 1) // 2
        assert set(first | second) == set(whole)
        assert (first + second - whole).total() == 1  # which makes their number even
    assert recorded(one, 0) != recorded(one, 1)


@pytest.mark.slow
def test_only_the_first_process_writes(one: Path, two: Path) -> None:
    def names(folder: Path) -> list[str]:
        return sorted(path.name.split(".")[0] for path in (folder / "lightning_logs").rglob("*"))

    assert names(two) == names(one)
    (start,) = json.loads((two / LAST.parents[1] / "run.json").read_text())
    assert (start["processes"], start["effective_batch_size"]) == (2, 100)
    first, second = ((two / f"output_{rank}.txt").read_text() for rank in range(2))
    assert first.count("Each optimizer step takes 100 images") == 1
    assert first.count("Epoch 2/2") == 1
    assert "Epoch" not in second


@pytest.mark.slow
@pytest.mark.parametrize(("command", "images"), [("validate", 200), ("test", 360)])
def test_results_of_three_processes_are_those_of_one(
    run: Run, start: Start, two: Path, tmp_path: Path, command: str, images: int
) -> None:
    """In batches of 7, which leave uneven rests: no image is counted twice or left out."""
    reports, tables = [], []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        checkpoint = shutil.copy(two / LAST, folder)
        args = [command, f"--ckpt={checkpoint}", "--data.eval_batch_size=7", "--mirror", FLOAT32]
        if processes == 1:
            assert run(*args).code == 0
        else:
            wait(*start_several(start, processes, *args))
        reports.append(json.loads((folder / f"{command}.json").read_text()))
        tables.append(next(folder.glob("*predictions.csv")).read_text())
    one, three = reports
    assert one["images"] == images
    for name in ("images", "acc", "acc_mirrored", "classes", "confused"):
        assert three[name] == one[name]
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_validation_in_training_by_two_processes_is_that_of_one(
    run: Run, two: Path, tmp_path: Path
) -> None:
    assert run("validate", f"--ckpt={shutil.copy(two / LAST, tmp_path)}").code == 0
    expected = json.loads((tmp_path / "validate.json").read_text())
    logged = read_scalars(two / LAST.parents[1])
    assert logged["val/acc"][-1] == (2, pytest.approx(expected["acc"], rel=1e-6))
    assert logged["val/loss"][-1] == (2, pytest.approx(expected["loss"], rel=1e-5))


@pytest.mark.slow
def test_run_resumes_in_another_number_of_processes(
    start: Start, one: Path, tmp_path: Path
) -> None:
    shutil.copytree(one / "lightning_logs", tmp_path / "lightning_logs")
    wait(*start_several(start, 2, "fit", "--ckpt=last", "--trainer.max_epochs=3"))
    alone = ["--trainer.devices=1", "--trainer.strategy=auto"]
    wait(start("fit", "--ckpt=last", "--trainer.max_epochs=4", *alone))
    checkpoint = load_whole_epochs(tmp_path / LAST)
    assert checkpoint["global_step"] == 2 * STEPS + STEPS_OF_TWO + STEPS
    logged = read_scalars(tmp_path / LAST.parents[1])
    assert [epoch for epoch, _ in logged["val/acc"]] == [1, 2, 3, 4]
    totals = [images.total() for epoch in (2, 3) for images in recorded(tmp_path, epoch)]
    assert totals == [(IMAGES + 1) // 2, (IMAGES + 1) // 2, IMAGES]


@pytest.mark.slow
def test_sigterm_to_any_process_stops_all(start: Start, tmp_path: Path) -> None:
    first, second = start_several(start, 2, *ENDLESS)
    wait_for(tmp_path / LAST)
    second.process.terminate()
    wait(first, second, code=143)
    assert "Resume with: python " in first.out
    assert "Traceback" not in first.out + second.out
    load_whole_epochs(tmp_path / LAST)


Launch = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts a command as a group of processes, as a shell does; it prints to out.txt or a pipe."""
    started: list[subprocess.Popen[bytes]] = []

    def command(
        *args: str, folder: Path, pipe: bool = False, **env: str
    ) -> subprocess.Popen[bytes]:
        with (folder / "out.txt").open("a") as out:
            process = subprocess.Popen(
                args,
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                stdout=subprocess.PIPE if pipe else out,
                stderr=subprocess.STDOUT,
                process_group=0,
                # A job in the background ignores Ctrl-C, and so would what it starts.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        started.append(process)
        return process

    yield command
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_of_lightnings_launcher(launch: Launch, tmp_path: Path) -> None:
    """All of them: what they print to ends only when none is left."""
    script = [sys.executable, str(PROJECT / "train.py")]
    options = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    started = launch(*script, *ENDLESS, *options, folder=tmp_path, pipe=True)
    wait_for(tmp_path / LAST)
    os.killpg(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    assert started.returncode != 0
    load_whole_epochs(tmp_path / LAST)


@pytest.mark.slow
def test_torchrun_joins_two_nodes(launch: Launch, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    options = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    command = [str(PROJECT / "train.py"), *FIT, *options, "--trainer.max_epochs=1"]
    folders = [tmp_path / "0", tmp_path / "1"]
    nodes = []
    for folder in folders:
        folder.mkdir()
        nodes.append(launch(*torchrun, f"--node-rank={folder.name}", *command, folder=folder))
    assert [node.wait(180) for node in nodes] == [0, 0]
    assert "Each optimizer step takes 100 images" in (folders[0] / "out.txt").read_text()
    assert load_whole_epochs(folders[0] / LAST)["global_step"] == STEPS_OF_TWO
    assert [path.name for path in folders[1].rglob("*")] == ["out.txt"]


# Stand-ins for SLURM's commands: srun starts a task on each of two nodes, scontrol ends them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_NODELIST=127.0.0.1 SLURM_LOCALID=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_NODEID=$rank "$@" & done
jobs -p > tasks
wait $(< tasks)
"""
COMMANDS = {
    "srun": SRUN,
    "scontrol": '#!/usr/bin/env bash\necho "$@" >> calls\nkill $(< tasks)\n',
    "python": f'#!/usr/bin/env bash\nexec {sys.executable} {PROJECT}/"$@"\n',
}


@pytest.mark.slow
def test_slurm_job_is_requeued_and_resumes_its_run(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, script in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4217"}
    env |= {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    env["MASTER_PORT"] = free_port()  # without it Lightning takes one that follows from the job
    # The second start must not add a callback again, nor take the script's strategy.
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"]
    stopping += ["--trainer.callbacks.patience=1000", "--periodic_checkpoint.every_n_epochs=1"]
    strategy = "ddp_find_unused_parameters_false"
    options = [*ENDLESS[1:], *stopping, f"--trainer.strategy={strategy}"]
    job = ["bash", str(PROJECT / "recipes/slurm.sh"), *options]
    last = tmp_path / "runs/4217" / LAST
    first = launch(*job, folder=tmp_path, **env)
    wait_for(last)
    os.kill(first.pid, signal.SIGUSR1)  # the script alone, not its tasks
    assert first.wait(60) == 128 + signal.SIGUSR1
    assert (tmp_path / "calls").read_text() == "requeue 4217\n"
    epoch = load_whole_epochs(last)["epoch"]
    again = launch(*job, folder=tmp_path, **env)
    wait_for(last.with_name(f"epoch_{epoch + 2}.ckpt"))
    again.send_signal(signal.SIGUSR1)
    assert again.wait(60) == 128 + signal.SIGUSR1
    assert load_whole_epochs(last)["epoch"] > epoch
    assert f"strategy: {strategy}\n" in (last.parents[1] / "config.yaml").read_text()
    assert [run.name for run in last.parents[2].iterdir()] == ["version_0"]
    assert "Traceback" not in (tmp_path / "out.txt").read_text()
