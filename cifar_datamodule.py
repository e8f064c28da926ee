"""The data: where images come from, how they are split, augmented and served.

All images lie in memory as one uint8 tensor and are served as whole batches. What is random in an
epoch (order, crops, flips) follows from the seed, the epoch and the image's position alone, so that
neither the number of workers nor the device changes a run.
"""

import hashlib
import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import CIFAR10, CIFAR100

from download import check_urls, find_fault, provide, way_out
from images import class_names, image_files, load_folder, read_square

Batch = tuple[Tensor, Tensor, Tensor]
Labelled = tuple[Tensor, Tensor]

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# Number of classes and of training images.
BUILT_IN = {"cifar10": (10, 50_000), "cifar100": (100, 50_000), "digits": (10, 1_437)}
PAD = 4  # pixels of zeros on each side, as in He et al. 2015
SPLIT_SEED = 0  # fixed: every run, whatever its seed, holds out the same images


class ImageBatches(Dataset[Batch]):
    """Images (N, 3, H, W) uint8 and labels (N,) int64 in memory, served as whole batches.

    A batch is (images, labels, positions), positions (int64) being those that were asked for.
    Images lie in memory pixel by pixel (channels_last), and so they do in a batch.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> None:
        """Moves the images and labels to `device`, from where batches are then served."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def __getitems__(self, positions: list[int]) -> Batch:
        index = torch.tensor(positions, device=self.images.device)
        # index_select copies images as they lie; self.images[index] would go byte by byte.
        images = self.images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
        return images, self.labels[index], index


class TrainingOrder(DistributedSampler[Batch]):
    """A new order for each epoch; an interrupted one goes on behind the images it has shown."""

    interrupted, seen = -1, 0  # an epoch, and the number of its images that are behind

    def __iter__(self) -> Iterator[Any]:
        if self.epoch != self.interrupted:
            return super().__iter__()
        alone: DistributedSampler[Batch] = DistributedSampler(self.dataset, 1, 0, seed=self.seed)
        alone.set_epoch(self.epoch)
        whole = list(alone)
        rest = whole[self.seen :]
        rest += whole[: -len(rest) % self.num_replicas]  # as many for each process
        return iter(rest[self.rank :: self.num_replicas])


class CIFARDataModule(LightningDataModule):
    """CIFAR-10, CIFAR-100, handwritten digits or one's own images, for a classifier.

    Batches reach the model as (images, labels): float32 (N, 3, H, W) in [0, 1] and int64 (N,).
    Training images are shuffled and augmented anew in each epoch. Validation and test images are
    neither, and each of them is counted exactly once.

    Args:
        root: Folder where the CIFAR archives lie, or are downloaded to.
        dataset: `cifar10`, `cifar100`, `digits` (1,797 handwritten digits that come with
            scikit-learn: nothing to download) or the path of a folder of one's own images,
            sorted into `train/<class>/` and `test/<class>/`.
        batch_size: Training images per batch, in each process; 1 to 1,000,000.
        eval_batch_size: Validation and test images per batch, in each process; 1 to 1,000,000.
            Without one 1,000 on a GPU, and 100 on a CPU, whose caches hold no more.
        val_size: Training images held out for validation, the same share of each class and the
            same images for every seed. 0 trains on all images and validates on none.
        image_size: Side of the images in pixels, 32 to 1,024. Images of another size are resized
            (shorter side) and cropped at the centre when they are loaded.
        augmentation: What a training image goes through: `zoom` enlarges it by a quarter and
            crops at random (32 → 40 → 32), `pad` puts 4 pixels of zeros around it and crops at
            random, `none` leaves it as it is.
        flip: Mirror training images left to right, each with probability 1/2.
        cutout: Side, in pixels, of a square of the training images' mean colour that hides a part
            of each training image, 0 to `image_size`. Its centre is anywhere in the image, so that
            some of it may lie outside (DeVries and Taylor 2017). 0 hides nothing.
        evaluation: What validation and test show: the `native` image, the whole `zoom`ed image,
            or the `crop` at the zoomed image's centre. `auto` shows objects at the scale of the
            training: `zoom` where the augmentation is zoom, else `native`.
        num_workers: Processes that load batches, 0 to 256. From memory 0, the main process, is
            fast.
        seed: Decides the order and the augmentation of the training images, 0 to 2³² − 1. Without
            one it is that of Lightning's `seed_everything`, or 0.
        images: What `predict` reads instead of the test images: files of any kind that Pillow
            opens, folders, and patterns such as `*.png`. No part of a checkpoint.
        urls: Mirrors of the CIFAR archive, tried in this order before its own address. What they
            send is held against the same checksum. No part of a checkpoint.

    Raises:
        ValueError: If an option is out of its range.
        MisconfigurationException: If a folder of one's own images has fewer than two classes.
    """

    class_names: list[str]
    checksum: str  # of the images and labels that were loaded last
    files: list[Path]  # that predict has read, one for each image
    remarks: list[str]  # on files whose middle says little about the whole
    unreadable: list[str]  # what is wrong with the other files, a sentence for each

    def __init__(
        self,
        root: str = "data",
        dataset: str = "cifar10",
        batch_size: int = 100,
        eval_batch_size: int | None = None,
        val_size: int = 5000,
        image_size: int = 32,
        augmentation: Literal["zoom", "pad", "none"] = "zoom",
        flip: bool = True,
        cutout: int = 0,
        evaluation: Literal["auto", "native", "zoom", "crop"] = "auto",
        num_workers: int = 0,
        seed: int | None = None,
        images: list[str] | None = None,
        urls: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images", "urls"])
        if evaluation == "auto":
            evaluation = "zoom" if augmentation == "zoom" else "native"
        self.root = root
        self.dataset = dataset
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.image_size = image_size
        self.augmentation = augmentation
        self.flip = flip
        self.cutout = cutout
        self.evaluation = evaluation
        self.num_workers = num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.images = images
        # With the seed in it, a checkpoint goes on in the same order wherever it is moved to.
        self.hparams["seed"] = self.seed
        self.urls = urls
        self._draws: tuple[int, Tensor, Tensor] | None = None  # epoch, draws and cutout's colour
        self._minibatches = 1
        self._shown = -1, 0  # the epoch, and how many of its images all processes have seen
        self._resumed = -1, 0  # that of the checkpoint which training goes on from
        self._check_options()

    def _check_options(self) -> None:
        for name, allowed in {
            "augmentation": ("zoom", "pad", "none"),
            "evaluation": ("auto", "native", "zoom", "crop"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {', '.join(allowed)}")
        for name, (least, most) in {
            "batch_size": (1, 1_000_000),
            "eval_batch_size": (1, 1_000_000),
            "val_size": (0, 1_000_000_000),
            "image_size": (32, 1024),
            "cutout": (0, self.image_size),
            "num_workers": (0, 256),
            "seed": (0, 2**32 - 1),
        }.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bound = f"{least} or more" if value < least else f"{most:,} at most"
                raise ValueError(f"{name} is {value}: it must be {bound}")
        if self.dataset in BUILT_IN:
            check_val_size(self.val_size, self.num_classes, BUILT_IN[self.dataset][1])
        elif self.images is None and not (Path(self.dataset) / "train").is_dir():
            raise ValueError(
                f"dataset is {self.dataset!r}: choose {', '.join(BUILT_IN)}, "
                "or a folder with images in train/<class>/ and test/<class>/"
            )
        elif self.images is None:
            class_names(Path(self.dataset))
        check_urls(self.urls or [])

    @property
    def num_classes(self) -> int:
        """Number of classes; for a folder of one's own, that of the folders in its `train/`."""
        if self.dataset in BUILT_IN:
            return BUILT_IN[self.dataset][0]
        return len(class_names(Path(self.dataset)))

    def prepare_data(self) -> None:
        """Downloads CIFAR into `root` and verifies its checksums, unless it is there already.

        Raises:
            OSError: In one sentence, if it is not there and cannot be put there.
        """
        if self.dataset in CIFAR and self.images is None:
            source = CIFAR[self.dataset]
            provide(source, Path(self.root).expanduser(), [*(self.urls or []), source.url])

    def setup(self, stage: str) -> None:
        """Loads into memory what `stage` (fit, validate, test or predict) needs."""
        if stage == "predict" and self.images is not None:
            images, labels = self._read(self.images)
            self.test_set = ImageBatches(self.evaluation_images(images), labels)
        elif stage in ("fit", "validate"):
            images, labels = self._load(train=True)
            train, val = split(labels, self.val_size, self.num_classes)
            self.val_set = ImageBatches(self.evaluation_images(images[val]), labels[val])
            if stage == "fit":
                images, labels = images[train], labels[train]
                self._draws, self._minibatches = None, 1
                self._shown = self._resumed = -1, 0  # until a checkpoint says otherwise
                self._statistics = channel_statistics(images)
                self.train_set = ImageBatches(self._canvas(images), labels)
        else:
            images, labels = self.native_test_set()
            self.test_set = ImageBatches(self.evaluation_images(images), labels)

    def native_test_set(self) -> Labelled:
        """The test images, native (N, 3, image_size, image_size) uint8, and labels (N,) int64."""
        return self._load(train=False)

    def _load(self, train: bool) -> Labelled:
        """Native images (N, 3, image_size, image_size) uint8 and labels; sets `class_names`."""
        if self.dataset == "digits":
            images, labels, self.class_names = load_digits(train)
        elif self.dataset in CIFAR:
            source = self._load_cifar(train)
            images = torch.from_numpy(source.data).permute(0, 3, 1, 2)
            labels = torch.tensor(source.targets)
            self.class_names = source.classes
        else:
            images, labels, self.class_names = load_folder(
                Path(self.dataset), train, self.image_size, self.num_workers
            )
        pixels = images.permute(0, 2, 3, 1).contiguous()
        content = [part.numpy().data for part in (pixels, labels)]
        self.checksum = f"sha256:{hashlib.sha256(b''.join(content)).hexdigest()}"
        return resize(images, self.image_size), labels

    def _load_cifar(self, train: bool) -> CIFAR10:
        """CIFAR as torchvision reads it, which unpickles files whose checksums are right only.

        Raises:
            MisconfigurationException: If they are not, or not any more.
        """
        source, root = CIFAR[self.dataset], Path(self.root).expanduser()
        try:
            return source(root, train=train)
        except (RuntimeError, OSError) as error:
            fault = find_fault(source, root) or error
            raise MisconfigurationException(
                f"{source.__name__} in {str(root)!r} cannot be read ({fault}): {way_out(source)}"
            ) from error

    def _read(self, names: Sequence[str]) -> Labelled:
        """Images (N, 3, image_size, image_size) uint8 from files; their labels are all -1.

        Raises:
            FileNotFoundError: If there is none.
        """
        files, missing = image_files(names)
        results = [read_square(file, self.image_size) for file in files]
        images = [image for image, _ in results if image is not None]
        seen = [
            (file, remark)
            for file, (image, remark) in zip(files, results, strict=True)
            if image is not None
        ]
        self.files = [file for file, _ in seen]
        self.remarks = [remark for _, remark in seen if remark]
        self.unreadable = missing + [fault for image, fault in results if image is None]
        if not images:
            reasons = "".join(f"; {reason}" for reason in self.unreadable)
            raise FileNotFoundError(f"there is nothing to predict in {list(names)}{reasons}")
        return torch.stack(images), torch.full((len(images),), -1)

    def channel_statistics(self) -> Labelled:
        """Mean and standard deviation (3,), float32, of the training images in [0, 1]."""
        return self._statistics

    def _canvas(self, images: Tensor) -> Tensor:
        """What training crops are taken from. Enlarged once, for resizing and flipping commute."""
        if self.augmentation == "zoom":
            return resize(images, zoomed(self.image_size))
        if self.augmentation == "pad":
            return F.pad(images, (PAD, PAD, PAD, PAD))
        return images

    def evaluation_images(self, images: Tensor) -> Tensor:
        """What validation and test show of native images (N, 3, H, W) uint8."""
        if self.evaluation == "native":
            return images
        images = resize(images, zoomed(self.image_size))
        if self.evaluation == "zoom":
            return images
        border = (zoomed(self.image_size) - self.image_size) // 2
        inside = slice(border, border + self.image_size)
        return images[:, :, inside, inside]

    def keep_on(self, device: torch.device, minibatches: int) -> None:
        """Moves the images of `fit` to `device`; training batches then come `minibatches` at once.

        They are the same images in the same order; after the next `setup` all is as it was.
        """
        self.train_set.to(device)
        self.val_set.to(device)
        self._minibatches = minibatches

    def train_dataloader(self) -> DataLoader[Batch]:
        # Lightning leaves this sampler alone and tells it the epoch, in any number of processes.
        sampler = TrainingOrder(self.train_set, *self._processes(), seed=self.seed)
        sampler.interrupted, sampler.seen = epoch, seen = self._resumed
        # Workers read ahead, before Lightning tells the sampler its first epoch.
        sampler.set_epoch(max(0, epoch if seen < len(self.train_set) else epoch + 1))
        return self._loader(self.train_set, self.batch_size * self._minibatches, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._evaluation_loader(self.val_set) if self.val_size else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """How far into its epoch training is: a checkpoint's."""
        epoch, seen = self._shown
        if self.trainer and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            seen = max(seen, len(self.train_set))  # fewer, where training batches are limited
        return {"epoch": epoch, "seen": seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Has training go on there, in any number of processes."""
        self._shown = self._resumed = state_dict["epoch"], state_dict["seen"]

    def batches_done(self) -> int | None:
        """Batches behind training that goes on in the middle of an epoch, None where it does not.

        They are counted as today's: with this batch size, in this number of processes.
        """
        left = len(self.train_set) - self._resumed[1]
        if self._resumed[0] < 0 or left <= 0:
            return None
        size = self.batch_size * self._minibatches
        return self._batches(len(self.train_set), size) - self._batches(left, size)

    def batches_per_epoch(self) -> int:
        """Training batches, each a step, that one process sees in a whole epoch of `fit`."""
        return self._batches(len(self.train_set), self.batch_size)

    def _batches(self, images: int, size: int) -> int:
        return math.ceil(math.ceil(images / self._processes()[0]) / size)

    def _evaluation_loader(self, data: ImageBatches) -> DataLoader[Batch]:
        # The plain DistributedSampler would repeat images to give every process as many.
        sampler = UnrepeatedDistributedSampler(data, *self._processes(), shuffle=False)
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        return self._loader(data, self.eval_batch_size or (100 if on_cpu else 1000), sampler)

    def _processes(self) -> tuple[int, int]:
        """Number of processes, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(
        self, data: ImageBatches, batch_size: int, sampler: DistributedSampler[Batch]
    ) -> DataLoader[Batch]:
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_signals_to_the_main_process,
            collate_fn=tuple,  # a batch is one already
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Labelled:
        """Augments training batches; makes images float32 in [0, 1]. On the device of the batch."""
        images, labels, positions = batch
        if self.trainer is not None and self.trainer.training:
            epoch = self.trainer.current_epoch
            seen = self._shown[1] if self._shown[0] == epoch else 0
            self._shown = epoch, seen + len(labels) * self.trainer.world_size
            images = self.augment(images, positions, epoch)
        return images / 255, labels

    def augment(self, canvases: Tensor, positions: Tensor, epoch: int) -> Tensor:
        """Crops, mirrors and cuts out of training images, each in its own way.

        Args:
            canvases: (N, 3, H, W) uint8, as `train_set` serves them.
            positions: (N,) int64, their positions in `train_set`.
            epoch: The epoch, from 0.

        Returns:
            (N, 3, image_size, image_size) uint8.
        """
        if self._draws is None or self._draws[0] != epoch:
            colour = (self._statistics[0] * 255).round().to(torch.uint8)
            self._draws = epoch, self.draw(epoch).to(canvases.device), colour.to(canvases.device)
        draws = self._draws[1][:, positions]
        images = flip_and_crop(canvases, self.image_size, draws[2].bool(), draws[0], draws[1])
        if not self.cutout:
            return images
        return cut_out(images, self.cutout, draws[3], draws[4], self._draws[2])

    def draw(self, epoch: int) -> Tensor:
        """Draws what an epoch does to each image.

        Returns:
            (3, N) int64, the rows being top, left and flip; with cutout (5, N), and the last two
            the row and the column of the square's centre.
        """
        rng = np.random.default_rng((self.seed, epoch))
        margin = self.train_set.images.shape[-1] - self.image_size
        count = len(self.train_set)
        corners = rng.integers(0, margin, size=(2, count), endpoint=True)
        flips = rng.integers(0, 1, size=(1, count), endpoint=True) * self.flip
        # The last, so that without it the others are the same.
        centres = rng.integers(0, self.image_size, size=(2 * bool(self.cutout), count))
        return torch.from_numpy(np.concatenate([corners, flips, centres]))


def leave_signals_to_the_main_process(worker: int) -> None:
    """Keeps a loader's worker at work when a terminal or SLURM sends a signal to all processes."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def flip_and_crop(images: Tensor, size: int, flip: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Mirrors the images whose `flip` is true, then crops each at its own place.

    Args:
        images: (N, C, H, W).
        size: Side of the crops.
        flip: (N,) bool.
        top: (N,) int64, the first row of each crop.
        left: (N,) int64, the first column of each crop, in the mirrored image where `flip` is true.

    Returns:
        (N, C, size, size), of the dtype of `images`.
    """
    pixels = images.permute(0, 2, 3, 1)  # so they lie in memory, if they are channels_last
    count, height, width, channels = pixels.shape
    each, row = torch.arange(count, device=images.device), torch.arange(size, device=images.device)
    # Mirroring the crop instead of the image moves less, once the corner is mirrored, too.
    left = torch.where(flip, width - size - left, left)
    start = ((each * height + top)[:, None] + row) * width + left[:, None]
    # Each row of a crop is one run of bytes, and so is each crop: index_select copies runs.
    runs = pixels.flatten().unfold(0, size * channels, channels)
    crops = runs.index_select(0, start.flatten()).view(count, size, size, channels)
    both = torch.cat([crops, crops.flip(2)])
    return both.index_select(0, each + count * flip).permute(0, 3, 1, 2)


def cut_out(images: Tensor, side: int, row: Tensor, column: Tensor, colour: Tensor) -> Tensor:
    """Hides a square of each image, or what of it lies in the image.

    Args:
        images: (N, C, H, W).
        side: Of the squares.
        row: (N,) int64, those of the squares' centres: of an even side, the one below the middle.
        column: (N,) int64, likewise.
        colour: (C,), of the dtype of `images`: what is there instead.

    Returns:
        (N, C, H, W), of the dtype of `images`.
    """

    def hidden(length: int, centre: Tensor) -> Tensor:
        behind = torch.arange(length, device=images.device) - (centre - side // 2)[:, None]
        return (behind >= 0) & (behind < side)

    height, width = images.shape[2:]
    squares = hidden(height, row)[:, None, :, None] & hidden(width, column)[:, None, None, :]
    return torch.where(squares, colour.view(-1, 1, 1), images)


def zoomed(size: int) -> int:
    """The side of an image enlarged by a quarter: 40 for 32."""
    return size * 5 // 4


def resize(images: Tensor, size: int) -> Tensor:
    """Resizes uint8 images (N, 3, H, W) to `size` × `size`: bilinear, antialiased, as PIL does."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def channel_statistics(images: Tensor) -> Labelled:
    """Mean and standard deviation (3,), float32, of uint8 images (N, 3, H, W) seen as [0, 1]."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(dim=1)
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()  # a constant channel has none


def check_val_size(val_size: int, num_classes: int, images: int) -> None:
    """Raises a ValueError unless training and validation can both have images of every class."""
    most = images - num_classes
    if val_size and not num_classes <= val_size <= most:
        raise ValueError(
            f"val_size is {val_size}: of {images} training images in {num_classes} classes "
            f"{num_classes} to {most} can be held out, or 0"
        )


def split(labels: Tensor, val_size: int, num_classes: int) -> Labelled:
    """Positions of the training and of the validation images, the same share of each class."""
    positions = np.arange(len(labels))
    if not val_size:
        return torch.from_numpy(positions), torch.empty(0, dtype=torch.int64)
    from sklearn.model_selection import train_test_split  # slow to import: only where needed

    try:
        check_val_size(val_size, num_classes, len(labels))
        train, val = train_test_split(
            positions, test_size=val_size, stratify=labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))


def load_digits(train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """scikit-learn's digits (8×8, 0 to 16) as 32×32 RGB, uint8: 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    images = resize(grey[:, None].expand(-1, 3, -1, -1).contiguous(), 32)
    labels = torch.from_numpy(digits.target)
    parts = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=SPLIT_SEED
    )
    part = torch.from_numpy(parts[0 if train else 1])
    return images[part], labels[part], [str(name) for name in digits.target_names]
