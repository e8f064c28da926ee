"""One image: found, read, made square, resized; and what evaluation shows of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import center_crop

from cifar_resnet.messages import UserError

Evaluation = Literal["native", "zoom", "crop"]


def is_image(path: Path) -> bool:
    """Whether Pillow opens files with this extension, and no part of the path is hidden."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in Image.OPEN and not any(part.startswith(".") for part in path.parts)


def image_files(names: Iterable[str]) -> list[Path]:
    """The files with these names and the images in the folders with these names, each once.

    Of a folder: at every level, sorted, without hidden files and folders.

    Raises:
        UserError: If a name is neither of a file nor of a folder with images.
    """
    files: dict[Path, None] = {}
    for path in map(Path, names):
        below = (f for f in path.rglob("*") if f.is_file() and is_image(f.relative_to(path)))
        found = [path] if path.is_file() else sorted(below)
        if not found:
            raise UserError(f"there is no image at {str(path)!r}")
        files |= dict.fromkeys(found)
    return list(files)


def read_image(path: str | Path) -> Image.Image:
    """Reads an image as RGB.

    Uses the first frame; applies EXIF rotation; puts transparency on white; scales 16-bit
    greyscale to 8 bits.

    Raises:
        UserError: If Pillow cannot read the file.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("its pixels are floats, whose range is not known")
            if image.mode.startswith("I"):  # up to 65,535, which Pillow would clip at 255
                levels = np.asarray(image) // 257
                image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # of any kind: each of Pillow's readers has its own
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is not an image that Pillow can read ({reason}): replace or remove it"
        ) from error


def read_square(path: str | Path, size: int) -> Tensor:
    """Reads an image as (3, size, size) uint8: resizes its shorter side, crops its centre.

    Raises:
        UserError: If Pillow cannot read the file.
    """
    square = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )
    return square(read_image(path))


def zoomed(size: int) -> int:
    """The side of an image enlarged by a quarter: 40 for 32."""
    return size * 5 // 4


def resize(images: Tensor, size: int) -> Tensor:
    """Resizes uint8 images (N, 3, H, W) to `size` × `size`: bilinear, antialiased, as PIL does."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def evaluation_view(images: Tensor, evaluation: Evaluation) -> Tensor:
    """What the network is shown in evaluation.

    Args:
        images: (N, 3, H, H) float in [0, 1].
        evaluation: `native`: as they are; `zoom`: enlarged by a quarter; `crop`: the H × H pixels
            at the centre of the enlarged image.

    Returns:
        (N, 3, H, H), or (N, 3, 5/4 H, 5/4 H) for `zoom`, float.
    """
    if evaluation == "native":
        return images
    size = images.shape[-1]
    enlarged = F.interpolate(images, zoomed(size), mode="bilinear")
    return enlarged if evaluation == "zoom" else center_crop(enlarged, [size, size])
