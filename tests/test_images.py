"""One's own images: any file that Pillow opens, and what `predict` says of it."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from lightning.pytorch import Trainer
from PIL import Image
from torchvision import transforms

from cifar_datamodule import CIFARDataModule
from images import image_files, read_image
from resnet_module import ResNetModule

ORIENTATION = 0x0112  # the EXIF tag


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_plain_and_grey_images_are_what_they_are(tmp_path: Path) -> None:
    for name, array in (("rgb.png", noise(40, 30)), ("grey.png", noise(40, 30, 1))):
        Image.fromarray(array).save(tmp_path / name)
        expected = array if array.ndim == 3 else np.stack([array] * 3, axis=2)
        assert np.array_equal(pixels(tmp_path / name), expected)


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray(noise(40, 30)).convert("P")
    image.save(tmp_path / "palette.gif")
    assert np.array_equal(pixels(tmp_path / "palette.gif"), image.convert("RGB"))


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    rgba = noise(40, 30, 4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(tmp_path / "rgba.png") - expected).max() <= 1

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixels(tmp_path / "palette.png").tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(
    ("kind", "ending"), [("uint16", "png"), ("uint16", "tiff"), ("int32", "tiff")]
)
def test_sixteen_bits_are_scaled(tmp_path: Path, kind: str, ending: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], kind)
    path = tmp_path / f"deep.{ending}"
    Image.fromarray(levels).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_a_range(tmp_path: Path) -> None:
    path = tmp_path / "float.tiff"
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 127, 255]


def test_images_stand_upright(tmp_path: Path) -> None:
    array = noise(40, 30)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was held so that the top is on the right
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), np.rot90(array, -1))


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_animations_show_their_first_frame(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / f"moving.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(path)[..., 0] > 250).all()
    assert (pixels(path)[..., 2] < 5).all()


def test_other_colour_spaces(tmp_path: Path) -> None:
    image = Image.fromarray(noise(40, 30)).convert("CMYK")
    image.save(tmp_path / "cmyk.tiff")
    assert np.array_equal(pixels(tmp_path / "cmyk.tiff"), image.convert("RGB"))
    Image.fromarray(noise(40, 30, 1) > 127).save(tmp_path / "bits.png")
    assert {*pixels(tmp_path / "bits.png").flatten()} == {0, 255}


def test_folders_are_walked_in_order_and_patterns_expanded(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "sub/c.png", ".hidden/d.png", ".e.png", "odd[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*names: str) -> list[str]:
        files, _ = image_files([str(tmp_path / name) for name in names])
        return [str(file.relative_to(tmp_path)) for file in files]

    assert found("") == ["a.png", "b.png", "odd[1].png", "sub/c.png"]
    assert found("*.png") == ["a.png", "b.png", "odd[1].png"]
    assert found("**/*.png") == ["a.png", "b.png", "odd[1].png", "sub/c.png"]
    assert found("b.png", "*.png") == ["b.png", "a.png", "odd[1].png"]
    assert found("odd[1].png") == ["odd[1].png"]
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    assert found("sub") == ["sub/c.png"]
    missing = image_files([str(tmp_path / "no.png"), str(tmp_path / "*.jpg")])
    assert missing[0] == []
    assert [line.split(": ")[1] for line in missing[1]] == ["there is no such file"] * 2


def test_predictions_are_those_of_the_network(run: Run, best: Path) -> None:
    """Other sizes are seen as the checkpoint's evaluation shows them: resized, here zoomed."""
    Image.fromarray(noise(64, 48)).save("cat.png")
    Image.fromarray(noise(32, 32)).save("dog.png")
    outcome = run(
        "predict", "--ckpt", str(best), "--images", "cat.png", "dog.png", "--output=o.csv"
    )
    assert outcome.code == 0, outcome.err
    module = ResNetModule.load_from_checkpoint(best).eval()
    to_square = transforms.Compose(
        [transforms.Resize(32), transforms.CenterCrop(32), transforms.Resize(40)]
    )
    images = [to_square(Image.open(name)) for name in ("cat.png", "dog.png")]
    batch = torch.stack([transforms.functional.to_tensor(image) for image in images])
    expected = module(batch).softmax(dim=1).sort(descending=True)
    with Path("o.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["cat.png", "dog.png"]
    for place, end in enumerate(("", "_2", "_3")):
        assert [int(row[f"class{end}"]) for row in rows] == expected.indices[:, place].tolist()
        shares = [float(row[f"probability{end}"]) for row in rows]
        assert shares == pytest.approx(expected.values[:, place].tolist(), abs=2e-3)
    for row in rows:
        probability = f"{float(row['probability']):.4f}"  # 0.222 in the table is 0.2220 on screen
        pattern = [row["file"], row["class"], probability, row["class_2"]]
        assert any(line.split()[:4] == pattern for line in outcome.out.splitlines())


def test_three_lines_of_python(run: Run, best: Path) -> None:
    Image.fromarray(noise(64, 48)).save("cat.png")
    module = ResNetModule.load_from_checkpoint(best)
    data = CIFARDataModule.load_from_checkpoint(best, images=["cat.png"])
    probabilities = torch.cat(Trainer(logger=False, accelerator="cpu").predict(module, data))
    run(
        "predict",
        "--ckpt",
        str(best),
        "--images=cat.png",
        "--output=o.json",
        "--trainer.precision=32",
    )
    row = json.loads(Path("o.json").read_text())[0]
    assert row["file"] == "cat.png"
    assert row["class"] == module.class_names[int(probabilities.argmax())]
    assert row["probability"] == pytest.approx(float(probabilities.max()), abs=1e-4)
    assert len(row["next"]) == 2


def test_what_is_no_image_has_its_own_line_and_the_rest_is_done(run: Run, best: Path) -> None:
    Path("in").mkdir()
    for index in range(3):
        Image.fromarray(noise(32, 32)).save(f"in/{index}.png")
    whole = Path("in/0.png").read_bytes()
    Path("in/cut.png").write_bytes(whole[: len(whole) // 2])
    Path("in/empty.jpg").touch()
    Path("in/notes.txt").write_text("no image")
    Image.fromarray(noise(200, 50)).save("in/wide.png")
    args = ["--images", "in", "nowhere.png", "--output", "o.csv"]
    outcome = run("predict", "--ckpt", str(best), *args)
    assert outcome.code == 1
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert [line.split()[1].rstrip(":") for line in errors] == [
        "nowhere.png", "in/cut.png", "in/empty.jpg", "in/notes.txt",
    ]  # fmt: skip
    assert "note: in/wide.png is 200 × 50 pixels: only the square in its middle" in outcome.err
    assert outcome.err.count("note: ") == 1
    assert "Traceback" not in outcome.err
    with Path("o.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert names == ["in/0.png", "in/1.png", "in/2.png", "in/wide.png"]


def test_nothing_to_predict_is_an_error(run: Run, best: Path) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("no image")
    for images in (["empty"], ["*.png"], ["notes.txt"]):
        outcome = run("predict", "--ckpt", str(best), "--output=o.csv", "--images", *images)
        assert outcome.code == 1
        assert f"error: there is nothing to predict in {images}" in outcome.err
        assert not Path("o.csv").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--images=a.png", "--output=o.txt"],
            "output is 'o.txt': its ending must be .csv or .json",
        ),
        (["--images=a.png", "--output=no/o.csv"], "output is 'no/o.csv': there is no folder 'no'"),
        (["--output=o.csv"], "output is 'o.csv', but there are no images: give --images"),
    ],
)
def test_outputs_are_checked_first(run: Run, best: Path, args: list[str], message: str) -> None:
    outcome = run("predict", "--ckpt", str(best), *args)
    assert outcome.code == 2
    assert outcome.err == f"error: {message}\n"


def test_images_of_a_network_whose_own_data_are_gone(run: Run) -> None:
    for part, count in (("train", 6), ("test", 2)):
        for name in ("[cat]", "dog"):
            Path(f"pets/{part}/{name}").mkdir(parents=True)
            for index in range(count):
                Image.fromarray(noise(33 + index, 40)).save(f"pets/{part}/{name}/{index}.png")
    tiny = ["--data.val_size=2", "--model.layers=[1,1,1]", "--model.width=4"]
    outcome = run("fit", "--data.dataset=pets", *tiny, "--trainer.max_epochs=1")
    assert outcome.code == 0, outcome.err
    Path("mine.png").write_bytes(Path("pets/test/dog/0.png").read_bytes())
    shutil.rmtree("pets")
    outcome = run("predict", "--images", "mine.png")
    assert outcome.code == 0, outcome.err
    assert "mine.png" in outcome.out
    assert "[cat]" in outcome.out  # and not taken for markup


def test_photos_of_folders_are_read_alike(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            exif = Image.Exif()
            exif[ORIENTATION] = 3
            Image.fromarray(noise(32, 32)).save(tmp_path / part / name / "0.png", exif=exif)
    os.environ["PL_GLOBAL_SEED"] = "0"
    data = CIFARDataModule(dataset=str(tmp_path), val_size=0, evaluation="native")
    data.setup("test")
    assert np.array_equal(data.test_set.images[0].permute(1, 2, 0), np.rot90(noise(32, 32), 2))
