"""What one sees of a run: its lines and its bar in the terminal, its pages in TensorBoard."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_DIGITS, DigitsRun, Run
from lightning.pytorch import Callback, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import callbacks
from cifar_datamodule import CIFARDataModule
from resnet_module import ResNetModule

DIGITS = CIFARDataModule(dataset="digits", val_size=200)


@pytest.fixture(scope="module")
def events(digits_run: DigitsRun) -> EventAccumulator:
    return EventAccumulator(str(digits_run.folder)).Reload()


def values(events: EventAccumulator, name: str) -> list[float]:
    return [point.value for point in events.Scalars(name)]


def test_scalars_stand_against_epochs(events: EventAccumulator) -> None:
    names = [name for name in events.Tags()["scalars"] if not name.startswith("hp/")]
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr", "images_per_second"} < {*names}
    for name in names:
        assert [point.step for point in events.Scalars(name)] == [1, 2, 3], name


def test_every_chart_has_its_curves(events: EventAccumulator) -> None:
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    charts = {name: chart for group in callbacks.CHARTS.values() for name, chart in group.items()}
    found = {
        name: [tag for tag in events.Tags()["scalars"] if any(re.search(p, tag) for p in patterns)]
        for name, (_, patterns) in charts.items()
    }
    assert sorted(found["loss"]) == ["train/loss", "val/loss"]
    assert sorted(found["accuracy"]) == ["train/acc", "val/acc"]
    assert len(found["of each class"]) == 10
    assert all(found.values())


def test_accuracy_of_the_classes_makes_up_that_of_all(events: EventAccumulator) -> None:
    DIGITS.setup("validate")
    shares = DIGITS.val_set.labels.bincount() / 200
    for epoch in range(3):
        recalls = torch.tensor([values(events, f"val_class/{c}")[epoch] for c in range(10)])
        assert float(recalls @ shares) == pytest.approx(values(events, "val/acc")[epoch])


def test_the_rate_that_matters_is_the_cycles(run: Run) -> None:
    """And what its line goes down to behind the last epoch, less than 0, is no reason to refuse."""
    cycle = ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.2"]
    cycle += [f"--model.lr_scheduler.{o}" for o in ("total_steps=10", "anneal_strategy=linear")]
    cycle += ["--trainer.max_epochs=10", "--trainer.limit_train_batches=1"]
    outcome = run("fit", *SMALL_DIGITS, *cycle)
    assert outcome.code == 0, outcome.err
    events = EventAccumulator("lightning_logs/version_0").Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["lr"].number_value == 0.2


def test_options_that_matter_stand_beside_the_best_accuracy(
    events: EventAccumulator, digits_run: DigitsRun
) -> None:
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["optimizer"].string_value.startswith("Adam(lr=0.001, ")
    assert told["lr_scheduler"].string_value == "StepLR(step_size=20, gamma=0.333333)"
    assert told["batch_size"].number_value == 50
    assert told["layers"].string_value == "(1, 1, 1)"
    assert told["epochs"].number_value == 3
    assert not {"root", "num_workers", "_instantiator", "images"} & set(told)
    best = torch.load(digits_run.best)
    assert values(events, "hp/best_epoch") == [best["epoch"] + 1]
    assert values(events, "hp/best_val/acc") == pytest.approx([max(values(events, "val/acc"))])


def test_command_and_configuration_are_a_page(
    events: EventAccumulator, digits_run: DigitsRun
) -> None:
    text = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "python train.py fit --data.dataset=digits" in text
    for line in (digits_run.folder / "config.yaml").read_text().splitlines()[1:]:
        assert line in text


def test_pictures_are_there(events: EventAccumulator, digits_run: DigitsRun) -> None:
    steps = {name: [i.step for i in events.Images(name)] for name in events.Tags()["images"]}
    # Drawing would take more than 1 % of so short a training: once, at the end, it is done anyway.
    assert steps == {"augmented batch": [0], "val/confusion matrix": [3], "val/mistakes": [3]}
    assert events.Tags()["graph"]
    assert Image.open(digits_run.folder / "curves.png").width > 500


def test_pictures_come_every_few_epochs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks.Pictures, "SHARE", 1e9)
    drawn: dict[int, Any] = {}

    def spy(counts: Any, names: Any, title: str) -> Any:
        drawn[int(re.findall(r"epoch (\d+)", title)[0])] = counts
        return original(counts, names, title)

    original = callbacks.confusion_figure
    monkeypatch.setattr(callbacks, "confusion_figure", spy)
    options = [*SMALL_DIGITS, "--trainer.max_epochs=5", "--pictures.every_n_epochs=2"]
    outcome = run("fit", *options)
    assert outcome.code == 0, outcome.err
    assert list(drawn) == [2, 4, 5]
    events = EventAccumulator("lightning_logs/version_0").Reload()
    accuracies = values(events, "val/acc")
    for epoch, counts in drawn.items():
        assert int(counts.sum()) == 200  # and none of the sanity check's
        assert float(counts.diag().sum()) / 200 == pytest.approx(accuracies[epoch - 1])


def test_augmented_batch_is_what_training_sees(tmp_path: Path) -> None:
    shown: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            shown.append(callbacks.augmented_batch(trainer)[0])

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, i: int
        ) -> None:
            seen.append(batch[0])

    data = CIFARDataModule(dataset="digits", val_size=200, batch_size=60)
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", callbacks=[Look()],
    )  # fmt: skip
    trainer.fit(ResNetModule(layers=(1, 1, 1), width=4), data)
    assert len(shown[0]) == callbacks.SHOWN
    assert torch.equal(shown[0] / 255, seen[0][: callbacks.SHOWN])


def test_images_per_second_are_those_of_training_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    # A clock that is read at the start and end of training, and after 1,000 s of validation.
    monkeypatch.setattr(callbacks, "now", lambda device: [0, 2, 1000, 1001][next(ticks) % 4])
    options = [*SMALL_DIGITS, "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0"]
    assert run("fit", *options).code == 0
    assert run("fit", *options, "--trainer.limit_train_batches=3").code == 0
    for version, images in enumerate((1437 - 200, 3 * 200)):
        events = EventAccumulator(f"lightning_logs/version_{version}").Reload()
        assert values(events, "images_per_second") == pytest.approx([images / 3])


def test_lines_say_what_the_epochs_came_to(digits_run: DigitsRun, events: EventAccumulator) -> None:
    lines = [line for line in digits_run.out.splitlines() if line.startswith("Epoch ")]
    for epoch, line in enumerate(lines):
        parts = [f"Epoch {epoch + 1}/3"]
        for name in ("train/loss", "train/acc", "val/loss", "val/acc"):
            parts.append(f"{name} {values(events, name)[epoch]:.4f}")
        parts.append(f"{values(events, 'images_per_second')[epoch]:,.0f} images/s")
        assert line.startswith("  ".join(parts))
        assert bool(re.search(r"  \d:\d\d:\d\d left$", line)) == (epoch < 2)
    assert len(lines) == 3
    assert "\r" not in digits_run.out  # no bar where there is no terminal


def test_summary_says_what_to_do_next(digits_run: DigitsRun, events: EventAccumulator) -> None:
    accuracy, epoch = max(values(events, "val/acc")), torch.load(digits_run.best)["epoch"] + 1
    assert re.search(
        rf"Trained for [\d.]+ min. Best checkpoint: lightning_logs/version_0/checkpoints/best.ckpt "
        rf"\(val/acc {accuracy:.4f}\), after epoch {epoch}. "
        r"Test it: python train.py test --ckpt lightning_logs/version_0/checkpoints/best.ckpt\n"
        r"See the run: tensorboard --logdir lightning_logs\n",
        digits_run.out,
    )


def test_a_terminal_has_a_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    options = ["--trainer.enable_progress_bar=true", "--trainer.max_epochs=2"]
    outcome = run("fit", *SMALL_DIGITS, "--data.batch_size=20", *options)
    assert outcome.code == 0, outcome.err
    bars = [part for part in outcome.out.split("\r") if "Epoch 2/2:" in part]
    for shown in ("images/s", "loss=", "train/acc=", "val/acc=", "left=0:00:"):
        assert any(shown in bar for bar in bars), shown
    assert any(re.search(r"1\.20k/1\.24k|1200/1240", bar) for bar in bars), bars[-1]
    assert re.search(r"Epoch 1/2  train/loss", outcome.out)
    assert re.search(r"Epoch 2/2  train/loss", outcome.out)


def test_epochs_without_validation_say_nothing_of_it(run: Run) -> None:
    options = ["--trainer.enable_progress_bar=true", "--trainer.check_val_every_n_epoch=2"]
    outcome = run("fit", *SMALL_DIGITS, *options, "--trainer.max_epochs=3")
    lines = [line for line in outcome.out.splitlines() if line.startswith("Epoch ")]
    assert ["val/acc" in line for line in lines] == [False, True, False]


def test_pictures_are_an_option(run: Run) -> None:
    outcome = run("fit", *SMALL_DIGITS, "--pictures.every_n_epochs=-1")
    assert outcome.code == 2
    assert "pictures.every_n_epochs is -1: it must be from 0 to" in outcome.err
    assert run("fit", *SMALL_DIGITS, "--trainer.max_steps=1").code == 0
    assert not EventAccumulator("lightning_logs/version_0").Reload().Tags()["images"]


def test_without_a_logger_nothing_is_drawn(run: Run) -> None:
    options = ["--trainer.logger=false", "--pictures.every_n_epochs=1", "--trainer.max_epochs=1"]
    outcome = run("fit", *SMALL_DIGITS, *options)
    assert outcome.code == 0, outcome.err
    assert not Path("lightning_logs").exists()
