"""Four ways to train the default network on CIFAR-10 at batch 100: what `speed.py` compares.

    A  the note's script: each image transformed by torchvision in the main process, float32
    B  Lightning as it is usually written: the same transforms in DataLoader workers, loss and
       accuracy logged at every step, the Trainer's defaults, one device
    C  this project's `python train.py fit`
    D  a bare loop: this project's network, data path and precision without Lightning

`python benchmarks/sides.py C --data.root data` runs one of them. For each line that it reads it
trains for a turn of some batches, then prints its figures. All 50,000 images train, none validate.
Where CIFAR-10 is not in --data.root, random images take its place.
"""

import argparse
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import CIFAR10

import train
from cifar_datamodule import CIFARDataModule
from cifar_resnet import datasets
from resnet_module import ResNet, ResNetModule

BATCH_SIZE = 100
FIGURES = "figures: "
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = train.native_precision("auto") == "bf16-mixed"


class Noise(CIFAR10):  # type: ignore[misc]
    """Random images of CIFAR-10's number and shape."""

    def __init__(self, root: str, train: bool = True, transform: Any = None) -> None:
        self.transform, self.target_transform = transform, None
        rng, count = np.random.default_rng(int(train)), 50_000 if train else 10_000
        self.data = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = rng.integers(0, 10, count).tolist()
        self.classes = [str(label) for label in range(10)]


class NoiseDataset(datasets.CIFAR):
    """The same for this project, where nothing is downloaded."""

    def prepare(self, root: Path, urls: Sequence[str]) -> None:
        """Nothing is needed."""


def find_source(root: str) -> type[CIFAR10]:
    """CIFAR-10 if it lies in `root`; otherwise random images, which this project then uses, too."""
    if (Path(root) / CIFAR10.base_folder).is_dir():
        return CIFAR10
    datasets.DATASETS["cifar10"] = NoiseDataset(Noise, num_classes=10)
    return Noise


def per_image_loader(root: str, num_workers: int) -> DataLoader[Any]:
    """The note's data: each image through PIL and torchvision's transforms."""
    transform = transforms.Compose(
        [
            transforms.Resize(40),
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32),
            transforms.ToTensor(),
        ]
    )
    data = find_source(root)(root, train=True, transform=transform)
    return DataLoader(data, BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0)


def project_batches(root: str) -> Iterator[tuple[Tensor, Tensor]]:
    """This project's training batches without end: images (N, 3, 32, 32) in [0, 1] and labels."""
    find_source(root)
    data = CIFARDataModule(root, batch_size=BATCH_SIZE, val_size=0)
    data.setup("fit")
    for epoch in itertools.count():
        for images, labels, positions in data.train_dataloader():
            images, labels, positions = (
                part.to(DEVICE, non_blocking=True) for part in (images, labels, positions)
            )
            yield data.augment(images, positions, epoch) / 255, labels


def autocast() -> torch.autocast:
    """The precision that this project chooses on this machine, as Lightning sets it up."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16, cache_enabled=False)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def report(**figures: float) -> None:
    """Prints figures for the process that gives the turns."""
    print(f"\n{FIGURES}{json.dumps(figures)}", flush=True)


def take_turns(batches: int) -> Iterator[None]:
    """Yields before each training batch; waits for a turn and times it, every `batches` batches."""
    report()  # ready
    while sys.stdin.readline():
        start = time.perf_counter()
        yield from itertools.repeat(None, batches)
        synchronize()
        report(
            images_per_s=batches * BATCH_SIZE / (time.perf_counter() - start),
            peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
    sys.exit()  # `speed.py` has ended


class Turns(Callback):
    """Makes each `batches` training batches a turn, wherever in an epoch they lie."""

    def __init__(self, batches: int) -> None:
        self.turns = take_turns(batches)

    def on_train_batch_start(self, *_: Any) -> None:
        next(self.turns)


def train_step(loss: Tensor, optimizer: Adam) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def run_note(root: str, batches: int, options: list[str]) -> None:
    """A."""
    loader, network = per_image_loader(root, num_workers=0), ResNet().to(DEVICE)
    optimizer = Adam(network.parameters(), lr=1e-3)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, (_, (images, labels)) in enumerate(zip(take_turns(batches), epochs, strict=False)):
        loss = F.cross_entropy(network(images.to(DEVICE)), labels.to(DEVICE))
        train_step(loss, optimizer)
        if (step + 1) % 100 == 0:
            print(f"Iter [{step + 1}/500] Loss: {loss.item():.4f}")


class Usual(LightningModule):
    """A LightningModule as most are written."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNet()
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("loss", loss, prog_bar=True)
        self.log("acc", self.accuracy, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Adam:
        return Adam(self.parameters(), lr=1e-3)


def run_usual(root: str, batches: int, options: list[str]) -> None:
    """B."""
    loader = per_image_loader(root, num_workers=os.cpu_count() or 1)
    Trainer(devices=1, max_epochs=-1, callbacks=[Turns(batches)]).fit(Usual(), loader)


def run_fit(root: str, batches: int, options: list[str]) -> None:
    """C."""
    find_source(root)
    sys.argv = [
        *("train.py", "fit", f"--data.root={root}", "--data.val_size=0"),
        *("--trainer.max_epochs=1000000", "--trainer.devices=1"),
        "--trainer.callbacks+=__main__.Turns",
        *(f"--trainer.callbacks.batches={batches}", *options),
    ]
    train.main()


def run_bare(root: str, batches: int, options: list[str]) -> None:
    """D."""
    module = ResNetModule().to(DEVICE)
    optimizer = Adam(module.parameters(), lr=1e-3)
    for _, (images, labels) in zip(take_turns(batches), project_batches(root), strict=False):
        with autocast():
            loss = module.losses(module(images), labels).mean()
        train_step(loss, optimizer)


SIDES = {"A": run_note, "B": run_usual, "C": run_fit, "D": run_bare}


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--data.root", dest="root", default="data", help="where CIFAR-10 lies")
    parser.add_argument("--batches", type=int, default=10, help="in a turn")
    arguments, options = parser.parse_known_args()
    SIDES[arguments.side](arguments.root, arguments.batches, options)


if __name__ == "__main__":
    main()
