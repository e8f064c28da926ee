"""One's own images: files, folders, and what is wrong with them.

No image is dropped unsaid, and what a file holds never ends in a traceback or a Python warning.
"""

import glob
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

FAR_OFF = 2.0  # ratio of an image's sides beyond which more is cut off than is seen
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its complaints go to stderr


class ImageFiles(Dataset[tuple[Tensor | None, str]]):
    """Image files as `read_square` gives them, read when they are asked for."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        return read_square(self.files[index], self.size)


def read_square(file: Path, size: int) -> tuple[Tensor | None, str]:
    """The square in the middle of an image, as (3, `size`, `size`) uint8, its shorter side resized.

    Beside it stands a remark in one line if that is little of the image, else nothing. Of what
    cannot be read there is no image, and the line says why.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of what it has put up with
            image = read_image(file)
            square = to_square(image, size)
    except Exception as error:  # of any kind: Pillow's readers raise what they please
        return None, f"{file} is no image that can be read{reason(error)}"
    if max(image.size) <= FAR_OFF * min(image.size):
        return square, ""
    shape = f"{image.width} × {image.height} pixels"
    return square, f"{file} is {shape}: only the square in its middle is seen"


def reason(error: Exception) -> str:
    """What an error of Pillow's adds to "no image that can be read", in one line."""
    if isinstance(error, UnidentifiedImageError):
        return ""
    strerror = error.strerror if isinstance(error, OSError) else None
    return f" ({' '.join((strerror or str(error) or type(error).__name__).split()).rstrip('.')})"


def to_square(image: Image.Image, size: int) -> Tensor:
    """The middle of an image, (3, `size`, `size`) uint8."""
    # Of a thread of pixels, the rest would be resized to gigabytes only to be cut off.
    most = min(image.size) * 100
    if max(image.size) > most:
        image = transforms.functional.center_crop(
            image, [min(image.height, most), min(image.width, most)]
        )
    shape = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    return transforms.Compose(shape)(image)


def read_image(path: str | Path) -> Image.Image:
    """The image in a file as one sees it, in RGB.

    Upright, where a camera has noted how it was held; the first frame of an animation; 16 bits
    rounded down to 8; on white, where it is transparent.

    Raises:
        Exception: Of any kind, if Pillow cannot read the file.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, np.float64)
        # What is deeper than 8 bits counts as 16 of them; floats within [0, 1] as that range.
        scale = (
            1 / 257 if levels.max() > 255 else 255 if image.mode == "F" and levels.max() <= 1 else 1
        )
        image = Image.fromarray((levels * scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_files(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that names, folders and patterns stand for, each once, and what stands for none.

    Folders are walked to the bottom, in the order of names; hidden files are left out, and so are
    folders that are links.
    """
    files: dict[Path, None] = {}
    missing: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [file.relative_to(path) for file in path.rglob("*") if is_file_or_lost(file)]
            visible = [f for f in inside if not any(part.startswith(".") for part in f.parts)]
            found = [path / file for file in sorted(visible)]
        else:
            found = (
                [path]
                if is_file_or_lost(path)
                else [Path(f) for f in sorted(glob.glob(name, recursive=True))]
            )
        files |= dict.fromkeys(found)
        if not found:
            missing.append(f"{name}: there is no such file" + (" in it" if path.is_dir() else ""))
    return list(files), missing


def is_file_or_lost(path: Path) -> bool:
    """Whether this is a file, or a link to one that is not there: to be named, not left out."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def class_names(folder: Path) -> list[str]:
    """The classes of one's own images, in order: the names of the folders in `folder`/train.

    Raises:
        MisconfigurationException: If there are fewer than two.
    """
    names = folders_in(folder / "train")
    if len(names) < 2:
        raise MisconfigurationException(
            f"{folder / 'train'} has {f'only the class {names[0]!r}' if names else 'no classes'}: "
            "a classifier needs two or more, each a folder with images"
        )
    return names


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in `folder`, in order; none where there is no such folder."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def load_folder(
    folder: Path, train: bool, size: int, num_workers: int
) -> tuple[Tensor, Tensor, list[str]]:
    """The images in `folder`/train or `folder`/test, each resized and cropped to `size` × `size`.

    Raises:
        MisconfigurationException: If there are fewer than two classes, train/ and test/ don't have
            the same, a class has no images, or a file cannot be read.
    """
    part, classes = folder / ("train" if train else "test"), class_names(folder)
    if (found := folders_in(part)) != classes:
        raise MisconfigurationException(
            f"{part} has the classes {found}, but {folder / 'train'} has {classes}: "
            "both must have the same"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files += (inside := sorted_files(part / name))
        labels += [label] * len(inside)
        if not inside:
            raise MisconfigurationException(
                f"{part / name} has no images: put some into it, "
                f"or remove the class {name!r} from train/ and test/"
            )
    return load_files(files, part, size, num_workers), torch.tensor(labels), classes


def load_files(files: Sequence[Path], part: Path, size: int, num_workers: int) -> Tensor:
    """Images (N, 3, `size`, `size`) uint8, one for each file, or an error that names the first."""
    data = ImageFiles(files, size)
    loader = DataLoader(data, batch_size=256, num_workers=num_workers, collate_fn=stack)
    images, faults = zip(*loader, strict=True)
    if unreadable := [fault for batch in faults for fault in batch]:
        more = len(unreadable) - 1
        end = f", nor are {more} more files in {part}: replace or remove them"
        raise MisconfigurationException(unreadable[0] + (end if more else ": replace or remove it"))
    return torch.cat(images)


def stack(results: list[tuple[Tensor | None, str]]) -> tuple[Tensor, list[str]]:
    """The images that could be read, as one tensor, and what is wrong with the others.

    A worker hands that over as it is, whereas an error would come with the worker's traceback.
    """
    images = [image for image, _ in results if image is not None]
    faults = [fault for image, fault in results if image is None]
    return torch.stack(images) if images else torch.empty(0), faults


def sorted_files(folder: Path) -> list[Path]:
    """The image files in a folder and below it, in torchvision's order.

    Links to other folders are followed, but each real folder is seen once, and none that lies
    above: a link that leads there would bring the other classes' images into this one.
    """
    kinds = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = [p for p in files_below(folder, set(), frozenset()) if p.suffix.lower() in kinds]
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def files_below(folder: Path, seen: set[Path], above: frozenset[Path]) -> Iterator[Path]:
    """The files in `folder` and below it, but in no folder that is `seen` or lies `above`."""
    real = folder.resolve()
    if real in seen or real in above:
        return
    seen.add(real)
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path, seen, above | {real, *real.parents})
        elif is_file_or_lost(path):
            yield path
