"""Four ways to train the default network on CIFAR-10 at batch 100: what `speed.py` compares.

    A  the note's script: each image transformed by torchvision in the main process, float32, eager
    B  Lightning as it is usually written: the same transforms in DataLoader workers, loss and
       accuracy logged at every step, the Trainer's defaults
    C  this project's `python train.py fit`
    D  the bare loop: this project's network, data path and precision without Lightning

`python benchmarks/sides.py C --data.root data` runs one of them, in turns of some batches: it takes
one for each line that it reads, and prints its figures. Where there is no CIFAR-10, random images
take its place.
"""

import argparse
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
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

import cifar_datamodule
import train
from cifar_datamodule import CIFARDataModule
from cuda_graphs import TrainingSteps, make_recordable
from resnet_module import ResNet, ResNetModule

BATCH_SIZE = 100
EPOCH = 45_000  # images
FIGURES = "figures: "
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = train.native_precision(None) == "bf16-mixed"


class Noise(CIFAR10):  # type: ignore[misc]
    """Random images in CIFAR-10's place, of its number and shape."""

    def __init__(
        self, root: str, train: bool = True, transform: Any = None, download: bool = False
    ) -> None:
        self.transform, self.target_transform = transform, None
        rng, count = np.random.default_rng(int(train)), 50_000 if train else 10_000
        self.data = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = rng.integers(0, 10, count).tolist()
        self.classes = [str(label) for label in range(10)]


def source(root: str) -> type[CIFAR10]:
    """CIFAR-10 if it lies in `root`, else `Noise`, of which this project is told as well."""
    if (Path(root) / CIFAR10.base_folder).is_dir():
        return CIFAR10
    cifar_datamodule.CIFAR["cifar10"] = Noise
    vars(cifar_datamodule)["provide"] = lambda *_: None  # there is nothing to fetch
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
    data = source(root)(root, train=True, transform=transform)
    return DataLoader(data, BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0)


def crops(data: CIFARDataModule, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What this project makes of a training batch: float32 images in [0, 1] and labels."""
    images, labels, positions = batch
    images = data.augment(images, positions, epoch=0)
    return images.to(torch.float32, memory_format=torch.channels_last) / 255, labels


def prepared(root: str) -> CIFARDataModule:
    """This project's data, ready for `fit`."""
    source(root)
    data = CIFARDataModule(root, batch_size=BATCH_SIZE)
    data.prepare_data()
    data.setup("fit")
    return data


def autocast() -> Any:
    """The precision that this project chooses on this machine, as Lightning sets it up."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16, cache_enabled=False)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def report(**figures: float) -> None:
    """Prints the figures of a turn, which the process that gives the turns looks for."""
    figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if DEVICE.type == "cuda":
        figures["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print("\n" + FIGURES + json.dumps(figures), flush=True)


def await_turn() -> None:
    """Waits to be given the next turn, or ends."""
    if not sys.stdin.readline():
        sys.stdout.flush()
        os._exit(0)


class Turns(Callback):
    """Makes each epoch a turn.

    Its images per second are those of an epoch of 45,000, what comes after the steps (checkpoints,
    logs) included, and validation, which has a figure of its own, left out.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.marks: list[float] = []

    def _mark(self) -> None:
        wait()
        self.marks.append(time.perf_counter())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.marks:
            self._mark()
        report(**self.figures() if self.marks else {})
        await_turn()
        self.marks = [time.perf_counter()]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._mark()

    on_validation_end = on_validation_start

    def figures(self) -> dict[str, float]:
        """Of the turn that the marks are of: its begin, validation's begin and end, its end."""
        begin, *validation, end = self.marks
        steps = (validation[0] if validation else end) - begin
        validation_s = validation[1] - validation[0] if validation else 0.0
        rest = end - begin - steps - validation_s
        return {
            "images_per_s": EPOCH / (EPOCH / self.images * steps + rest),
            "validation_s": validation_s,
        }


def take_turns(steps: Iterator[int], batches: int) -> None:
    """Makes `batches` of `steps`, each of which yields its number of images, a turn."""
    report()  # ready
    while True:
        await_turn()
        start, images = time.perf_counter(), 0
        while images < batches * BATCH_SIZE:
            images += next(steps)
        wait()
        report(images_per_s=images / (time.perf_counter() - start))


def note(root: str, batches: int, options: list[str]) -> None:
    """A."""
    loader, network = per_image_loader(root, num_workers=0), ResNet().to(DEVICE)
    optimizer = Adam(network.parameters(), lr=1e-3)

    def steps() -> Iterator[int]:
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        for number, (images, labels) in enumerate(epochs):
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            if (number + 1) % 100 == 0:
                print(f"Iter [{number + 1}/500] Loss: {loss.item():.4f}")
            yield len(labels)

    take_turns(steps(), batches)


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


def usual(root: str, batches: int, options: list[str]) -> None:
    """B."""
    loader = per_image_loader(root, num_workers=os.cpu_count() or 1)
    Trainer(
        max_epochs=-1,
        limit_train_batches=batches,
        default_root_dir=Path.cwd(),
        callbacks=[Turns(batches * BATCH_SIZE)],
    ).fit(Usual(), loader)


def fit(root: str, batches: int, options: list[str]) -> None:
    """C. On a GPU the turns are whole epochs, for a limit would keep it from its fast path."""
    source(root)
    limit = [] if DEVICE.type == "cuda" else [f"--trainer.limit_train_batches={batches}"]
    images = BATCH_SIZE * batches if limit else EPOCH
    sys.argv = [
        *("train.py", "fit", f"--data.root={root}", "--trainer.max_epochs=1000000", *limit),
        *("--trainer.callbacks+=__main__.Turns", f"--trainer.callbacks.images={images}"),
        *options,
    ]
    train.main()


def bare(root: str, batches: int, options: list[str]) -> None:
    """D. On a GPU under a CUDA graph, as C."""
    data, module = prepared(root), ResNetModule().to(DEVICE)
    optimizer = Adam(module.parameters(), lr=1e-3)
    network = autocast()

    def step(images: Tensor, labels: Tensor) -> None:
        with network:
            loss = module.losses(module(images), labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def steps() -> Iterator[int]:
        take: Callable[[Tensor, Tensor], Any] = step
        if DEVICE.type == "cuda":
            data.keep_on(DEVICE, minibatches=50)
            make_recordable(optimizer, DEVICE)
            recorded = TrainingSteps(module, optimizer, BATCH_SIZE, lambda: None)
            take = network(recorded)
        for batch in itertools.chain.from_iterable(itertools.repeat(data.train_dataloader())):
            images, labels = crops(data, batch)
            take(images, labels)
            yield len(labels)

    take_turns(steps(), batches)


SIDES = {"A": note, "B": usual, "C": fit, "D": bare}


def main() -> None:
    """Runs one side, until there are no more turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--data.root", dest="root", default="data")
    parser.add_argument("--batches", type=int, default=10, help="in a turn")
    arguments, options = parser.parse_known_args()
    SIDES[arguments.side](arguments.root, arguments.batches, options)


if __name__ == "__main__":
    main()
