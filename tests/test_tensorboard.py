"""A run in TensorBoard: what is logged and drawn, and what a user sees in a real browser.

The browser takes Chromium and `pip install -e ".[browser]"`.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, DigitsRun, Run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cifar_datamodule import CIFARDataModule
from cifar_resnet.callbacks import CHARTS
from cifar_resnet.figures import FIGURES

RUN = Path("lightning_logs/version_0")


@pytest.fixture(scope="module")
def events(digits_run: DigitsRun) -> EventAccumulator:
    return EventAccumulator(str(digits_run.folder)).Reload()


def values(events: EventAccumulator, name: str) -> list[float]:
    return [point.value for point in events.Scalars(name)]


def hparams(events: EventAccumulator) -> dict[str, Any]:
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}


def test_scalars_stand_against_epochs(events: EventAccumulator) -> None:
    names = [name for name in events.Tags()["scalars"] if not name.startswith("hp/")]
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr", "images_per_second"} < {*names}
    for name in names:
        assert [point.step for point in events.Scalars(name)] == [1, 2, 3], name


def test_every_chart_has_its_curves(events: EventAccumulator) -> None:
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    for group in CHARTS.values():
        for name, (_, patterns) in group.items():
            for pattern in patterns:
                found = [tag for tag in events.Tags()["scalars"] if re.search(pattern, tag)]
                assert len(found) == (10 if name == "of each class" else 1)


def test_class_accuracies_make_up_the_accuracy(events: EventAccumulator) -> None:
    data = CIFARDataModule(dataset="digits", val_size=200)
    data.setup("validate")
    shares = data.val_set.labels.bincount() / 200
    recalls = torch.tensor([values(events, f"val_class/{name}") for name in data.class_names])
    assert (shares @ recalls).tolist() == pytest.approx(values(events, "val/acc"))


def test_pictures_graph_and_command_are_there(
    events: EventAccumulator, digits_run: DigitsRun
) -> None:
    steps = {
        name: [image.step for image in events.Images(name)] for name in events.Tags()["images"]
    }
    pictures = {f"val/{name.replace('_', ' ')}": [3] for name in FIGURES}
    assert steps == {"augmented batch": [0], **pictures}
    assert events.Tags()["graph"]
    assert Image.open(digits_run.folder / "curves.png").width > 500
    text = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "python train.py fit --data.dataset=digits" in text
    assert (digits_run.folder / "config.yaml").read_text().splitlines()[-1] in text


def test_hparams_hold_the_options_and_the_best_accuracy(events: EventAccumulator) -> None:
    expected = {"dataset": "digits", "batch_size": 50, "width": 4, "shortcut": "conv3x3"}
    expected |= {"optimizer/class_path": "torch.optim.Adam", "optimizer/init_args/lr": 1e-3}
    expected |= {"max_epochs": 3, "seed": 0, "effective_batch_size": 50}
    assert expected.items() <= hparams(events).items()
    assert values(events, "hp/best_val/acc") == [max(values(events, "val/acc"))]


def test_hparams_of_a_run_without_validation(run: Run, cifar10: Path) -> None:
    options = [f"--data.root={cifar10}", "--data.val_size=0", "--trainer.max_epochs=1", *TINY]
    assert run("fit", *options).code == 0
    events = EventAccumulator(str(RUN)).Reload()
    assert values(events, "hp/train/acc") == values(events, "train/acc")
    assert not events.Tags()["images"]  # 0 pictures, the default of these tests
    assert not (RUN / "curves.png").exists()


# In a browser


@pytest.fixture(scope="module")
def address(digits_run: DigitsRun) -> Iterator[str]:
    """Of TensorBoard, on a port that was free."""
    command = [sys.executable, "-m", "tensorboard.main", "--port=0"]
    command += ["--logdir", str(digits_run.folder.parent)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        line = next(line for line in server.stderr if "http://" in line)
        yield "http://" + line.split("http://")[1].split()[0]
        server.terminate()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    offline = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu", *offline],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000}, base_url=address)
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def open_dashboard(page: Any, name: str) -> None:
    page.goto("about:blank")
    page.goto(f"/#{name}")


@pytest.mark.slow
def test_browser_shows_curves_and_pictures(page: Any) -> None:
    open_dashboard(page, "timeseries")
    for tag in ("images_per_second", "train/acc", "val/loss", "val_class/7"):
        # Cards are only made when in sight.
        page.get_by_role("combobox", name="Filter tags").fill(tag)
        page.locator("card-view", has_text=tag).locator("svg").first.wait_for()
    open_dashboard(page, "custom_scalars")
    for title in ("loss", "accuracy", "of each class"):
        page.get_by_text(title, exact=True).first.wait_for()
    page.get_by_text("Matches (2)").first.wait_for()  # training and validation
    page.get_by_text("Matches (10)").first.wait_for()  # the classes
    open_dashboard(page, "images")
    for tag in ("augmented batch", "val/confusion matrix", "val/reliability"):
        page.get_by_text(tag, exact=True).first.wait_for()
    picture = page.locator("img[src*='individualImage']").first
    picture.wait_for()
    page.wait_for_function("e => e.naturalWidth > 300", arg=picture.element_handle())


@pytest.mark.slow
def test_browser_shows_command_graph_and_hparams(page: Any) -> None:
    open_dashboard(page, "text")
    page.get_by_text("train.py fit --data.dataset=digits").first.wait_for()
    page.get_by_text("max_epochs: 3").first.wait_for()
    open_dashboard(page, "graphs")
    page.locator("text", has_text="ResNet").first.wait_for()
    open_dashboard(page, "hparams")
    for column in ("optimizer", "hp/best_val/acc"):
        page.get_by_text(column).first.wait_for(state="attached")
    page.get_by_role("checkbox", name="dataset").click()  # at first it shows five columns
    page.get_by_text("digits", exact=True).first.wait_for()
