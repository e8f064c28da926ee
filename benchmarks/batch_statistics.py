"""Where the note's 85 % comes from: a checkpoint tested with and without eval mode.

    python benchmarks/batch_statistics.py lightning_logs/version_0/checkpoints/best.ckpt

The note never calls `eval()`, so its batch normalisation uses the statistics of each test batch of
100 instead of those learnt in training. That hides a part of what is lost by testing on images
that are not enlarged as those in training were.
"""

import sys

import torch
from torch.utils.data import DataLoader

from cifar_datamodule import CIFARDataModule, ImageBatches
from resnet_module import ResNetModule

BATCH_SIZE = 100


@torch.inference_mode()
def accuracy(module: ResNetModule, data: ImageBatches) -> float:
    """Share of the images whose class `module` names, in the mode that it is in."""
    hits = 0
    for images, labels, _ in DataLoader(data, BATCH_SIZE, collate_fn=tuple):
        hits += int((module(images / 255).argmax(dim=1) == labels).sum())
    return hits / len(data)


def main() -> None:
    """Prints the accuracy on the test images, native and zoomed, in both modes."""
    checkpoint = sys.argv[1]
    for evaluation in ("native", "crop", "zoom"):
        data = CIFARDataModule.load_from_checkpoint(checkpoint, evaluation=evaluation)
        data.setup("test")
        for mode in ("eval mode", "batch statistics"):
            module = ResNetModule.load_from_checkpoint(checkpoint, map_location="cpu")
            module.train(mode == "batch statistics")
            print(f"{evaluation:6} {mode:16} {100 * accuracy(module, data.test_set):.2f} %")


if __name__ == "__main__":
    main()
