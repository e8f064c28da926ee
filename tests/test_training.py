"""Training against a plain PyTorch loop, and what a checkpoint remembers."""

import copy
import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUIET
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from cifar_datamodule import SEED_DISTANCE, CIFARDataModule
from cifar_resnet.callbacks import CycleLengthCheck
from cifar_resnet.checkpoint import read_checkpoint
from cifar_resnet.images import evaluation_view
from cifar_resnet.messages import UserError
from resnet_module import ResNet, ResNetModule

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "width": 4}
GIVEN: dict[str, Any] = {"input_mean": (0.1, 0.2, 0.3), "input_std": (0.4, 0.5, 0.6)}


def fit(module: ResNetModule, data: Any, folder: Path, epochs: int = 2, **options: Any) -> Trainer:
    logger = CSVLogger(folder, name=None, version="")
    defaults = {**QUIET, "logger": logger, "log_every_n_steps": 1}
    trainer = Trainer(max_epochs=epochs, callbacks=[CycleLengthCheck()], **(defaults | options))
    trainer.fit(module, data)
    return trainer


def history(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def small_data(root: Path, **options: Any) -> CIFARDataModule:
    return CIFARDataModule(root, val_size=50, batch_size=64, eval_batch_size=32, seed=1, **options)


def own_data(names: str) -> Any:
    """Two images of each class, of a module that has nothing but class names beside them."""
    images = TensorDataset(torch.rand(20, 3, 32, 32), torch.arange(20) % 10)
    data: Any = LightningDataModule.from_datasets(images, images, batch_size=10)
    data.class_names = [*np.array(list(names))]
    return data


def test_training_equals_a_plain_loop(cifar10: Path, tmp_path: Path) -> None:
    """Weights, learning rates, losses and accuracies, in training mode and in eval mode."""
    seed_everything(1)
    data = small_data(cifar10)
    module = ResNetModule(lr_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.1), **SMALL)
    network = ResNet(**SMALL)
    network.load_state_dict(module.network.state_dict())
    # In float64, for Adam makes much of the smallest difference between two orders of summation.
    fit(module, data, tmp_path, epochs=3, precision="64-true")

    network.double()
    mean, std = (value.view(3, 1, 1).double() for value in data.channel_statistics)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    names = ("train/loss", "train/acc", "val/loss", "val/acc")
    expected: dict[str, list[float]] = {name: [] for name in names}
    for epoch in range(3):
        rng = torch.Generator().manual_seed(SEED_DISTANCE + epoch)  # the seed is 1
        order = torch.randperm(200, generator=rng)
        losses, hits = torch.zeros(()), 0
        network.train()
        for positions in order.split(64):
            images, labels, _ = data.train_set.__getitems__(positions.tolist())
            images, labels = data.augment(images, labels, positions, epoch)
            images = (images / 255).double()
            logits = network((images - mean) / std)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.detach() * len(labels)
            hits += int((logits.argmax(1) == labels).sum())
        expected["train/loss"].append(float(losses) / 200)
        expected["train/acc"].append(hits / 200)
        network.eval()
        with torch.no_grad():
            shown = evaluation_view(data.val_set.images / 255, "zoom")
            logits = network((shown.double() - mean) / std)
        expected["val/loss"].append(float(F.cross_entropy(logits, data.val_set.labels)))
        accuracy = (logits.argmax(1) == data.val_set.labels).float().mean()
        expected["val/acc"].append(float(accuracy))
        for group in optimizer.param_groups:
            group["lr"] *= 0.1

    for name, value in network.state_dict().items():
        torch.testing.assert_close(module.network.state_dict()[name], value)
    for name, values in expected.items():
        assert history(tmp_path, name) == pytest.approx(values, rel=1e-4), name
    assert history(tmp_path, "lr") == pytest.approx([1e-3, 1e-4, 1e-5])


def test_labels_are_smoothed_in_training_only() -> None:
    """Against the formula: a tenth of the label is spread over all ten classes."""
    module = ResNetModule(label_smoothing=0.1, **SMALL)
    logits, labels = torch.randn(5, 10), torch.tensor([0, 3, 9, 3, 1])
    targets = 0.9 * F.one_hot(labels, 10) + 0.1 / 10
    expected = -(targets * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(module.train().losses(logits, labels), expected)
    plain = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(module.eval().losses(logits, labels), plain)
    torch.testing.assert_close(ResNetModule(**SMALL).train().losses(logits, labels), plain)


def test_defaults_are_adam_and_a_third_every_20_epochs() -> None:
    config: Any = ResNetModule(**SMALL).configure_optimizers()
    optimizer, scheduler = config["optimizer"], config["lr_scheduler"]["scheduler"]
    assert type(optimizer) is torch.optim.Adam
    rates = []
    for _ in range(80):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3 / 3 ** (epoch // 20) for epoch in range(80)])


def test_any_scheduler_serves(cifar10: Path, tmp_path: Path) -> None:
    def optimizer(params: Any) -> SGD:
        return SGD(params, lr=0.5)

    def train(name: str, epochs: int = 2, **options: Any) -> list[float]:
        module = ResNetModule(optimizer=optimizer, **options, **SMALL)
        fit(module, small_data(cifar10), tmp_path / name, epochs)
        return history(tmp_path / name, "lr")

    assert train("none", lr_scheduler=None) == [0.5, 0.5]
    # Four steps of 64, 64, 64 and 8 images make an epoch.
    each_step = train("step", lr_scheduler=lambda o: StepLR(o, 1, gamma=0.5), lr_interval="step")
    assert each_step == [0.5, 0.5 / 2**4]


def test_plateau_steps_when_its_metric_is_new(cifar10: Path, tmp_path: Path) -> None:
    """Of every second epoch; the second validation's loss is the first that is not better."""
    module = ResNetModule(
        optimizer=lambda params: SGD(params, lr=0.5),
        lr_scheduler=lambda o: ReduceLROnPlateau(
            o, "val/loss", patience=0, threshold=1e9, threshold_mode="abs"
        ),
        **SMALL,
    )
    fit(module, small_data(cifar10), tmp_path, epochs=7, check_val_every_n_epoch=2)
    expected = [0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.005]
    assert history(tmp_path, "lr") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("interval", "options"),
    [
        ("epoch", {}),
        ("step", {}),
        ("step", {"accumulate_grad_batches": 3}),
        ("step", {"limit_train_batches": 0.5}),
        ("step", {"max_steps": 5}),
        ("step", {"overfit_batches": 1}),
        ("step", {"epochs": -1, "max_steps": 5}),  # a run without epochs
    ],
)
def test_open_cycle_takes_the_whole_run(
    cifar10: Path, tmp_path: Path, interval: Any, options: dict[str, Any]
) -> None:
    cycle = partial(OneCycleLR, max_lr=0.1, total_steps=None, cycle_momentum=False)
    module = ResNetModule(lr_scheduler=cycle, lr_interval=interval, **SMALL)
    trainer = fit(module, small_data(cifar10), tmp_path, **{"epochs": 3} | options)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, OneCycleLR)
    assert scheduler.total_steps == (3 if interval == "epoch" else trainer.global_step)


def test_checkpoint_is_plain_and_complete(cifar10: Path, tmp_path: Path) -> None:
    data = small_data(cifar10)
    module = ResNetModule(
        optimizer=lambda params: SGD(params, lr=0.1), preactivation=True, shortcut="pad", **SMALL
    )
    fit(module, data, tmp_path).save_checkpoint(tmp_path / "model.ckpt")

    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert content["class_names"] == [f"class {i}" for i in range(10)]
    assert content["datamodule_hyper_parameters"]["root"] == str(cifar10)

    loaded = ResNetModule.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert loaded.class_names == content["class_names"]
    assert loaded.network.preactivation
    torch.testing.assert_close(loaded.mean.flatten(), data.channel_statistics[0])
    images = torch.rand(2, 3, 40, 40)
    scaled = (images - loaded.mean) / loaded.std
    torch.testing.assert_close(loaded(images), module.eval().network(scaled))
    assert CIFARDataModule.load_from_checkpoint(tmp_path / "model.ckpt").hparams["batch_size"] == 64


def test_checkpoint_of_ones_own_data_can_be_read(tmp_path: Path) -> None:
    own = own_data("abcdefghij")
    for data in (own, own.train_dataloader()):
        module = ResNetModule(input_mean=(0.5, 0.5, 0.5), input_std=(0.2, 0.2, 0.2), **SMALL)
        fit(module, data, tmp_path, epochs=1).save_checkpoint(tmp_path / "model.ckpt")
        checkpoint = read_checkpoint(tmp_path / "model.ckpt")
        assert CIFARDataModule.from_checkpoint(checkpoint).evaluation == "native"
        names = ResNetModule.from_checkpoint(checkpoint).class_names
        assert names == list("abcdefghij" if data is own else "0123456789")


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"normalize": False}, (0, 0, 0), (1, 1, 1)),
        (GIVEN, *GIVEN.values()),
    ],
)
def test_scaling_that_is_not_the_datas(
    cifar10: Path, tmp_path: Path, options: dict[str, Any], mean: Any, std: Any
) -> None:
    module = ResNetModule(**options, **SMALL)
    fit(module, small_data(cifar10), tmp_path, epochs=1)
    images = torch.rand(2, 3, 32, 32)
    scaled = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(module.eval()(images), module.network(scaled))


def test_python_tests_any_loader(tmp_path: Path) -> None:
    images, labels = torch.rand(25, 3, 32, 32), torch.arange(25) % 10
    loader = DataLoader(TensorDataset(images, labels), batch_size=10)
    module = ResNetModule(**SMALL)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False)
    with torch.no_grad():
        probabilities = module.eval()(images).softmax(1)
    (measured,) = trainer.test(module, loader, verbose=False)
    assert measured == {
        "test/loss": pytest.approx(float(F.nll_loss(probabilities.log(), labels)), rel=1e-5),
        "test/acc": pytest.approx(float((probabilities.argmax(1) == labels).float().mean())),
    }


def test_summary_is_of_the_runs_images(cifar10: Path, tmp_path: Path) -> None:
    module = ResNetModule(**SMALL)
    fit(module, small_data(cifar10, image_size=40), tmp_path, epochs=1)
    summary = ModelSummary(module)
    sizes = dict(zip(summary.layer_names, summary.in_sizes, strict=True))
    assert sizes["network"] == [1, 3, 40, 40]


@pytest.mark.parametrize("way", ["fit", "validate"])
def test_data_of_other_classes_are_refused(tmp_path: Path, way: str) -> None:
    path, options = tmp_path / "model.ckpt", {"normalize": False, **SMALL}
    trainer = fit(ResNetModule(**options), own_data("abcdefghij"), tmp_path, epochs=1)
    trainer.save_checkpoint(path)
    trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, logger=False)
    run = {"fit": trainer.fit, "validate": trainer.validate}[way]
    with pytest.raises(UserError, match=r"trained on the classes .*'i', 'j'.* has .*'j', 'i'"):
        run(ResNetModule(**options), own_data("abcdefghji"), ckpt_path=path)
    module = ResNetModule(**options)
    run(module, own_data("abcdefghij"), ckpt_path=path)
    assert module.class_names == list("abcdefghij")


@pytest.mark.slow  # starts a compiler
def test_compiled_network_computes_the_same() -> None:
    torch.manual_seed(0)
    eager = ResNetModule(**SMALL).double()
    compiled = copy.deepcopy(eager)
    compiled.network.compile(mode="default")
    images, labels = torch.rand(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 3])
    for module in (eager, compiled):
        module.losses(module(images), labels).mean().backward()
    pairs = zip(eager.named_parameters(), compiled.named_parameters(), strict=True)
    for (name, expected), (compiled_name, value) in pairs:
        assert compiled_name == name  # checkpoints load with and without
        torch.testing.assert_close(value.grad, expected.grad)


def test_evaluation_is_not_compiled(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    compile_module, trained = torch.nn.Module.compile, list[bool]()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        trained.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **_: compile_module(self, backend=backend)
    )
    module, data = ResNetModule(compile="default", **SMALL), small_data(cifar10)
    fit(module, data, tmp_path, epochs=1).test(module, data, verbose=False)
    assert set(trained) == {True}


def test_only_fit_compiles(cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode, dynamic: modes.append((mode, dynamic))
    )

    def start(*args: Any) -> None:
        assert not modes  # until all callbacks have begun, of which one counts FLOPs

    monkeypatch.setattr(CycleLengthCheck, "on_fit_start", start)
    module = ResNetModule(compile="reduce-overhead", **SMALL)
    trainer = fit(module, small_data(cifar10), tmp_path, epochs=1)
    assert modes == [("reduce-overhead", False)]
    trainer.test(module, small_data(cifar10), verbose=False)
    assert len(modes) == 1
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ResNetModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.compile_mode is None
