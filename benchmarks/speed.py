"""Training speed of `python train.py fit` beside three other ways to train the same network.

    python benchmarks/speed.py --data.root data    # some minutes on two CPU cores
    python benchmarks/speed.py --quick             # fewer and shorter rounds
    python benchmarks/speed.py --sides C,D         # only these sides

The four sides (see sides.py) are processes of their own, which train in turn, A B C D A B C D ...;
ratios are taken within each round. Prints median (quartiles). Options that are not listed here go
to `fit`, as in `python benchmarks/speed.py --trainer.benchmark true`. Nothing else should run
meanwhile. Where CIFAR-10 is not in --data.root, random images take its place.
"""

import argparse
import contextlib
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sides import BF16, DEVICE, SIDES, SPEED

from cifar_resnet.runs import git_commit

FOLDER = Path(__file__).absolute().parent
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")
Values = dict[str, list[float]]  # a value for each round


def read_speed(side: subprocess.Popen[str]) -> float:
    """Waits for the images per second of a side's turn, or for the side to be ready."""
    for line in side.stdout or ():
        if line.startswith(SPEED):
            return float(line.removeprefix(SPEED))
    sys.exit(f"error: {side.args!r} ended with exit code {side.wait()}")


def take_turns(commands: dict[str, list[str]], rounds: int) -> Values:
    """Images per second of each side in each round; the first, which warms up, is not counted."""
    speeds: Values = {name: [] for name in commands}
    pipe = subprocess.PIPE
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides: dict[str, subprocess.Popen[str]] = {}
        for name, command in commands.items():
            side = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder)
            sides[name] = stack.enter_context(side)
            stack.callback(side.kill)
        for side in sides.values():
            read_speed(side)
        for _ in range(1 + rounds):
            for name, side in sides.items():
                print(file=side.stdin, flush=True)
                speeds[name].append(read_speed(side))
                print(f"{name} {speeds[name][-1]:,.0f}", end="  ", flush=True)
            print()
    return {name: values[1:] for name, values in speeds.items()}


def measure_sides(
    names: list[str], root: str, rounds: int, batches: int, options: list[str]
) -> Values:
    """Images per second of the sides in each round; `options` are those of side C for `fit`."""
    if DEVICE.type != "cpu":
        batches *= 50  # a GPU's turns are short
    script, place = str(FOLDER / "sides.py"), [str(Path(root).absolute()), str(batches)]
    commands = {name: [sys.executable, script, name, *place, *options] for name in names}
    return take_turns(commands, rounds)


def divide(speeds: Values) -> Values:
    """The ratios of C to the other sides within each round."""
    return {
        f"C/{name}": [c / other for c, other in zip(speeds["C"], values, strict=True)]
        for name, values in speeds.items()
        if name != "C" and "C" in speeds
    }


def describe_machine() -> dict[str, Any]:
    """Where and with what this was measured."""
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
        "commit": git_commit(),
    }


def print_table(title: str, rows: Values) -> None:
    """Prints a table in Markdown: median (lower to upper quartile)."""
    print(f"\n| {title} | median (quartiles) |\n| --- | --- |")
    for name, values in rows.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        form = ",.0f" if middle >= 100 else ".2f"
        print(f"| {name} | {middle:{form}} ({low:{form}} to {high:{form}}) |")


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data.root", dest="root", default="data", help="where CIFAR-10 lies")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--sides", default=",".join(SIDES), help="sides to compare, such as C,D")
    arguments, options = parser.parse_known_args()
    rounds, batches = (2, 2) if arguments.quick else (24, 10)
    names = arguments.sides.split(",")
    speeds = measure_sides(names, arguments.root, rounds, batches, options)
    machine = describe_machine()
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items() if value))
    print_table("training, images/s", speeds)
    print_table("ratio", divide(speeds))


if __name__ == "__main__":
    main()
