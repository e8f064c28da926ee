"""Single images: found, read as Pillow and torchvision read them, refused if they cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise
from PIL import Image
from torchvision import transforms

from cifar_resnet.images import evaluation_view, image_files, read_image, read_square
from cifar_resnet.messages import UserError

ORIENTATION = 0x0112  # the EXIF tag


def test_square_is_that_of_torchvision(tmp_path: Path) -> None:
    square = [transforms.Resize(24), transforms.CenterCrop(24), transforms.PILToTensor()]
    for width, height in ((70, 31), (31, 70), (24, 24), (10, 13)):
        image = Image.fromarray(noise(width, height))
        image.save(tmp_path / "a.png")
        expected = transforms.Compose(square)(image)
        assert torch.equal(read_square(tmp_path / "a.png", 24), expected)


def pixels(image: Image.Image, path: Path, **options: Any) -> Any:
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_colours_are_converted(tmp_path: Path) -> None:
    rgba = noise(40, 30, 4)
    alpha = rgba[..., 3:] / 255
    on_white = pixels(Image.fromarray(rgba), tmp_path / "rgba.png")
    assert np.abs(on_white - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    for mode, name in (("P", "a.gif"), ("CMYK", "a.tiff"), ("L", "a.png"), ("1", "b.png")):
        image = Image.fromarray(noise(40, 30)).convert(mode)
        assert np.array_equal(pixels(image, tmp_path / name), image.convert("RGB"))


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bits_are_scaled(tmp_path: Path, name: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert pixels(Image.fromarray(levels), tmp_path / name)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    """Pillow would clip floats in [0, 1] to black."""
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="its pixels are floats"):
        read_image(tmp_path / "a.tiff")


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    rotated = pixels(Image.fromarray(noise(40, 30)), tmp_path / "a.png", exif=exif)
    assert np.array_equal(rotated, np.rot90(noise(40, 30), -1))


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    Image.fromarray(noise(40, 30)).save(tmp_path / "whole.png")
    for content in (b"", b"no image", (tmp_path / "whole.png").read_bytes()[:1000]):
        (tmp_path / "cat.png").write_bytes(content)
        with pytest.raises(UserError, match=r"cat.png is not an image that Pillow can read \(\w"):
            read_image(tmp_path / "cat.png")


def test_image_files_of_folders(tmp_path: Path) -> None:
    for name in ("d.png", "a.JPG", "c/b.gif", ".e.png", ".f/g.png", "c/.h/i.png", "j.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    def found(*names: str) -> list[str]:
        files = image_files(str(tmp_path / name) for name in names)
        return [str(file.relative_to(tmp_path)) for file in files]

    assert found("") == ["a.JPG", "c/b.gif", "d.png"]
    assert found("j.txt", "d.png", "", "c") == ["j.txt", "d.png", "a.JPG", "c/b.gif"]
    assert found(".e.png", ".f") == [".e.png", ".f/g.png"]
    for missing in ("no.png", "folder.png"):
        with pytest.raises(UserError, match=f"there is no image at '.*{missing}'"):
            found("d.png", missing)


@pytest.mark.parametrize("size", [28, 30, 32, 36])
def test_crop_is_the_centre_of_the_enlarged_image(size: int) -> None:
    images = torch.rand(2, 3, size, size)
    shown = evaluation_view(images, "crop")
    expected = transforms.functional.center_crop(evaluation_view(images, "zoom"), [size, size])
    assert shown.shape == images.shape
    assert torch.equal(shown, expected)
