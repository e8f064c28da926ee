"""What one sees of a training run: its speed."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs `images_per_second` for each epoch: in training, validation apart, by all processes."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self.start = 0.0, now(pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.seconds += now(pl_module.device) - self.start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = now(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += now(pl_module.device) - self.start
        pl_module.log("images_per_second", images_per_epoch(trainer) / self.seconds)


def now(device: torch.device) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def images_per_epoch(trainer: Trainer) -> int:
    """Training images that an epoch shows, in all processes."""
    loader: Any = trainer.train_dataloader
    shown = min(trainer.num_training_batches * loader.batch_size, len(loader.sampler))
    return int(shown) * trainer.world_size
