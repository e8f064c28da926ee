"""Four ways to train the default network on CIFAR-10 at batch 100: what `speed.py` compares.

    A  the note's script: each image transformed by torchvision in the main process, float32, eager
    B  Lightning as it is usually written: the same transforms in DataLoader workers, loss and
       accuracy logged at every step, the Trainer's defaults
    C  this project's `python train.py fit`
    D  the bare loop: this project's network, data path and precision without Lightning

`python benchmarks/sides.py C --data.root data` runs one of them in a process of its own and prints
its figures as JSON. Where there is no CIFAR-10, random images take its place.
"""

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

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
WARM_UP = 5  # steps that are not counted
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
    """The precision that this project chooses on this machine."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Stopwatch(Callback):
    """Notes when an epoch begins, when it validates, and when training ends."""

    marks: ClassVar[list[tuple[str, float]]] = []

    def _mark(self, name: str) -> None:
        wait()
        self.marks.append((name, time.time()))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("epoch")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("validated")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("end")

    @classmethod
    def figures(cls, images: int) -> dict[str, float]:
        """Of the last epoch, which trained on `images`.

        Images per second are those of an epoch of 45,000, what comes after its steps (checkpoints,
        logs) included and validation left out.
        """
        begins = [at for name, at in cls.marks if name == "epoch"]
        last = [(name, at) for name, at in cls.marks if at > begins[-1]]
        steps = last[0][1] - begins[-1]
        validation = sum(at if name == "validated" else -at for name, at in last[:-1])
        rest = last[-1][1] - last[0][1] - validation
        return {
            "images_per_s": EPOCH / (EPOCH / images * steps + rest),
            "validation_s": validation,
            "first_step_at": begins[0],
        }


def timed(steps: Iterator[int], batches: int) -> dict[str, float]:
    """Images per second of `steps`, each of which yields its number of images."""
    first = time.time()
    warmed = 0
    while warmed < WARM_UP * BATCH_SIZE:
        warmed += next(steps)
    wait()
    start, images = time.perf_counter(), 0
    while images < batches * BATCH_SIZE:
        images += next(steps)
    wait()
    return {
        "images_per_s": images / (time.perf_counter() - start),
        "first_step_at": first,
    }


def note(root: str, batches: int, options: list[str]) -> dict[str, float]:
    """A."""

    def steps() -> Iterator[int]:
        network = ResNet().to(DEVICE)
        optimizer = Adam(network.parameters(), lr=1e-3)
        for number, (images, labels) in enumerate(per_image_loader(root, num_workers=0)):
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            if (number + 1) % 100 == 0:
                print(f"Iter [{number + 1}/500] Loss: {loss.item():.4f}")
            yield len(labels)

    return timed(steps(), batches)


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


def usual(root: str, batches: int, options: list[str]) -> dict[str, float]:
    """B."""
    loader = per_image_loader(root, num_workers=os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=2,
            limit_train_batches=batches,
            default_root_dir=folder,
            callbacks=[Stopwatch()],
        ).fit(Usual(), loader)
    return Stopwatch.figures(batches * BATCH_SIZE)


def fit(root: str, batches: int, options: list[str]) -> dict[str, float]:
    """C. On a GPU whole epochs, for a limit would keep it from its fast path."""
    source(root)
    limit = [] if DEVICE.type == "cuda" else [f"--trainer.limit_train_batches={batches}"]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            *("train.py", "fit", f"--data.root={root}", "--trainer.max_epochs=2", *limit),
            *(f"--trainer.default_root_dir={folder}", "--trainer.callbacks+=__main__.Stopwatch"),
            *options,
        ]
        train.main()
    return Stopwatch.figures(BATCH_SIZE * batches if limit else EPOCH)


def bare(root: str, batches: int, options: list[str]) -> dict[str, float]:
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

    return timed(steps(), batches)


SIDES = {"A": note, "B": usual, "C": fit, "D": bare}


def main() -> None:
    """Runs one side; its figures are the last line of the output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--data.root", dest="root", default="data")
    parser.add_argument("--batches", type=int, default=40, help="counted, after a warm-up")
    arguments, options = parser.parse_known_args()
    figures = SIDES[arguments.side](arguments.root, arguments.batches, options)
    figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if DEVICE.type == "cuda":
        figures["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
