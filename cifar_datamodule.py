"""The data: which images train, validate and test, how they are augmented and served.

All images lie in memory as one uint8 tensor and are served as whole batches. What is random in an
epoch (order, crops, flips, mixing) follows from the seed and the epoch alone, so that every run can
be repeated.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cifar_resnet.augment import (
    Augmentation,
    Augmenter,
    CutMix,
    Cutout,
    MixUp,
    RandomCrop,
    RandomFlip,
    pad_or_resize,
)
from cifar_resnet.checkpoint import known_options
from cifar_resnet.datasets import (
    DatasetName,
    HasValidation,
    ImageSource,
    LabelledImages,
    find_dataset,
)
from cifar_resnet.images import Evaluation, evaluation_view, resize
from cifar_resnet.messages import UserError

Batch = tuple[Tensor, Tensor, Tensor]
SPLIT_SEED = 0  # fixed: every run, whatever its seed, holds out the same images
SEED_DISTANCE = 1_000_003  # more than any run has epochs


class InMemoryDataset(Dataset[Batch]):
    """Images (N, 3, H, W) uint8 and labels (N,) int64 in memory, served as whole batches.

    A batch is (images, labels, positions), positions (int64) being those that were asked for.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: list[int]) -> Batch:
        index = torch.tensor(positions)
        # Images lie in memory pixel by pixel, and index_select copies each of them whole; indexing
        # the images as they are would go byte by byte.
        images = self.images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
        return images, self.labels[index], index


class CIFARDataModule(LightningDataModule):
    """CIFAR-10, other small data sets or one's own images, for a classifier.

    With a Trainer, batches reach the model as (images, labels): float32 (N, 3, H, W) in [0, 1] and
    int64 (N,), or float32 (N, num_classes) where training images are mixed. Training images are
    shuffled and augmented anew in each epoch. Validation and test images are neither, and each of
    them is counted exactly once, in any number of processes.

    Args:
        root: Folder where downloaded data lie.
        dataset: One of the names (`digits` come with scikit-learn, without a download), or the path
            of a folder of one's own images, sorted into `train/<class>/` and `test/<class>/`, and
            into `val/<class>/` if it has validation images of its own.
        batch_size: Training images per batch, in each process.
        eval_batch_size: Validation and test images per batch, in each process. By default 1,000
            on a GPU, or fewer if they are larger than 32×32, and 100 on a CPU, whose caches hold
            no more.
        val_size: Training images held out for validation, the same share of each class and the
            same images for every seed. 0 trains on all training images and validates on none. Any
            other number has no effect if the data set has validation images of its own.
        image_size: Side of the images in pixels. Images of another size are resized (shorter side)
            and cropped at the centre when they are loaded.
        augmentation: What a training image goes through: `zoom` enlarges it by a quarter and
            crops at random (32 → 40 → 32), `pad` puts 4 pixels of zeros around it and crops at
            random, `reflect` does so with 2 pixels of its mirror image, `none` leaves it as it is.
        flip: Mirror training images left to right, each with probability 1/2.
        cutout: Side, in pixels, of a square of the training images' mean colour that hides a part
            of each training image (DeVries and Taylor 2017). 0 hides nothing.
        mixup: Blend each training image, and its label, with another one (Zhang et al. 2017):
            alpha, as of Beta(alpha, alpha), which the shares follow. 0 blends nothing.
        cutmix: Put a rectangle of another image into each training image, and blend their labels
            by area (Yun et al. 2019): alpha, as of Beta(alpha, alpha). 0 leaves it out. It cannot
            be combined with `mixup`.
        mix_until: Share of the run after which `mixup` and `cutmix` are off: with 0.9 the last
            tenth of the Trainer's `max_epochs` goes without, rounded to whole epochs.
        evaluation: What validation and test show: the `native` image, the whole `zoom`ed image,
            or the `crop` at the zoomed image's centre. `auto` shows objects at the scale of the
            training: `zoom` where the augmentation is zoom, else `native`.
        seed: Decides the order and the augmentation of the training images.
        urls: Addresses of the data set's files, tried before the known ones. What they send is
            checked against the same checksum. Not saved in checkpoints.
    """

    class_names: list[str]
    channel_statistics: tuple[Tensor, Tensor]  # mean and std (3,) of training images in [0, 1]
    checksum: str  # of the images and labels loaded last: training and validation, or test

    def __init__(
        self,
        root: str = "data",
        dataset: DatasetName = "cifar10",
        batch_size: PositiveInt = 100,
        eval_batch_size: PositiveInt | None = None,
        val_size: NonNegativeInt = 5000,
        image_size: PositiveInt = 32,
        augmentation: Literal["zoom", "pad", "reflect", "none"] = "zoom",
        flip: bool = True,
        cutout: NonNegativeInt = 0,
        mixup: NonNegativeFloat = 0.0,
        cutmix: NonNegativeFloat = 0.0,
        mix_until: ClosedUnitInterval = 1.0,
        evaluation: Literal["auto", "native", "zoom", "crop"] = "auto",
        seed: NonNegativeInt = 0,
        urls: list[str] | None = None,
    ) -> None:
        super().__init__()
        if mixup and cutmix:
            raise UserError(f"data.mixup is {mixup} and data.cutmix {cutmix}: give one of them")
        root, dataset = str(root), str(dataset)  # a checkpoint with a Path is not plain data
        self.save_hyperparameters(ignore=["urls"], logger=False)
        self.root = Path(root).expanduser()
        self.urls = urls or []

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set.

        Raises:
            UserError: If there is no such data set.
        """
        return self._dataset.num_classes

    @property
    def evaluation(self) -> Evaluation:
        """What validation and test show."""
        if self.hparams["evaluation"] != "auto":
            return self.hparams["evaluation"]
        return "zoom" if self.hparams["augmentation"] == "zoom" else "native"

    @property
    def _dataset(self) -> ImageSource:
        return find_dataset(self.hparams["dataset"], self.hparams["image_size"])

    def prepare_data(self) -> None:
        """Downloads the data into `root` and verifies it, unless it is there already.

        Raises:
            UserError: If it is not there, and no address has it.
        """
        self._dataset.prepare(self.root, self.urls)

    def setup(self, stage: str) -> None:
        """Loads into memory what `stage` (fit, validate or test) needs."""
        if stage == "test":
            data = self._record_and_resize(self._dataset.load(self.root, train=False))
            self.test_set = InMemoryDataset(data.images, data.labels)
            return
        data, train, val = self._load_and_split()
        self.val_set = InMemoryDataset(data.images[val], data.labels[val])
        if stage == "fit":
            images = data.images[train]
            self.channel_statistics = mean_and_std(images)
            canvases = pad_or_resize(images, self.hparams["augmentation"])
            self.train_set = InMemoryDataset(canvases, data.labels[train])
            self.augment = Augmenter(
                self._augmentations(), len(train), self.hparams["seed"], self._mix_epochs()
            )

    def _load_and_split(self) -> tuple[LabelledImages, Tensor, Tensor]:
        """All images but the test's, and the positions of those that train and that validate."""
        dataset, val_size = self._dataset, self.hparams["val_size"]
        data = dataset.load(self.root, train=True)
        own = None
        if val_size and isinstance(dataset, HasValidation):
            own = dataset.load_val(self.root)
        if own is None:
            return self._record_and_resize(data), *split(data.labels, val_size)
        rank_zero_info(
            f"{self.hparams['dataset']} has {len(own.labels):,} validation images of its own: "
            "data.val_size has no effect"
        )
        images = torch.cat([data.images, own.images])
        labels = torch.cat([data.labels, own.labels])
        train, val = torch.arange(len(labels)).split([len(data.labels), len(own.labels)])
        data = LabelledImages(images, labels, data.class_names)
        return self._record_and_resize(data), train, val

    def _record_and_resize(self, data: LabelledImages) -> LabelledImages:
        """Keeps the classes and the checksum of what was loaded; resizes the images."""
        self.class_names = data.class_names
        content = hashlib.sha256()
        for part in (data.images.permute(0, 2, 3, 1), data.labels):
            content.update(part.flatten().numpy().data)
        self.checksum = f"sha256:{content.hexdigest()}"
        images = resize(data.images, self.hparams["image_size"])
        return LabelledImages(images, data.labels, data.class_names)

    def _augmentations(self) -> list[Augmentation]:
        """What each training image goes through, in this order."""
        size, side = self.hparams["image_size"], self.hparams["cutout"]
        augmentations: list[Augmentation] = []
        if self.hparams["augmentation"] != "none":
            margin = self.train_set.images.shape[-1] - size
            augmentations.append(RandomCrop(margin, size))
        if self.hparams["flip"]:
            augmentations.append(RandomFlip())
        if side:
            colour = (self.channel_statistics[0] * 255).round().to(torch.uint8)
            augmentations.append(Cutout(side, size, colour))
        if self.hparams["mixup"]:
            augmentations.append(MixUp(self.hparams["mixup"], len(self.class_names)))
        if self.hparams["cutmix"]:
            augmentations.append(CutMix(self.hparams["cutmix"], size, len(self.class_names)))
        return augmentations

    def _mix_epochs(self) -> float:
        """Number of epochs in which batches are mixed."""
        until = self.hparams["mix_until"]
        if until == 1:
            return float("inf")
        epochs = self.trainer.max_epochs if self.trainer else None
        if epochs in (None, -1):
            raise UserError(
                f"data.mix_until is {until}, but the run has no end: give --trainer.max_epochs"
            )
        return round(until * epochs)

    def train_dataloader(self) -> DataLoader[Batch]:
        # Lightning leaves this sampler alone and tells it the epoch, in any number of processes. It
        # shuffles by seed + epoch: seed 1 would repeat the orders of seed 0, an epoch earlier.
        sampler: DistributedSampler[Batch] = DistributedSampler(
            self.train_set, *self._processes(), seed=self.hparams["seed"] * SEED_DISTANCE
        )
        return self._loader(self.train_set, self.hparams["batch_size"], sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._evaluation_loader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(self.test_set)

    def _evaluation_loader(self, data: InMemoryDataset) -> DataLoader[Batch]:
        # The plain DistributedSampler would repeat images to give every process as many.
        sampler = UnrepeatedDistributedSampler(data, *self._processes(), shuffle=False)
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        side = max(32, self.hparams["image_size"])
        default = 100 if on_cpu else max(1, 1000 * 32**2 // side**2)
        batch_size = self.hparams["eval_batch_size"] or default
        return self._loader(data, batch_size, sampler)

    def _processes(self) -> tuple[int, int]:
        """Number of processes, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(
        self, data: InMemoryDataset, batch_size: int, sampler: DistributedSampler[Batch]
    ) -> DataLoader[Batch]:
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=tuple,  # the data set serves whole batches: there is nothing to collate
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(
        self, batch: Batch | Tensor, dataloader_idx: int
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Augments training images, zooms others; on the device. Returns float32 in [0, 1]."""
        if isinstance(batch, Tensor):
            return batch  # the module's example_input_array
        images, labels, positions = batch
        if self.trainer is not None and self.trainer.training:
            epoch = self.trainer.current_epoch
            images, labels = self.augment(images, labels, positions, epoch)
            return images / 255, labels
        return evaluation_view(images / 255, self.evaluation), labels

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "CIFARDataModule":
        """The data that a network was trained on, from what `read_checkpoint` returns."""
        return cls(**known_options(checkpoint["datamodule_hyper_parameters"], cls))


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,), float32, of uint8 images (N, 3, H, W) seen as [0, 1]."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(dim=1)
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()  # a constant channel has none


def split(labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
    """Positions of the training and of the validation images, the same share of each class.

    Raises:
        UserError: If there is no such split.
    """
    positions = np.arange(len(labels))
    if not val_size:
        return torch.from_numpy(positions), torch.empty(0, dtype=torch.int64)
    from sklearn.model_selection import train_test_split  # slow to import: only where needed

    try:
        train, val = train_test_split(
            positions, test_size=val_size, stratify=labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise UserError(
            f"data.val_size is {val_size}, of {len(labels)} training images: {error}"
        ) from error
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))
