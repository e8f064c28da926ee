"""What the tests share: a small CIFAR in its own format, and the command line in this process."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

# Bit-identical runs and runs of several processes are the CPU's.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import train
from cifar_datamodule import CIFARDataModule
from cifar_resnet.datasets import CIFAR, DATASETS
from resnet_module import ResNetModule

torch.set_num_threads(1)  # the networks here are too small to share out

TRAIN_IMAGES, TEST_IMAGES = 250, 60
FLOAT32 = "--trainer.precision=32-true"  # whether the CPU has bf16 or not
TINY = ["--model.layers=[1,1,1]", "--model.width=4", FLOAT32]
QUIET: dict[str, Any] = {  # of a Trainer that writes and prints nothing
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SMALL_DIGITS = ["--data.dataset=digits", "--data.val_size=200", "--data.batch_size=200", *TINY]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_batch(path: Path, count: int, classes: int, label_key: str) -> tuple[str, str]:
    """Writes one pickled batch as CIFAR's authors did; returns its name and md5."""
    rng = np.random.default_rng(len(path.name) + ord(path.name[-1]))
    batch = {
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        label_key: (np.arange(count) % classes).tolist(),
    }
    path.write_bytes(pickle.dumps(batch))
    return path.name, hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, source: type[CIFAR10], patch: pytest.MonkeyPatch) -> Path:
    """Writes a small CIFAR into `root` and makes torchvision take it for the whole one."""
    hundred = source is CIFAR100
    classes, label_key = (100, "fine_labels") if hundred else (10, "labels")
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    names = [name for name, _ in source.train_list]
    count = TRAIN_IMAGES // len(names)
    train = [write_batch(folder / name, count, classes, label_key) for name in names]
    patch.setattr(source, "train_list", train)
    (name, _), *_ = source.test_list
    test = [write_batch(folder / name, TEST_IMAGES, classes, label_key)]
    patch.setattr(source, "test_list", test)
    meta = folder / source.meta["filename"]
    meta.write_bytes(pickle.dumps({source.meta["key"]: [f"class {i}" for i in range(classes)]}))
    md5 = hashlib.md5(meta.read_bytes()).hexdigest()
    patch.setattr(source, "meta", {**source.meta, "md5": md5})
    # No test reaches the network: what is not there cannot be fetched either.
    patch.setattr(source, "url", f"http://127.0.0.1:9/{source.filename}")
    name = "cifar100" if hundred else "cifar10"
    patch.setitem(DATASETS, name, CIFAR(source, classes))  # without mirrors
    return root


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with 250 + 60 images of noise in CIFAR-10's format."""
    return write_cifar(tmp_path / "cifar", CIFAR10, monkeypatch)


@pytest.fixture
def small(cifar10: Path) -> list[str]:
    """Options of a run whose epochs have 64 + 64 + 64 + 8 images."""
    return [f"--data.root={cifar10}", "--data.val_size=50", "--data.batch_size=64", *TINY]


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with 250 + 60 images of noise in CIFAR-100's format."""
    return write_cifar(tmp_path / "cifar", CIFAR100, monkeypatch)


def save_checkpoint(path: Path, module: ResNetModule, names: Sequence[str], **data: Any) -> None:
    """Writes a checkpoint as `fit` does; the network's data set need not exist."""
    checkpoint = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "datamodule_hyper_parameters": dict(CIFARDataModule(**{"dataset": "gone"} | data).hparams),
        "class_names": [*names],
        "epoch": 0,
        "global_step": 1,
        **{"loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)


class Malice:
    """What, read as a pickle, runs code: it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a full disk, a write fails in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@dataclass
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `python train.py ARGS` in this process, in a working folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def command(*args: str) -> Outcome:
        quiet = ["--trainer.enable_model_summary=false", "--pictures.every_n_epochs=0", FLOAT32]
        code = 0
        capfd.readouterr()
        try:
            with warnings.catch_warnings():
                monkeypatch.setattr(sys, "argv", ["train.py", args[0], *quiet, *args[1:]])
                train.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return command


# Processes of their own, in no time: forks of one that has imported everything and done nothing.
PROCESSES = multiprocessing.get_context("forkserver")


class Started:
    """`python train.py ARGS` as a process of its own, to be killed, interrupted or waited for."""

    def __init__(self, args: tuple[str, ...], folder: Path, env: dict[str, str]) -> None:
        self.output = folder / f"output_{len(list(folder.glob('output_*')))}.txt"
        self.output.touch()
        self.process = PROCESSES.Process(
            target=be_the_command,
            args=(args, folder, self.output, {**os.environ, "OMP_NUM_THREADS": "1", **env}),
        )
        self.process.start()

    @property
    def out(self) -> str:
        """What it has printed so far, to stdout and stderr."""
        return self.output.read_text()

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, negative where a signal has ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it still runs:\n{self.out}"
        return self.process.exitcode


def be_the_command(args: tuple[str, ...], folder: Path, output: Path, env: dict[str, str]) -> None:
    """What a process of `Started` does."""
    os.setpgrp()
    # As from a terminal, whatever started the tests: a job in the background ignores them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *args]
    train.main()


def wait_for(path: Path) -> None:
    """Waits until a process has written a file."""
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def start_anywhere() -> Iterator[Start]:
    """Starts `python train.py ARGS` as a process, in the folder it is given."""
    started: list[Started] = []
    paths = [path for path in sys.path if path] + [os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))  # where the server finds `train`
        PROCESSES.set_forkserver_preload(["pytest", "train", "sklearn.datasets", "tensorboard"])

        def command(*args: str, folder: Path, **env: str) -> Started:
            started.append(Started(args, folder, env))
            return started[-1]

        yield command
    for one in started:
        one.process.kill()
        one.process.join()


@pytest.fixture
def start(start_anywhere: Start, tmp_path: Path) -> Start:
    """Starts `python train.py ARGS` as a process, in a folder of the test's own."""
    return partial(start_anywhere, folder=tmp_path)


@dataclass
class DigitsRun:
    """A finished `fit` of a tiny network on the digits, with pictures."""

    folder: Path  # lightning_logs/version_0
    out: str

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> DigitsRun:
    """Trained once, for tests that only look: what they write belongs into their own folder."""
    folder = tmp_path_factory.mktemp("digits")
    command = ["train.py", "fit", *SMALL_DIGITS, "--trainer.max_epochs=3", "--data.batch_size=50"]
    before, out = dict(os.environ), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(sys, "argv", command)
        with warnings.catch_warnings():
            train.main()
    os.environ.clear()
    os.environ.update(before)
    return DigitsRun(folder / "lightning_logs" / "version_0", out.getvalue())


@pytest.fixture
def best(digits_run: DigitsRun, tmp_path: Path) -> Path:
    """A copy of its best checkpoint, in a folder of the test's own."""
    return Path(shutil.copy(digits_run.best, tmp_path / "best.ckpt"))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undoes what seed_everything and the Trainer leave in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
