"""Where the note's 85 % comes from: a checkpoint tested with and without eval mode.

    python benchmarks/batch_statistics.py                # best checkpoint of the newest run
    python benchmarks/batch_statistics.py lightning_logs/version_0/checkpoints/last.ckpt

The note never calls `eval()`, so that its batch normalisation uses the statistics of each test
batch of 100 images, not those of the training. That makes up for a part of what is lost by training
on enlarged images and testing on native ones.
"""

import argparse
from pathlib import Path
from typing import get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from cifar_datamodule import CIFARDataModule
from cifar_resnet.checkpoint import read_checkpoint
from cifar_resnet.images import Evaluation, evaluation_view
from cifar_resnet.runs import LOGS, find_checkpoint
from resnet_module import ResNetModule

BATCH_SIZE = 100


@torch.inference_mode()
def measure_accuracy(
    module: ResNetModule, images: Tensor, labels: Tensor, evaluation: Evaluation
) -> float:
    """The accuracy, in [0, 1], of `module` in the mode that it is in.

    Args:
        module: The network; in training mode its running statistics change.
        images: (N, 3, H, W) uint8, native.
        labels: (N,) int64.
        evaluation: What the network is shown of them.
    """
    batches = (evaluation_view(batch / 255, evaluation) for batch in images.split(BATCH_SIZE))
    predicted = torch.cat([module(batch).argmax(dim=1) for batch in batches])
    return float((predicted == labels).float().mean())


def print_accuracies(path: Path, root: str | None) -> None:
    """Prints the accuracy on the test images, native, cropped and zoomed, in both modes."""
    checkpoint = read_checkpoint(path)
    data = CIFARDataModule.from_checkpoint(checkpoint)
    if root:
        data.root = Path(root).expanduser()
    data.prepare_data()
    data.setup("test")
    for evaluation in get_args(Evaluation):
        for mode in ("eval mode", "batch statistics"):
            module = ResNetModule.from_checkpoint(checkpoint).train(mode == "batch statistics")
            share = measure_accuracy(module, data.test_set.images, data.test_set.labels, evaluation)
            print(f"{evaluation:6} {mode:16} {100 * share:.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="?", default="best", help="a path, or best or last of the newest run"
    )
    parser.add_argument("--data.root", dest="root", help="folder of the data")
    arguments = parser.parse_args()
    try:
        path = find_checkpoint(arguments.checkpoint, LOGS)
        print_accuracies(path, arguments.root)
    except (ValueError, OSError, MisconfigurationException) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
