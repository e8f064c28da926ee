"""Random changes of training images and labels.

Each augmentation is one small class: `draw` draws what is random for every image of an epoch,
`apply` uses it on a batch, and so does `apply_to_labels`, if there is one. `CIFARDataModule` lists
those that a run uses.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_resnet.images import resize, zoomed

Draws = dict[str, Tensor]
# Pixels on each side, and what they show: zeros as in He et al. 2015, the mirrored image as in
# airbench (Jordan 2024, arXiv:2404.00498).
PADDINGS = {"pad": (4, "constant"), "reflect": (2, "reflect")}


class Augmentation(Protocol):
    """A random change of training images."""

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        """Draws for `count` images; each value has shape (count,)."""
        ...

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Changes uint8 images (N, C, H, W) by draws of shape (N,)."""
        ...


@runtime_checkable
class ChangesLabels(Protocol):
    """The further method of an augmentation that mixes the images of a batch."""

    def apply_to_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        """Turns labels (N,) int64 into shares of the classes (N, C), float32, by the same draws."""
        ...


class RandomCrop:
    """Crops a square of `size` pixels at random from larger images.

    Args:
        margin: How many pixels the images are larger than `size`.
        size: Side of the crops.
    """

    def __init__(self, margin: int, size: int) -> None:
        self.margin = margin
        self.size = size

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        corners = rng.integers(0, self.margin, size=(2, count), endpoint=True)
        return {"top": torch.from_numpy(corners[0]), "left": torch.from_numpy(corners[1])}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        pixels = images.permute(0, 2, 3, 1).contiguous()  # no copy where they are channels_last
        count, height, width, channels = pixels.shape
        number = torch.arange(count, device=images.device)
        row = torch.arange(self.size, device=images.device)
        start = ((number * height + draws["top"])[:, None] + row) * width + draws["left"][:, None]
        # Each row of a crop is one run of bytes, which index_select copies whole: twice as fast as
        # indexing in four dimensions.
        runs = pixels.flatten().unfold(0, self.size * channels, channels)
        crops = runs.index_select(0, start.flatten())
        return crops.view(count, self.size, self.size, channels).permute(0, 3, 1, 2)


class RandomFlip:
    """Mirrors each image left to right with probability 1/2."""

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        return {"flip": torch.from_numpy(rng.random(count) < 0.5)}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        return torch.where(draws["flip"][:, None, None, None], images.flip(3), images)


class Cutout:
    """Hides a square of each image (DeVries and Taylor 2017, arXiv:1708.04552).

    The square's centre is anywhere in the image, so that part of it may lie outside.

    Args:
        side: Of the square, in pixels.
        size: Side of the images, in pixels.
        colour: (C,) uint8: what replaces the square.
    """

    def __init__(self, side: int, size: int, colour: Tensor) -> None:
        self.side = side
        self.size = size
        self.colour = colour.view(-1, 1, 1)

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        centres = rng.integers(0, self.size, size=(2, count))
        return {"row": torch.from_numpy(centres[0]), "column": torch.from_numpy(centres[1])}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        square = squares(draws["row"], draws["column"], self.side, self.size)
        self.colour = self.colour.to(images.device)
        return torch.where(square, self.colour, images)


class MixUp:
    """Blends each image with another, and their labels alike (Zhang et al. 2017, arXiv:1710.09412).

    The other one is the image before it in the batch; for the first, the last. As in torchvision's
    v2.MixUp a whole batch has one share: the one that was drawn for its first image.

    Args:
        alpha: An image's own share follows Beta(alpha, alpha).
        num_classes: Number of classes.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        self.alpha = alpha
        self.num_classes = num_classes

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        return {"share": torch.from_numpy(rng.beta(self.alpha, self.alpha, count)).float()}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        return blend(images, draws["share"][0]).round().to(torch.uint8)

    def apply_to_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        return blend(F.one_hot(labels, self.num_classes), draws["share"][0])


class CutMix:
    """Puts a rectangle of another image into each image (Yun et al. 2019, arXiv:1905.04899).

    Their labels are blended by area. The other image and the draws are those of `MixUp`. The
    rectangle is a square whose centre is anywhere in the image, without the parts that lie outside.

    Args:
        alpha: The share of an image that a whole square leaves of it follows Beta(alpha, alpha).
        size: Side of the images, in pixels.
        num_classes: Number of classes.
    """

    def __init__(self, alpha: float, size: int, num_classes: int) -> None:
        self.alpha = alpha
        self.size = size
        self.num_classes = num_classes

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        kept = torch.from_numpy(rng.beta(self.alpha, self.alpha, count)).float()
        centres = torch.from_numpy(rng.integers(0, self.size, size=(2, count)))
        return {"kept": kept, "row": centres[0], "column": centres[1]}

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        return torch.where(self._square(draws), images.roll(1, 0), images)

    def apply_to_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        share = 1 - self._square(draws).float().mean()
        return blend(F.one_hot(labels, self.num_classes), share)

    def _square(self, draws: Draws) -> Tensor:
        """(1, 1, size, size) bool: the pixels that are another image's."""
        kept, row, column = (draws[name][:1] for name in ("kept", "row", "column"))
        half = ((1 - kept).sqrt() * self.size / 2).long()
        return squares(row, column, 2 * half, self.size)


class Augmenter:
    """Applies augmentations in order.

    What is random follows from the seed, the epoch and the image's position in the training set;
    which images are mixed, also from the batch. Each augmentation has a random generator of its
    own, so that adding or removing one never changes the others.

    Args:
        augmentations: At most one of each class.
        count: Number of training images.
        seed: 0 or more.
        mix_epochs: Number of epochs after which those that change labels are left out.
    """

    def __init__(
        self,
        augmentations: Sequence[Augmentation],
        count: int,
        seed: int,
        mix_epochs: float = math.inf,
    ) -> None:
        self.augmentations = augmentations
        self.count = count
        self.seed = seed
        self.mix_epochs = mix_epochs
        self._epoch = -1
        self._draws: list[Draws] = []

    def draw(self, epoch: int) -> list[Draws]:
        """What the epoch, counted from 0, does to each training image, by augmentation."""
        draws = []
        for augmentation in self.augmentations:
            name = zlib.crc32(type(augmentation).__name__.encode())
            rng = np.random.default_rng((self.seed, epoch, name))
            draws.append(augmentation.draw(rng, self.count))
        return draws

    def __call__(
        self, images: Tensor, labels: Tensor, positions: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Augments a batch of training images.

        Args:
            images: (N, C, H, W) uint8.
            labels: (N,) int64.
            positions: (N,) int64, of the images in the training set.
            epoch: 0 or more.

        Returns:
            Images (N, C, H, W) uint8 and labels: (N,) int64 or, if mixed, (N, classes) float32.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self._draws = [
                {name: value.to(images.device) for name, value in draws.items()}
                for draws in self.draw(epoch)
            ]
        for augmentation, draws in zip(self.augmentations, self._draws, strict=True):
            mixes = isinstance(augmentation, ChangesLabels)
            if mixes and epoch >= self.mix_epochs:
                continue
            drawn = {name: value[positions] for name, value in draws.items()}
            images = augmentation.apply(images, drawn)
            if isinstance(augmentation, ChangesLabels):
                labels = augmentation.apply_to_labels(labels, drawn)
        return images, labels


def squares(row: Tensor, column: Tensor, side: int | Tensor, size: int) -> Tensor:
    """(N, 1, size, size) bool: the pixels that a square in each image covers.

    Args:
        row: Of the squares' centres, (N,) int64.
        column: Likewise.
        side: Of the squares, one for all or (N,) int64.
        size: Side of the images.
    """
    pixel = torch.arange(size, device=row.device)
    rows, columns = (
        (pixel >= first[:, None]) & (pixel < (first + side)[:, None])
        for first in (row - side // 2, column - side // 2)
    )
    return rows[:, None, :, None] & columns[:, None, None, :]


def blend(batch: Tensor, share: Tensor) -> Tensor:
    """Blends each element of a batch (N, ...) with the one before it: `share` () of itself."""
    return batch * share + batch.roll(1, 0) * (1 - share)


def dominant_labels(labels: Tensor) -> Tensor:
    """The class with the largest share in mixed labels (N, C); other labels (N,) unchanged."""
    return labels.argmax(dim=1) if labels.is_floating_point() else labels


def pad_or_resize(images: Tensor, augmentation: str) -> Tensor:
    """Images (N, 3, H, H) uint8 as crops are taken from them: zoomed, padded or unchanged.

    The whole training set is enlarged once, not each image in each epoch.
    """
    if augmentation == "none":
        return images
    if augmentation == "zoom":
        return resize(images, zoomed(images.shape[-1]))
    padding, mode = PADDINGS[augmentation]
    return F.pad(images, [padding] * 4, mode=mode)
