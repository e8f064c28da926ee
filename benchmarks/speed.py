"""Training speed beside other ways to train the same network, and the speed of its parts.

    python benchmarks/speed.py --data.root data     # a quarter of an hour on two CPU cores
    python benchmarks/speed.py --quick              # some minutes
    python benchmarks/speed.py --sides C,D          # only these sides, and nothing else

Prints tables, median (quartiles), and writes all values to speed.json. What is compared runs in
turn, A B C D A B C D ..., and ratios are taken within each round. The sides (see sides.py) are
processes of their own. Options that are not listed here go to this project's `fit`, as in
`python benchmarks/speed.py --trainer.benchmark true`. Nothing else should run meanwhile. Where
CIFAR-10 is not in --data.root, random images take its place.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sides import (
    BATCH_SIZE,
    BF16,
    DEVICE,
    FIGURES,
    SIDES,
    autocast,
    per_image_loader,
    project_batches,
    synchronize,
    train_step,
)
from torch.optim import Adam

from cifar_resnet.images import evaluation_view
from resnet_module import ResNet, ResNetModule

FOLDER = Path(__file__).absolute().parent
WARM_UP = 1  # rounds that are not counted
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")
GRID = {
    "layers": (5, 7, 9, 18),
    "width": (32, 64),
    "batch_size": (250, 1000, 4000),
    "image_size": (64, 96),
}
Values = dict[str, list[float]]  # what was measured: a value for each round


class Side:
    """One side, in a process of its own, that trains whenever it is given a turn."""

    def __init__(self, name: str, root: str, batches: int, options: list[str], folder: str) -> None:
        command = [sys.executable, str(FOLDER / "sides.py"), name, f"--data.root={root}"]
        self.process = subprocess.Popen(
            [*command, f"--batches={batches}", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,  # where its runs go
        )

    def read_figures(self) -> dict[str, float]:
        """Waits for the figures of a turn, or for the side to be ready."""
        for line in self.process.stdout or ():
            if line.startswith(FIGURES):
                return dict(json.loads(line.removeprefix(FIGURES)))
        sys.exit(f"error: {self.process.args!r} ended with exit code {self.process.wait()}")

    def take_turn(self) -> dict[str, float]:
        print(file=self.process.stdin, flush=True)
        return self.read_figures()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measure_sides(
    names: list[str], root: str, rounds: int, batches: int, options: list[str]
) -> dict[str, Values]:
    """Training speed and memory of the sides, and the ratios of C to the others."""
    root = str(Path(root).absolute())
    speed: Values = {name: [] for name in names}
    memory: Values = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in names:
            sides[name] = Side(name, root, batches, options if name == "C" else [], folder)
            stack.callback(sides[name].end)
        for side in sides.values():
            side.read_figures()
        for number in range(WARM_UP + rounds):
            for name, side in sides.items():
                figures = side.take_turn()
                print(f"{name} {figures['images_per_s']:,.0f}", end="  ", flush=True)
                if number >= WARM_UP:
                    speed[name].append(figures["images_per_s"])
                    memory[name].append(figures["peak_mib"])
            print()
    others = [name for name in names if name != "C" and "C" in names]
    ratios = {f"C/{name}": divide(speed["C"], speed[name]) for name in others}
    return {"training, images/s": speed, "ratio": ratios, "peak memory, MiB": memory}


def divide(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def measure_seconds(actions: dict[str, Callable[[], Any]], rounds: int) -> Values:
    """How long each action takes; they run in turn."""
    taken: Values = {name: [] for name in actions}
    for _ in range(WARM_UP + rounds):
        for name, act in actions.items():
            start = time.perf_counter()
            act()
            synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: values[WARM_UP:] for name, values in taken.items()}


def measure_rates(actions: dict[str, tuple[int, Callable[[], Any]]], rounds: int) -> Values:
    """Images per second of actions, each given with its number of images."""
    taken = measure_seconds({name: act for name, (_, act) in actions.items()}, rounds)
    return {name: [actions[name][0] / second for second in taken[name]] for name in actions}


def measure_data(root: str, rounds: int) -> Values:
    """Images per second of the data alone: an epoch of this project's, a part of torchvision's."""
    ours = project_batches(root)
    theirs = itertools.chain.from_iterable(itertools.repeat(per_image_loader(root, num_workers=0)))

    def load(batches: Iterator[Any], images: int) -> tuple[int, Callable[[], Any]]:
        return images, lambda: [next(batches) for _ in range(images // BATCH_SIZE)]

    return measure_rates(
        {"this project": load(ours, 50_000), "torchvision": load(theirs, 1_000)}, rounds
    )


def measure_evaluation(rounds: int, images: int) -> Values:
    """Images per second of evaluation on enlarged images: this project's, and the note's."""
    shown = torch.rand(images, 3, 32, 32, device=DEVICE)
    module, network = ResNetModule().to(DEVICE).eval(), ResNet().to(DEVICE).eval()

    def evaluate_ours() -> None:
        with torch.inference_mode(), autocast():
            for batch in shown.split(100 if DEVICE.type == "cpu" else 1000):
                batch = batch.contiguous(memory_format=torch.channels_last)
                module(evaluation_view(batch, "zoom"))

    def evaluate_note() -> None:
        with torch.no_grad():
            for batch in shown.split(BATCH_SIZE):
                network(evaluation_view(batch, "zoom"))

    return measure_rates(
        {"this project": (images, evaluate_ours), "the note": (images, evaluate_note)}, rounds
    )


def training_step(
    layers: int = 3, width: int = 16, batch_size: int = BATCH_SIZE, image_size: int = 32
) -> Callable[[], None]:
    """A step of the bare network of 6·`layers` + 2 layers, on the same random images each time."""
    module = ResNetModule(layers=(layers, layers, layers), width=width).to(DEVICE)
    optimizer = Adam(module.parameters(), lr=1e-3)
    images = torch.rand(batch_size, 3, image_size, image_size, device=DEVICE)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,), device=DEVICE)

    def step() -> None:
        with autocast():
            loss = module.losses(module(images), labels).mean()
        train_step(loss, optimizer)

    return step


def measure_scaling(rounds: int, values: int) -> Values:
    """Milliseconds per training image of a bare step, as one thing at a time grows.

    Args:
        rounds: How often each step runs.
        values: How many of each list in `GRID` are taken.
    """
    sizes: dict[str, dict[str, int]] = {"the defaults": {}}
    for name, grid in GRID.items():
        sizes |= {f"{name} {value}": {name: value} for value in grid[:values]}
    taken = measure_seconds({name: training_step(**size) for name, size in sizes.items()}, rounds)
    return {
        name: [1000 * second / sizes[name].get("batch_size", BATCH_SIZE) for second in values]
        for name, values in taken.items()
    }


def measure_start(rounds: int) -> Values:
    """Seconds of `python train.py --help`, and of the imports that any such script needs."""
    commands = {
        "train.py --help": [str(FOLDER.parent / "train.py"), "--help"],
        "its imports": ["-c", "import torch, lightning.pytorch.cli"],
    }

    def start(arguments: list[str]) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    return measure_seconds({name: start(command) for name, command in commands.items()}, rounds)


def describe_machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    git = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "precision": "bf16" if BF16 else "float32",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def print_table(title: str, rows: Values) -> None:
    """Prints a table in Markdown: median (lower to upper quartile)."""
    print(f"\n| {title} | median (quartiles) |\n| --- | --- |")
    for name, values in rows.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        form = ",.0f" if middle >= 100 else ".2f"
        print(f"| {name} | {middle:{form}} ({low:{form}} to {high:{form}}) |")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and those for `fit`."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data.root", dest="root", default="data", help="where CIFAR-10 lies")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--sides", help="sides to compare, such as C,D, and measure nothing else")
    parser.add_argument("--output", type=Path, default=Path("speed.json"), help="all values")
    arguments, options = parser.parse_known_args()
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"output is {str(arguments.output)!r}: there is no such folder")
    if unknown := set((arguments.sides or "").split(",")) - {"", *SIDES}:
        parser.error(f"sides is {arguments.sides!r}: there is no {', '.join(sorted(unknown))}")
    return arguments, options


def main() -> None:
    arguments, options = parse_arguments()
    root, names = arguments.root, arguments.sides.split(",") if arguments.sides else list(SIDES)
    rounds, few, values, batches = (2, 2, 1, 2) if arguments.quick else (24, 6, 4, 10)
    if DEVICE.type != "cpu":
        batches *= 50  # a GPU's epochs are short
    results = measure_sides(names, root, rounds, batches, options)
    if not arguments.sides:
        results |= {
            "data alone, images/s": measure_data(root, rounds),
            "evaluation, images/s": measure_evaluation(rounds, 1_000),
            "start, s": measure_start(few),
            "training step, ms per image": measure_scaling(few, values),
        }
    machine = describe_machine()
    content = {"command": " ".join(sys.argv), "machine": machine, "results": results}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items() if value))
    for title, rows in results.items():
        print_table(title, rows)


if __name__ == "__main__":
    main()
