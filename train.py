"""Trains, validates and tests a residual network on CIFAR-10.

    python train.py fit                 # 80 epochs on CIFAR-10; runs go to lightning_logs/
    python train.py fit --ckpt last     # resumes the newest run
    python train.py test --ckpt         # tests the best checkpoint of the newest run
    python train.py fit --help          # every option

Options are those of the Trainer (`--trainer.max_epochs 10`), of `ResNetModule` (`--model.width 8`),
of `CIFARDataModule` (`--data.batch_size 200`) and of the callbacks that are named below. All of
them can also stand in a YAML file given with --config, as those in recipes/ do. What stands later
on the command line overrides what stands before it.
"""

from cifar_datamodule import CIFARDataModule
from cifar_resnet.callbacks import (
    CurrentLimits,
    CycleLengthCheck,
    EpochSummary,
    StopAtSignal,
    TensorBoardImages,
    TerminateOnNaN,
)
from cifar_resnet.checkpoint import BestCheckpoint, EpochCheckpoint, PeriodicCheckpoint
from cifar_resnet.cli import CLI, GPU_FOUND
from resnet_module import ResNetModule


def main() -> None:
    """Runs a command: fit, validate or test."""
    CLI(
        ResNetModule,
        CIFARDataModule,
        callback_options={
            "best_checkpoint": BestCheckpoint,
            "periodic_checkpoint": PeriodicCheckpoint,
            "pictures": TensorBoardImages,
        },
        trainer_defaults={
            # So that a run that began on a GPU does not go on without one unnoticed.
            "accelerator": "gpu" if GPU_FOUND else "auto",
            "max_epochs": 80,
            "callbacks": [
                EpochCheckpoint("last"),
                TerminateOnNaN(),
                CycleLengthCheck(),
                CurrentLimits(),
                StopAtSignal(),
                EpochSummary(),
            ],
        },
        seed_everything_default=0,
    )


if __name__ == "__main__":
    main()
