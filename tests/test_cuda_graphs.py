"""The fast path: what it trains is what plain training trains, and it knows where it cannot serve.

Without a GPU a stand-in takes the place of the CUDA graph: like one, it records without doing
anything, reads and writes where it did when it was recorded, and overwrites its output.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_DIGITS, Run
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim import SGD, Adam, RMSprop
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import cuda_graphs
from cifar_datamodule import CIFARDataModule
from cuda_graphs import CUDAGraphs
from interruptions import Interruptions
from resnet_module import ResNetModule

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "width": 4}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class StandIn:
    """What a CUDA graph can do, on the CPU."""

    recordings = 0

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.step = self.warm_up = step
        self.optimizer = step.__self__.optimizer  # type: ignore[attr-defined]

    def _addresses(self) -> list[int]:
        groups = self.optimizer.param_groups
        parameters = [value for group in groups for value in group["params"]]
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [value.data_ptr() for value in (*parameters, *state, *(g["lr"] for g in groups))]

    def record(self, images: Tensor, labels: Tensor) -> None:
        type(self).recordings += 1
        assert all(value.grad is None for g in self.optimizer.param_groups for value in g["params"])
        self.images, self.labels = images.clone(), labels.clone()
        self.logits = torch.empty(len(images), 10, dtype=images.dtype)
        self.addresses = self._addresses()

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        assert self._addresses() == self.addresses
        self.images.copy_(images)
        self.labels.copy_(labels)
        return self.logits.copy_(self.step(self.images, self.labels))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(cuda_graphs, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_graphs, "Recording", StandIn)
    monkeypatch.setattr(StandIn, "recordings", 0)
    return StandIn


def fit(
    data: CIFARDataModule,
    folder: Path,
    *callbacks: Callback,
    optimizer: Any = Adam,
    epochs: int = 3,
    ckpt_path: Path | None = None,
    accelerator: str = "cpu",
    model: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trainer, ResNetModule]:
    seed_everything(1)
    module = ResNetModule(optimizer=optimizer, **{**SMALL, **(model or {})})
    trainer = Trainer(
        **{"precision": "64-true", **options},
        accelerator=accelerator,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name=None, version=""),
        enable_checkpointing=any(isinstance(value, ModelCheckpoint) for value in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


def small_data(root: Path, **options: Any) -> CIFARDataModule:
    # 225 images: eleven mini-batches of 20 and one of 5.
    return CIFARDataModule(str(root), val_size=25, seed=0, batch_size=20, **options)


def assert_same(plain: tuple[Trainer, ResNetModule], fast: tuple[Trainer, ResNetModule]) -> None:
    """The same weights, step count, learning rates and log."""
    expected = plain[1].state_dict()
    for name, value in fast[1].state_dict().items():
        # A learning rate as a tensor is a float32, hence the tolerance.
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert fast[0].global_step == plain[0].global_step > 0
    logs = [
        [line.split(",") for line in Path(trainer.log_dir, "metrics.csv").read_text().split()]  # type: ignore[arg-type]
        for trainer, _ in (plain, fast)
    ]
    assert logs[0][0] == logs[1][0]
    for before, after in zip(logs[0][1:], logs[1][1:], strict=True):
        assert [x and float(x) for x in after] == pytest.approx([x and float(x) for x in before])


def each_step(optimizer: Any) -> StepLR:
    return StepLR(optimizer, 1, gamma=0.97)


def each_epoch(optimizer: Any) -> StepLR:
    return StepLR(optimizer, 1, gamma=0.5)


one_cycle = partial(OneCycleLR, max_lr=0.1, total_steps=None, cycle_momentum=False)


class StopIn(Callback):
    """Asks the run to stop after so many of the batches of its first epoch."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    # No hook of a step's: that would keep the run from the fast path.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = next(c for c in trainer.callbacks if isinstance(c, Interruptions))  # type: ignore[attr-defined]
        asked = trainer.fit_loop.epoch_loop.batch_progress
        run.asked = lambda _: asked.current.ready >= self.batches  # type: ignore[method-assign]


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 3)])
def test_an_interrupted_epoch_goes_on_on_either_path(
    run: Run, stand_in: type[StandIn], before: int, after: int
) -> None:
    """Chunks are saved as what they are made of: steps, and images that were shown."""
    # Seven steps: the rounding of a rate to float32 grows threefold with each of them.
    options = [*SMALL_DIGITS, "--trainer.precision=64-true", "--trainer.max_epochs=1"]
    options += ["--model.optimizer=SGD", "--model.optimizer.lr=0.01", "--data.batch_size=180"]
    assert run("fit", *options, "--cuda_graphs.steps=0").code == 0
    stop = "--trainer.callbacks=test_cuda_graphs.StopIn"
    number = f"--trainer.callbacks.batches={2 if before else 3}"
    stopped = run("fit", *options, f"--cuda_graphs.steps={before}", stop, number)
    assert stopped.code == 143, stopped.err
    last = "lightning_logs/version_{}/checkpoints/last.ckpt"
    content = torch.load(last.format(1))
    steps = 4 if before else 3
    assert content["global_step"] == steps
    assert content["CIFARDataModule"] == {"epoch": 0, "seen": 180 * steps}
    resumed = run("fit", "--ckpt=last", f"--cuda_graphs.steps={after}", "--trainer.callbacks=null")
    assert resumed.code == 0, resumed.err
    plain, ours = torch.load(last.format(0)), torch.load(last.format(1))
    assert ours["global_step"] == plain["global_step"]
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], value, rtol=1e-2, atol=2e-5)


def test_what_one_sees_of_a_run_does_not_slow_it_down(run: Run, stand_in: type[StandIn]) -> None:
    options = ["--trainer.enable_progress_bar=true", "--pictures.every_n_epochs=1"]
    options += ["--data.batch_size=50", "--trainer.max_epochs=2", "--trainer.precision=64-true"]
    outcome = run("fit", *SMALL_DIGITS, *options, "--cuda_graphs.steps=5")
    assert outcome.code == 0, outcome.err
    assert "step by step" not in outcome.out
    assert stand_in.recordings == 1
    events = EventAccumulator("lightning_logs/version_0").Reload()
    assert set(events.Tags()["images"]) > {"augmented batch", "val/mistakes"}
    assert [point.step for point in events.Scalars("images_per_second")] == [1, 2]
    assert "Epoch 2/2  train/loss" in outcome.out


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "interval"),
    [
        (lambda p: Adam(p, lr=1e-3), each_epoch, "epoch"),
        (lambda p: Adam(p, lr=1e-3), None, "epoch"),
        (lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True), each_step, "step"),
        (lambda p: SGD(p, lr=0.05, momentum=0.9), one_cycle, "step"),
    ],
)
def test_same_training(
    cifar10: Path,
    tmp_path: Path,
    stand_in: type[StandIn],
    optimizer: Any,
    scheduler: Any,
    interval: str,
) -> None:
    model = {"lr_scheduler": scheduler, "lr_interval": interval}
    plain = fit(small_data(cifar10), tmp_path / "plain", optimizer=optimizer, model=model)
    assert stand_in.recordings == 0
    # Chunks of 5, 5 and 2 mini-batches, the last of them too small to replay.
    fast = fit(
        small_data(cifar10), tmp_path / "fast", CUDAGraphs(5), optimizer=optimizer, model=model
    )
    assert_same(plain, fast)
    assert fast[0].num_training_batches == 3
    assert stand_in.recordings == 1
    assert fast[1].many_steps is None


def test_same_training_in_bf16(cifar10: Path, tmp_path: Path, stand_in: type[StandIn]) -> None:
    """Autocast must not go on with the weights that a chunk began with."""

    def sgd(params: Any) -> SGD:
        return SGD(params, lr=0.1)

    weights = [
        fit(
            small_data(cifar10),
            tmp_path / str(len(callbacks)),
            *callbacks,
            optimizer=sgd,
            epochs=1,
            precision="bf16-mixed",
        )[1].network.fc.weight
        for callbacks in ([], [CUDAGraphs(6)])
    ]
    assert stand_in.recordings == 1
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("fast_first", [True, False])
def test_either_path_goes_on_with_the_others_checkpoint(
    cifar10: Path, tmp_path: Path, stand_in: type[StandIn], fast_first: bool
) -> None:
    model = {"lr_scheduler": each_epoch}
    whole = fit(small_data(cifar10), tmp_path / "whole", epochs=3, model=model)
    first, second = ([CUDAGraphs(5)], []) if fast_first else ([], [CUDAGraphs(5)])
    last = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(small_data(cifar10), tmp_path / "1", *first, last, epochs=2, model=model)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    group = content["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] == pytest.approx(0.25e-3)
    assert isinstance(group["lr"], float)
    assert not group["capturable"]
    assert not group["fused"]
    resumed = fit(
        small_data(cifar10), tmp_path / "2", *second, ckpt_path=tmp_path / "last.ckpt", model=model
    )
    assert stand_in.recordings == 1
    for name, value in resumed[1].state_dict().items():
        torch.testing.assert_close(value, whole[1].state_dict()[name], rtol=1e-5, atol=1e-6)
    assert resumed[0].global_step == whole[0].global_step
    rate = resumed[0].optimizers[0].param_groups[0]["lr"]
    assert float(rate) == pytest.approx(1e-3 / 8)


def set_momentum(trainer: Trainer, module: ResNetModule) -> None:
    trainer.optimizers[0].param_groups[0]["momentum"] = 0.9 - 0.4 * (trainer.current_epoch == 2)


def set_rate(trainer: Trainer, module: ResNetModule) -> None:
    trainer.optimizers[0].param_groups[0]["lr"] = 0.1 ** (1 + trainer.current_epoch)


def unfreeze(trainer: Trainer, module: ResNetModule) -> None:
    module.network.fc.requires_grad_(trainer.current_epoch == 2)


@pytest.mark.parametrize(
    ("change", "recordings"), [(set_momentum, 2), (set_rate, 1), (unfreeze, 2)]
)
def test_what_changes_between_epochs_is_noticed(
    cifar10: Path, tmp_path: Path, stand_in: type[StandIn], change: Any, recordings: int
) -> None:
    class Change(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            change(trainer, pl_module)

    def optimizer(params: Any) -> SGD | Adam:
        return Adam(params) if change is unfreeze else SGD(params, lr=0.01, momentum=0.9)

    plain, fast = (
        fit(
            small_data(cifar10),
            tmp_path / str(len(graphs)),
            Change(),
            *graphs,
            optimizer=optimizer,
            model={"lr_scheduler": None},
        )
        for graphs in ([], [CUDAGraphs()])
    )
    assert_same(plain, fast)
    assert stand_in.recordings == recordings


def test_step_that_cannot_be_recorded_is_taken(
    cifar10: Path,
    tmp_path: Path,
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(stand_in, "record", refuse)
    plain = fit(small_data(cifar10), tmp_path / "plain")
    fast = fit(small_data(cifar10), tmp_path / "fast", CUDAGraphs(5))
    assert_same(plain, fast)
    assert "could not be recorded: operation not permitted" in capsys.readouterr().out


HOUR = timedelta(hours=1)


class AtEveryStep(Callback):
    def on_before_optimizer_step(self, *_: Any) -> None: ...


class OwnCheckpoint(ModelCheckpoint):
    def on_train_batch_start(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("accumulate gradients", {"accumulate_grad_batches": 2}),
        ("gradients are clipped", {"gradient_clip_val": 1.0}),
        ("training batches is limited", {"limit_train_batches": 1}),
        ("training batches is limited", {"limit_train_batches": 0.5}),
        ("number of steps is limited", {"max_steps": 3}),
        ("within an epoch", {"val_check_interval": 1}),
        ("anomalies", {"detect_anomaly": True}),
        ("several processes", {"strategy": "ddp"}),
        ("AtEveryStep may act", {"callback": AtEveryStep()}),
        ("WeightAveraging may act", {"callback": WeightAveraging()}),
        ("ModelCheckpoint may act", {"callback": ModelCheckpoint(every_n_train_steps=3)}),
        ("RMSprop is not one of", {"optimizer": RMSprop}),
        ("number of steps is limited", {"min_steps": 3}),
        ("ModelCheckpoint may", {"callback": ModelCheckpoint(train_time_interval=HOUR)}),
        ("ModelCheckpoint may", {"callback": ModelCheckpoint(save_on_exception=True)}),
        ("OwnCheckpoint may", {"callback": OwnCheckpoint()}),
        ("LearningRateMonitor may", {"callback": LearningRateMonitor()}),
        ("Timer may", {"max_time": {"hours": 1}}),
        ("is differentiable", {"optimizer": lambda p: Adam(p, differentiable=True), "fails": True}),
        (
            "does more at every step",
            {
                "model": {
                    "lr_scheduler": lambda o: ReduceLROnPlateau(o, "train/loss"),
                    "lr_interval": "step",
                },
                "fails": True,
            },
        ),
        (
            "does more at every step",
            {
                "model": {
                    "lr_scheduler": lambda o: OneCycleLR(o, 0.1, total_steps=99),
                    "lr_interval": "step",
                }
            },
        ),
        ("num_workers", {"data": {"num_workers": 1}}),
    ],
)
def test_plain_path_takes_over(
    cifar10: Path,
    tmp_path: Path,
    stand_in: type[StandIn],
    capsys: pytest.CaptureFixture[str],
    reason: str,
    options: dict[str, Any],
) -> None:
    options = dict(options)
    callbacks = [CUDAGraphs(), *filter(None, [options.pop("callback", None)])]
    data = CIFARDataModule(str(cifar10), val_size=25, **options.pop("data", {}))
    if options.pop("fails", False):  # in plain training, for a reason of its own
        with pytest.raises((RuntimeError, MisconfigurationException)):
            fit(data, tmp_path, *callbacks, epochs=1, **options)
    else:
        assert fit(data, tmp_path, *callbacks, epochs=1, **options)[0].global_step > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "CUDA graphs" in line]
    assert len(lines) == 1
    assert reason in lines[0]
    assert stand_in.recordings == 0


def test_without_a_gpu_nothing_is_said(
    cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(small_data(cifar10), tmp_path, CUDAGraphs(), epochs=1)
    assert "CUDA graphs" not in capsys.readouterr().out


def test_no_synchronisation_hides_in_a_step(cifar10: Path) -> None:
    """A tensor without values cannot be waited for: on it .item() and its like are errors."""
    data = small_data(cifar10)
    data.setup("fit")
    images, labels, positions = (
        value.to("meta") for value in data.train_set.__getitems__(list(range(20)))
    )
    module = ResNetModule(**SMALL).to("meta")
    module.trainer = Trainer(logger=False, accelerator="cpu")
    module.trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    data._draws = 0, data.draw(0).to("meta"), torch.zeros(3, dtype=torch.uint8, device="meta")
    crops = data.augment(images, positions, epoch=0) / 255
    loss = module.training_step((crops, labels), 0)
    assert isinstance(loss, Tensor)
    loss.backward()
    with pytest.raises(RuntimeError, match="item"):
        loss.item()


def test_no_python_runs_per_image(cifar10: Path) -> None:
    data = small_data(cifar10)
    data.setup("fit")

    def calls(count: int) -> int:
        number = 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal number
            number += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            images, _, positions = data.train_set.__getitems__(list(range(count)))
            data.augment(images, positions, epoch=0)
        finally:
            sys.setprofile(None)
        return number

    calls(10)  # draws the epoch's crops
    assert calls(200) == calls(10) > 0


@on_gpu
def test_same_training_on_the_gpu(
    cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision, tolerance in (("32-true", 1e-4), ("bf16-mixed", 1e-2)):
        options: dict[str, Any] = {
            "accelerator": "gpu",
            "devices": 1,
            "precision": precision,
            "optimizer": lambda params: SGD(params, lr=0.01, momentum=0.9),
            "epochs": 2,
        }
        plain = fit(small_data(cifar10), tmp_path / f"plain {precision}", **options)
        fast = fit(small_data(cifar10), tmp_path / f"fast {precision}", CUDAGraphs(5), **options)
        assert "without CUDA graphs" not in capsys.readouterr().out
        for name, value in fast[1].state_dict().items():
            torch.testing.assert_close(
                value.float(), plain[1].state_dict()[name].float(), rtol=tolerance, atol=tolerance
            )
        assert fast[0].global_step == plain[0].global_step
