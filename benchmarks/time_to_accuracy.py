"""How long a recipe takes to its test accuracy, beside the note's script.

    python benchmarks/time_to_accuracy.py recipes/fast.yaml --data.root data --data.val_size 0

Times `python train.py fit` as a whole, from its imports to its last checkpoint, and tests that.
Options that are not listed here go to `fit`. Before and after it a few batches of the note's script
(side A of sides.py) are timed: its 80 epochs take 500 batches each. Nothing else should run
meanwhile.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from accuracy import train_py
from speed import measure_sides

NOTE_IMAGES = 80 * 50_000
ROUNDS, BATCHES = 6, 10


def time_note(root: str) -> list[float]:
    """Minutes that the note's script would take for its 80 epochs, from the speed of each turn."""
    speed = measure_sides(["A"], root, ROUNDS, BATCHES, [])["training, images/s"]["A"]
    return [NOTE_IMAGES / images_per_s / 60 for images_per_s in speed]


def time_fit(options: list[str]) -> tuple[float, float]:
    """Minutes that `fit` takes, and the accuracy of its last checkpoint on the test images."""
    with tempfile.TemporaryDirectory() as folder:
        place = ["--trainer.default_root_dir", folder]
        start = time.perf_counter()
        train_py("fit", *options, *place)
        minutes = (time.perf_counter() - start) / 60
        train_py("test", "--ckpt", "last", *place)
        (report,) = Path(folder).glob("lightning_logs/*/checkpoints/test.json")
        return minutes, json.loads(report.read_text())["acc"]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("--data.root", dest="root", default="data", help="where CIFAR-10 lies")
    arguments, options = parser.parse_known_args()
    root = str(Path(arguments.root).absolute())
    before = time_note(root)
    minutes, acc = time_fit(["--config", arguments.recipe, "--data.root", root, *options])
    note = statistics.median(before + time_note(root))
    print(
        f"{Path(arguments.recipe).stem}: {100 * acc:.2f} % in {minutes:.1f} min; the note's script "
        f"takes {note:.0f} min for 80 epochs, {note / minutes:.1f} times as long"
    )


if __name__ == "__main__":
    main()
