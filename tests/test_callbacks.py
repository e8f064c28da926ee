"""What happens beside training: checks, summaries, and when pictures are drawn."""

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUIET, DigitsRun, Run
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from cifar_datamodule import CIFARDataModule
from cifar_resnet import callbacks
from cifar_resnet.callbacks import (
    CycleLengthCheck,
    EpochSummary,
    StopAtSignal,
    TensorBoardImages,
    TerminateOnNaN,
)
from cifar_resnet.checkpoint import EpochCheckpoint
from cifar_resnet.figures import FIGURES
from cifar_resnet.messages import UserError
from cifar_resnet.runs import read_scalars
from resnet_module import ResNetModule

RUN = Path("lightning_logs/version_0")
CYCLE = partial(OneCycleLR, max_lr=0.1, total_steps=3)


def fit(
    root: Path, *used: Callback, val_size: int = 50, ckpt: Path | None = None, **options: Any
) -> Trainer:
    """Two epochs with these callbacks alone; `options` are the module's `lr_…` and Trainer's."""
    schedule = {name: options.pop(name) for name in [*options] if name.startswith("lr_")}
    defaults = {**QUIET, "max_epochs": 2, "default_root_dir": root}
    defaults["enable_checkpointing"] = any(isinstance(each, EpochCheckpoint) for each in used)
    trainer = Trainer(callbacks=[*used], **(defaults | options))
    data = CIFARDataModule(str(root), val_size=val_size, batch_size=64, eval_batch_size=20)
    trainer.fit(ResNetModule(layers=(1, 1, 1), width=4, **schedule), data, ckpt_path=ckpt)
    return trainer


class AtStart(Callback):
    """Does something with the first images of an epoch, which count from 1."""

    def __init__(self, epoch: int, action: Callable[[Tensor], None]) -> None:
        self.epoch, self.action = epoch, action

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch + 1, batch_idx) == (self.epoch, 0):
            self.action(batch[0])


class Clock(Callback):
    """The time in a run in which a training batch takes 1 s, one of validation 1,000 s."""

    now = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        self.now += 1

    def on_validation_batch_end(self, *args: Any) -> None:
        self.now += 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def epoch_lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("Epoch ")]


# Checks


@pytest.mark.parametrize("val_size", [50, 0])
@pytest.mark.parametrize("epoch", [1, 2])
def test_nan_ends_the_run_before_a_checkpoint_holds_it(
    epoch: int, val_size: int, cifar10: Path
) -> None:
    def spoil(images: Tensor) -> None:
        images[7, 0, 5, 5] = math.nan

    best = EpochCheckpoint("best", monitor="val/acc" if val_size else None)
    every = EpochCheckpoint("epoch_{epoch}", save_top_k=-1)
    used = [best, EpochCheckpoint("last"), every, AtStart(epoch, spoil), TerminateOnNaN()]
    with pytest.raises(UserError, match=rf"after epoch {epoch}, .* rate of 0\.001:"):
        fit(cifar10, *used, val_size=val_size, limit_val_batches=float(val_size > 0))
    saved = [torch.load(path) for path in cifar10.rglob("*.ckpt")]
    assert [checkpoint["epoch"] for checkpoint in saved] == [0] * 3 * (epoch - 1)
    for checkpoint in saved:
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("epochs", [4, -1])
def test_run_longer_than_its_cycle_is_refused(interval: str, epochs: int, cifar10: Path) -> None:
    batches: list[Tensor] = []
    used = [CycleLengthCheck(), AtStart(1, batches.append)]
    with pytest.raises(UserError, match=r"^the run takes .*, but OneCycleLR only 3: "):
        fit(cifar10, *used, lr_scheduler=CYCLE, lr_interval=interval, max_epochs=epochs)
    assert not batches


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ({"lr_scheduler": CYCLE, "max_epochs": 3}, ""),
        ({"lr_scheduler": CYCLE}, "Note: the run ends 1 epochs before the cycle of its OneCycleLR"),
        ({"max_epochs": -1, "max_steps": 4}, ""),  # without a cycle
    ],
)
def test_run_within_its_cycle_trains_and_a_shorter_one_is_noted(
    options: dict[str, Any], noted: str, cifar10: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(cifar10, CycleLengthCheck(), **options).global_step >= 4
    assert capsys.readouterr().out.strip() == noted


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 1), (SIGTERMException, 143)])
def test_stopped_run_says_how_to_resume(
    error: type[BaseException],
    code: int,
    cifar10: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(images: Tensor) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--trainer.max_epochs=9"])
    monkeypatch.chdir(cifar10)
    last = Path("my runs/checkpoints/last.ckpt")
    # Before and after the first checkpoint; in a run that branches off from it, before its first.
    for epoch, folder, ckpt in ((1, "my runs", None), (2, "my runs", None), (2, "branch", last)):
        used = [EpochCheckpoint("best", "train/acc"), EpochCheckpoint("last"), AtStart(epoch, stop)]
        with pytest.raises(SystemExit) as end:
            fit(cifar10, *used, StopAtSignal(), default_root_dir=cifar10 / folder, ckpt=ckpt)
        assert end.value.code == code
    assert capsys.readouterr().out.splitlines() == [
        "Stopped before the first epoch was saved",
        f"Stopped in epoch 2. Resume with: python train.py fit --ckpt '{last}'",
        "Stopped before the first epoch was saved",
    ]


# Summaries


def test_network_summary_has_a_row_for_each_stage(
    run: Run, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[dict[str, list[str]]] = []

    def record(table: Any, *args: Any, **kwargs: Any) -> None:
        tables.append({name: [cell.strip() for cell in column] for name, column in table})

    monkeypatch.setattr(ModelSummary, "summarize", staticmethod(record))
    options = ["--trainer.enable_model_summary=true", "--trainer.max_epochs=1"]
    assert run("fit", *small, *options).code == 0
    (table,) = tables  # and none of Lightning's own
    stages = ("conv", "bn", "layer1", "layer2", "layer3", "fc")
    assert table["Name"] == [f"network.{name}" for name in stages]
    assert table["Params"] == ["108", "8", "304", "1.2 K", "4.7 K", "170"]
    # A multiplication and an addition for each weight at each place where a filter stands; each
    # stage has twice the channels on a quarter of the pixels.
    stem, stage = (f"{2 * n * 32 * 32 // 1000} K" for n in (108, 2 * 4 * 4 * 3 * 3))
    assert table["FLOPs"] == [stem, "0", stage, stage, stage, "320"]


@pytest.mark.parametrize("option", [{"val_check_interval": 2}, {"limit_val_batches": 0}])
def test_images_per_second_leave_validation_out(
    option: dict[str, Any], cifar10: Path, clock: Clock
) -> None:
    trainer = fit(cifar10, clock, EpochSummary(), **option)
    # 2 × 4 batches of training, of validation 2 of the sanity check and 4 × 3
    assert clock.now == 8 + 14_000 * ("val_check_interval" in option)
    assert float(trainer.callback_metrics["images_per_second"]) == (3 * 64 + 8) / 4


def test_epoch_lines_show_the_metrics(digits_run: DigitsRun) -> None:
    curves, lines = read_scalars(digits_run.folder), epoch_lines(digits_run.out)
    assert len(lines) == 3
    for epoch, line in enumerate(lines):
        parts = [f"Epoch {epoch + 1}/3"]
        for name in ("train/loss", "train/acc", "val/loss", "val/acc"):
            parts.append(f"{name} {curves[name][epoch][1]:.4f}")
        parts.append(f"{curves['images_per_second'][epoch][1]:,.0f} images/s")
        assert line.startswith("  ".join(parts))
        assert bool(re.search(r"  \d:\d\d:\d\d left$", line)) == (epoch < 2)
    path, best = RUN / "checkpoints/best.ckpt", max(value for _, value in curves["val/acc"])
    assert f"Best checkpoint: {path} (val/acc {best:.4f})\n" in digits_run.out
    assert f"Test it: python train.py test --ckpt {path}\n" in digits_run.out


def test_epochs_without_validation_show_none(run: Run, small: list[str]) -> None:
    options = ["--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=3"]
    lines = epoch_lines(run("fit", *small, *options).out)
    assert ["val/acc" in line for line in lines] == [False, True, False]


@pytest.mark.parametrize("epochs", [-1, 9])
def test_run_out_of_time_says_so_and_shows_no_time_left_at_its_end(
    run: Run, small: list[str], monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    ticks = itertools.count(step=0.1)  # a second is over in the second epoch
    timers = SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", timers)
    limits = [f"--trainer.max_epochs={epochs}", "--trainer.max_time=00:00:00:01"]
    outcome = run("fit", *small, *limits)
    assert outcome.code == 0, outcome.err
    first, second = epoch_lines(outcome.out)
    left = r"  \d:\d\d:\d\d left" if epochs > 0 else ""
    assert re.fullmatch(rf"Epoch 1(/9)?  train/loss .* images/s{left}", first)
    assert re.fullmatch(r"Epoch 2(/9)?  train/loss .* images/s", second)
    assert "The run was ended by trainer.max_time\nBest" in outcome.out


def test_time_left_follows_from_the_epochs_since_the_resume(
    cifar10: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    used = [clock, EpochSummary(), EpochCheckpoint("last")]
    fit(cifar10, *used, limit_val_batches=0)
    last = cifar10 / "checkpoints/last.ckpt"
    fit(cifar10, *used, limit_val_batches=0, ckpt=last, max_epochs=5)
    lines = [line.split("  ") for line in epoch_lines(capsys.readouterr().out)]
    epochs = ["Epoch 1/2", "Epoch 2/2", "Epoch 3/5", "Epoch 4/5", "Epoch 5/5"]
    assert [line[0] for line in lines] == epochs
    left = ["0:00:04 left", "50 images/s", "0:00:08 left", "0:00:04 left", "50 images/s"]
    assert [line[-1] for line in lines] == left


# Pictures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What each picture is made of, instead of the picture, and one that is added to the table."""
    drawn: dict[str, list[Any]] = {name: [] for name in ("image_grid", *FIGURES, "my_picture")}
    draw = {n: lambda *args, c=c: c.append(args) or Figure() for n, c in drawn.items()}
    monkeypatch.setattr(callbacks, "image_grid", draw.pop("image_grid"))
    for name, function in draw.items():
        monkeypatch.setitem(FIGURES, name, function)
    return drawn


def test_pictures_come_every_few_epochs_and_at_the_end(
    cifar10: Path, drawn: dict[str, list[Any]]
) -> None:
    batches: list[Tensor] = []
    used = [AtStart(1, batches.append), TensorBoardImages(2)]
    trainer: Any = fit(cifar10, *used, logger=TensorBoardLogger(cifar10, "", ""), max_epochs=5)
    data, accuracies = trainer.datamodule, dict(read_scalars(cifar10)["val/acc"])
    titles = [f"Validation after epoch {n}: accuracy {accuracies[n]:.2%}" for n in (2, 4, 5)]
    assert [title for _, title in drawn["my_picture"]] == titles
    assert all(calls == drawn["my_picture"] for name, calls in drawn.items() if name in FIGURES)
    for epoch, (predicted, _) in zip((2, 4, 5), drawn["my_picture"], strict=True):
        correct = predicted.probabilities.argmax(dim=1) == data.val_set.labels
        assert float(correct.sum()) / 50 == pytest.approx(accuracies[epoch])
        assert torch.equal(predicted.labels, data.val_set.labels)  # none of the sanity check's
        assert torch.equal(predicted.images, data.val_set.images)
    events = EventAccumulator(str(cifar10)).Reload()
    assert [image.step for image in events.Images("val/my picture")] == [2, 4, 5]
    ((images, captions, _),) = drawn["image_grid"]  # the first batch, as training sees it
    assert torch.equal(images, (batches[0][:40] * 255).round().byte())
    assert len(captions) == 40
