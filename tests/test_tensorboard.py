"""TensorBoard as a user sees it: a run of the digits recipe, in a real browser.

It takes Chromium and `pip install -e ".[browser]"`. Screenshots go to the folder that
TENSORBOARD_SCREENSHOTS names, if it names one.
"""

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lightning_logs of two epochs of the digits recipe."""
    folder = tmp_path_factory.mktemp("run")
    recipe = ["--config", str(PROJECT / "recipes/digits.yaml"), "--trainer.max_epochs=2"]
    command = [sys.executable, str(PROJECT / "train.py"), "fit", *recipe]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder / "lightning_logs"


@pytest.fixture(scope="module")
def address(logs: Path) -> Iterator[str]:
    """Of TensorBoard, on a port that was free."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        said = next(line for line in server.stderr if "http://" in line)
        yield "http://" + said.split("http://")[1].split()[0]
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
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def look(page: Any, address: str, dashboard: str) -> None:
    page.goto("about:blank")
    page.goto(f"{address}/#{dashboard}")


def keep(page: Any, name: str) -> None:
    if folder := os.environ.get("TENSORBOARD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_scalars_and_pictures_are_rendered(page: Any, address: str) -> None:
    look(page, address, "timeseries")
    for tag in ("images_per_second", "train/acc", "val/loss", "val_class/7"):
        page.get_by_role("combobox", name="Filter tags").fill(
            tag
        )  # cards are only made when in sight
        page.locator("card-view", has_text=tag).locator("svg").first.wait_for()
    keep(page, "timeseries")
    look(page, address, "images")
    for tag in ("augmented batch", "val/confusion matrix", "val/mistakes"):
        page.get_by_text(tag, exact=True).first.wait_for()
    picture = page.locator("img[src*='individualImage']").first
    picture.wait_for()
    page.wait_for_function(
        "address => fetch(address).then(r => r.blob()).then(createImageBitmap)"
        ".then(picture => picture.width > 300)",
        arg=picture.get_attribute("src"),
    )
    assert picture.evaluate("e => e.complete && e.naturalWidth > 300 && e.clientWidth > 100")
    keep(page, "images")


def test_charts_compare_training_and_validation(page: Any, address: str) -> None:
    look(page, address, "custom_scalars")
    for title in ("loss", "accuracy", "of each class"):
        page.get_by_text(title, exact=True).first.wait_for()
    page.get_by_text("Matches (2)").first.wait_for()  # training and validation
    page.get_by_text("Matches (10)").first.wait_for()  # the classes
    keep(page, "custom_scalars")


def test_run_graph_and_options_are_shown(page: Any, address: str) -> None:
    look(page, address, "text")
    page.get_by_text("train.py fit --config").first.wait_for()
    page.get_by_text("max_epochs: 2").first.wait_for()
    keep(page, "text")
    look(page, address, "graphs")
    page.locator("text", has_text="ResNet").first.wait_for()
    keep(page, "graphs")
    look(page, address, "hparams")
    for column in ("optimizer", "hp/best_val/acc", "hp/best_epoch"):
        page.get_by_text(column).first.wait_for(state="attached")
    page.get_by_text("digits", exact=True).first.wait_for()
    keep(page, "hparams")


def test_no_request_fails(page: Any, address: str) -> None:
    """The event files can be read by TensorBoard's own server, too."""
    with urllib.request.urlopen(f"{address}/data/plugin/images/tags") as answer:
        assert b"val/mistakes" in answer.read()
