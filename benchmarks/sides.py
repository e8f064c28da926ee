"""Four ways to train the default network on CIFAR-10 at batch 100: what `speed.py` compares.

    A  the original script: each image transformed by torchvision in the main process, float32
    B  Lightning as it is usually written: the same transforms in DataLoader workers, loss and
       accuracy logged at every step, the Trainer's defaults, one device
    C  this project's `python train.py fit`
    D  a bare loop: this project's network, data path and precision without Lightning

`python benchmarks/sides.py C data 10` runs one of them on CIFAR-10 in `data`, or on random images
where it is not. For each line that it reads it trains for a turn, of 10 batches here, then prints
its speed. All 50,000 images train, none validate. Options behind these go to `fit`.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
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
from torchvision.datasets import CIFAR10
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize, ToTensor

from cifar_datamodule import CIFARDataModule
from cifar_resnet.cli import native_precision
from cifar_resnet.datasets import CIFAR, DATASETS
from resnet_module import ResNet, ResNetModule

BATCH_SIZE = 100
SPEED = "images/s: "
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = native_precision("auto") == "bf16-mixed"


class Noise(CIFAR10):  # type: ignore[misc]
    """Random images of the number and shape of CIFAR-10's training images."""

    def __init__(self, root: str, train: bool = True, transform: Any = None) -> None:
        self.transform, self.target_transform = transform, None
        rng = np.random.default_rng(0)
        self.data = rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
        self.targets = rng.integers(0, 10, 50_000).tolist()
        self.classes = [*"0123456789"]


class NoiseSource(CIFAR):
    """The same images as a data set of this project."""

    def prepare(self, *_: Any) -> None:
        """Nothing is downloaded."""


def find_source(root: str) -> type[CIFAR10]:
    """CIFAR-10 if it lies in `root`; otherwise random images, which this project then uses, too."""
    if (Path(root) / CIFAR10.base_folder).is_dir():
        return CIFAR10
    DATASETS["cifar10"] = NoiseSource(Noise, num_classes=10)
    return Noise


def per_image_loader(root: str, num_workers: int) -> DataLoader[Any]:
    """The original script's data: each image through PIL and torchvision's transforms."""
    transform = Compose([Resize(40), RandomHorizontalFlip(), RandomCrop(32), ToTensor()])
    data = find_source(root)(root, train=True, transform=transform)
    return DataLoader(data, BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0)


def report(speed: float) -> None:
    """Tells the process that gives the turns; a progress bar may stand in the line before."""
    print(f"\n{SPEED}{speed}", flush=True)


def take_turns(batches: int) -> Iterator[None]:
    """Yields before each training batch; waits for a turn and times it, every `batches` batches."""
    report(0)  # ready
    while sys.stdin.readline():
        start = time.perf_counter()
        yield from itertools.repeat(None, batches)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        report(batches * BATCH_SIZE / (time.perf_counter() - start))
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


def run_original(root: str, batches: int, *_: str) -> None:
    """A."""
    loader, network = per_image_loader(root, num_workers=0), ResNet().to(DEVICE)
    optimizer = Adam(network.parameters(), lr=1e-3)
    turns = take_turns(batches)
    while True:
        for step, (images, labels) in enumerate(loader, start=1):
            next(turns)
            loss = F.cross_entropy(network(images.to(DEVICE)), labels.to(DEVICE))
            train_step(loss, optimizer)
            if step % 100 == 0:
                print(f"Iter [{step}/500] Loss: {loss.item():.4f}")


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


def run_usual(root: str, batches: int, *_: str) -> None:
    """B."""
    loader = per_image_loader(root, num_workers=os.cpu_count() or 1)
    Trainer(devices=1, max_epochs=-1, callbacks=[Turns(batches)]).fit(Usual(), loader)


def run_fit(root: str, batches: int, *options: str) -> None:
    """C."""
    sys.path.insert(0, str(Path(__file__).absolute().parents[1]))
    import train  # a script, which is not installed

    find_source(root)
    sys.argv = [
        *("train.py", "fit", f"--data.root={root}", "--data.val_size=0"),
        *("--trainer.max_epochs=1000000", "--trainer.devices=1"),
        "--trainer.callbacks+=__main__.Turns",
        *(f"--trainer.callbacks.batches={batches}", *options),
    ]
    train.main()


def run_bare(root: str, batches: int, *_: str) -> None:
    """D."""
    find_source(root)
    data = CIFARDataModule(root, batch_size=BATCH_SIZE, val_size=0)
    data.setup("fit")
    module = ResNetModule().to(DEVICE)
    optimizer = Adam(module.parameters(), lr=1e-3)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16, cache_enabled=False)
    turns = take_turns(batches)
    for epoch in itertools.count():
        for batch in data.train_dataloader():
            next(turns)
            images, labels, positions = (part.to(DEVICE, non_blocking=True) for part in batch)
            images, labels = data.augment(images, labels, positions, epoch)
            with autocast:
                loss = module.losses(module(images / 255), labels).mean()
            train_step(loss, optimizer)


SIDES = {"A": run_original, "B": run_usual, "C": run_fit, "D": run_bare}

if __name__ == "__main__":
    side, root, batches, *options = sys.argv[1:]
    SIDES[side](root, int(batches), *options)
