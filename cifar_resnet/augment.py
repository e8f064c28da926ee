"""What happens to images between memory and network: augmentation in training, zoom in evaluation.

Each augmentation is one small class: `draw` draws what is random for every image of an epoch,
`apply` uses it on a batch. `CIFARDataModule` lists those that a run uses.
"""

import zlib
from collections.abc import Sequence
from typing import Protocol

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
        rows, columns = self._covered(draws["row"]), self._covered(draws["column"])
        square = rows[:, None, :, None] & columns[:, None, None, :]
        self.colour = self.colour.to(images.device)
        return torch.where(square, self.colour, images)

    def _covered(self, centre: Tensor) -> Tensor:
        """(N, size) bool: which rows, or columns, the squares with these centres cover."""
        first = (centre - self.side // 2)[:, None]
        pixel = torch.arange(self.size, device=centre.device)
        return (pixel >= first) & (pixel < first + self.side)


class Augmenter:
    """Applies augmentations in order.

    What is random follows from the seed, the epoch and the image's position in the training set
    alone. Each augmentation has a random generator of its own, so that adding or removing one never
    changes the others.

    Args:
        augmentations: At most one of each class.
        count: Number of training images.
        seed: 0 or more.
    """

    def __init__(self, augmentations: Sequence[Augmentation], count: int, seed: int) -> None:
        self.augmentations = augmentations
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._draws: list[Draws] = []

    def draw(self, epoch: int) -> list[Draws]:
        """What the epoch, counted from 0, does to each training image, by augmentation."""
        names = [type(augmentation).__name__ for augmentation in self.augmentations]
        return [
            augmentation.draw(
                np.random.default_rng((self.seed, epoch, zlib.crc32(name.encode()))), self.count
            )
            for name, augmentation in zip(names, self.augmentations, strict=True)
        ]

    def __call__(self, images: Tensor, positions: Tensor, epoch: int) -> Tensor:
        """Augments the training images (N, C, H, W) uint8 with these positions (N,) int64."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._draws = [
                {name: value.to(images.device) for name, value in draws.items()}
                for draws in self.draw(epoch)
            ]
        for augmentation, draws in zip(self.augmentations, self._draws, strict=True):
            images = augmentation.apply(images, {n: value[positions] for n, value in draws.items()})
        return images


def pad_or_resize(images: Tensor, augmentation: str) -> Tensor:
    """What training crops are taken from: images (N, 3, H, H) uint8, zoomed, padded or unchanged.

    The whole training set is enlarged once, not each image in each epoch.
    """
    if augmentation == "none":
        return images
    if augmentation == "zoom":
        return resize(images, zoomed(images.shape[-1]))
    padding, mode = PADDINGS[augmentation]
    return F.pad(images, [padding] * 4, mode=mode)
