"""How fast training is, beside other ways to train the same network and beside what is possible.

    python benchmarks/speed.py --data.root data     # a quarter of an hour on two CPU cores
    python benchmarks/speed.py --quick              # two minutes

Where CIFAR-10 is not in --data.root, random images take its place.

Prints tables and writes speed.json. The sides (see sides.py) run in turn, A B C D A B C D …, each
in a process of its own. What is not an option here goes to this project's `fit`:
`python benchmarks/speed.py --trainer.benchmark true`. Nothing else should run meanwhile.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from sides import (
    BATCH_SIZE,
    BF16,
    DEVICE,
    EPOCH,
    FIGURES,
    SIDES,
    autocast,
    crops,
    per_image_loader,
    prepared,
    wait,
)
from torch import Tensor
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_module import ResNet, ResNetModule

FOLDER = Path(__file__).parent
WARM_UP = 2  # rounds that are not counted
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")
Figures = dict[str, Any]


def seconds(act: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[float]:
    """How long `act` takes, `repeats` times."""
    taken = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        act()
        wait()
        taken.append(time.perf_counter() - start)
    return taken[warm_up:]


class Side:
    """One side, in a process of its own, that trains when it is given a turn."""

    def __init__(
        self, name: str, root: str, batches: int, options: list[str], folder: Path
    ) -> None:
        command = [sys.executable, str(FOLDER / "sides.py"), name, f"--data.root={root}"]
        start = time.perf_counter()
        self.errors = (folder / f"{name}.err").open("w+")
        self.process = subprocess.Popen(
            [*command, f"--batches={batches}", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=folder,  # where its runs go
        )
        self._figures()  # it is ready
        self.first_step_s = time.perf_counter() - start

    def _figures(self) -> Figures:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(FIGURES):
                return json.loads(line.removeprefix(FIGURES))
        self.errors.seek(0)
        sys.exit(f"{' '.join(map(str, self.process.args))} failed:\n{self.errors.read()}")  # type: ignore[arg-type]

    def turn(self) -> Figures:
        """Trains for a turn; the figures of it."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._figures()


def sides(root: str, rounds: int, batches: int, options: list[str]) -> Figures:
    """The sides in turn: medians of their figures, and of the ratios within each round."""
    turns: dict[str, list[Figures]] = {name: [] for name in SIDES}
    results: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        running = {
            name: Side(name, root, batches, options if name == "C" else [], Path(folder))
            for name in SIDES
        }
        for _ in range(WARM_UP + rounds):
            for name, side in running.items():
                turns[name].append(side.turn())
            print(
                *(f"{name} {found[-1]['images_per_s']:,.0f}" for name, found in turns.items()),
                flush=True,
            )
        for side in running.values():
            side.process.communicate("")  # no more turns
    for name, found in turns.items():
        del found[:WARM_UP]
        results[name] = {key: median([turn[key] for turn in found]) for key in found[0]}
        results[name]["first_step_s"] = running[name].first_step_s
    rates = {name: [turn["images_per_s"] for turn in found] for name, found in turns.items()}
    for other in "ABD":
        ratios = [c / x for c, x in zip(rates["C"], rates[other], strict=True)]
        results[f"C/{other}"] = median(ratios)
    share = [
        turn["validation_s"] / (turn["validation_s"] + EPOCH / turn["images_per_s"])
        for turn in turns["C"]
    ]
    results["validation_share"] = median(share)
    return results


def data_path(root: str, rounds: int, images: int) -> Figures:
    """Images per second of the data alone: this project's batches, and torchvision's."""
    data, rates = prepared(root), {"ours": [], "torchvision": []}  # type: ignore[var-annotated]
    if DEVICE.type == "cuda":
        data.keep_on(DEVICE, minibatches=50)

    def rate(batches: Iterator[tuple[Tensor, Tensor]], images: int) -> float:
        next(batches)
        start, seen = time.perf_counter(), 0
        while seen < images:
            seen += len(next(batches)[1])
        wait()
        return seen / (time.perf_counter() - start)

    for _ in range(rounds):
        ours = (
            crops(data, batch) for loader in cycle([data.train_dataloader()]) for batch in loader
        )
        rates["ours"].append(rate(ours, 20 * images))
        rates["torchvision"].append(rate(iter(per_image_loader(root, 0)), images))
    ratios = [a / b for a, b in zip(rates["ours"], rates["torchvision"], strict=True)]
    return {**{side: median(found) for side, found in rates.items()}, "ratio": median(ratios)}


def evaluation(root: str, rounds: int, images: int) -> Figures:
    """Images per second of evaluation, on the same images: this project's, and the note's."""
    shown = prepared(root).val_set.images[:images].to(DEVICE)
    shown = shown.to(torch.float32, memory_format=torch.channels_last) / 255
    module, network = ResNetModule().to(DEVICE).eval(), ResNet().to(DEVICE).eval()
    plain = shown.contiguous()

    def ours() -> None:
        with torch.inference_mode(), autocast():
            for batch in shown.split(100 if DEVICE.type == "cpu" else 1000):
                module(batch)

    def note() -> None:
        with torch.no_grad():
            for batch in plain.split(BATCH_SIZE):
                network(batch)

    both = [(seconds(ours, 1)[0], seconds(note, 1)[0]) for _ in range(rounds)]
    return {
        "ours": median([images / ours for ours, _ in both]),
        "note": median([images / note for _, note in both]),
        "ratio": median([note / ours for ours, note in both]),
    }


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
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def scaling(quick: bool) -> list[Figures]:
    """Milliseconds per training image as one thing at a time grows."""
    grid: dict[str, list[int]] = {
        "layers": [3, 5, 7, 9, 18],
        "width": [16, 32, 64],
        "batch_size": [100, 250, 1000, 4000],
        "image_size": [32, 64, 96],
    }
    rows = []
    for name, values in grid.items():
        for value in values[:2] if quick else values:
            taken = seconds(training_step(**{name: value}), repeats=2 if quick else 5)
            images = value if name == "batch_size" else BATCH_SIZE
            each = [1000 * second / images for second in taken]
            rows.append({name: value, "ms_per_image": median(each)})
            print(f"  {name} {value}: {statistics.median(each):.2f} ms per image", flush=True)
    return rows


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that the operators called under it read and write, views aside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        return out


def limit() -> Figures:
    """The least time that a training image can take: what it needs over what the machine gives.

    Operations are those of convolutions and matrix products, as PyTorch's own counter has them;
    bytes are the inputs and outputs of every operator, as eager execution moves them.
    """
    step = training_step()
    step()
    with FlopCounterMode(display=False) as flops:
        step()
    with ByteCounter() as moved:
        step()
    a = torch.rand(4096, 4096, device=DEVICE, dtype=torch.bfloat16 if BF16 else torch.float32)
    source = torch.rand(2**26, device=DEVICE)  # 256 MiB, more than any cache
    target = torch.empty_like(source)
    rate = 2 * 4096**3 / min(seconds(lambda: a @ a, 5, 2))
    bandwidth = 2 * source.nbytes / min(seconds(lambda: target.copy_(source), 5, 2))
    operations = flops.get_total_flops() / BATCH_SIZE
    each = moved.bytes / BATCH_SIZE
    return {
        "operations_per_image": operations,
        "bytes_per_image": each,
        "operations_per_s": rate,
        "bytes_per_s": bandwidth,
        "images_per_s_by_operations": rate / operations,
        "images_per_s_by_bytes": bandwidth / each,
    }


def help_time(repeats: int) -> Figures:
    """Seconds of `python train.py --help` and of the imports that any such command line needs."""
    commands = {
        "help": [sys.executable, "train.py", "--help"],
        "imports": [sys.executable, "-c", "import torch, lightning.pytorch.cli"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 + repeats):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=FOLDER.parent)
            taken[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(taken["help"][1:], taken["imports"][1:], strict=True)]
    return {**{name: median(found[1:]) for name, found in taken.items()}, "ratio": median(ratios)}


def machine() -> Figures:
    """Where and with what this was measured."""
    git = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "precision": "bf16" if BF16 else "float32",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def cpu_name() -> str:
    """As Linux knows it, or else Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def median(values: list[float]) -> Figures:
    """Their median, and the quartiles between which half of them lie."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def spread(figure: Figures | float, form: str = ",.0f") -> str:
    """`median (lower to upper quartile)`."""
    if not isinstance(figure, dict):
        return format(figure, form)
    low, middle, high = (format(figure[name], form) for name in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"


def table(header: str, rows: list[list[str]]) -> str:
    """A table in Markdown."""
    columns = header.count("|") + 1
    lines = [header, " | ".join(["---"] * columns), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def sides_table(found: Figures) -> str:
    header = "side | training, images/s | first step after, s | peak memory, MiB"
    columns = {"images_per_s": ",.0f", "first_step_s": ".1f", "peak_mib": ",.0f"}
    return table(
        header,
        [
            [side, *(spread(found[side][name], form) for name, form in columns.items())]
            for side in SIDES
        ],
    )


def ratios_table(results: Figures) -> str:
    sides, data, shown = results["sides"], results["data"], results["evaluation"]
    rows = [[name, spread(sides[name], ".2f")] for name in ("C/A", "C/B", "C/D")]
    rows += [
        ["data alone / torchvision's", spread(data["ratio"], ".1f")],
        ["evaluation / the note's network", spread(shown["ratio"], ".2f")],
        ["--help / the imports alone", spread(results["help"]["ratio"], ".2f")],
        ["validation / epoch", spread(sides["validation_share"], ".1%")],
    ]
    return table("ratio | ", rows)


def rates_table(results: Figures) -> str:
    data, shown = results["data"], results["evaluation"]
    rows = [
        ["data alone", spread(data["ours"]), spread(data["torchvision"])],
        ["evaluation", spread(shown["ours"]), spread(shown["note"])],
    ]
    return table("images/s | this project | the note's way", rows)


def limit_table(most: Figures) -> str:
    rows = [
        [
            name,
            f"{most[f'{name}_per_image'] / 1e6:,.0f} M",
            f"{most[f'{name}_per_s'] / 1e9:,.0f} G/s",
            f"{most[f'images_per_s_by_{name}']:,.0f}",
        ]
        for name in ("operations", "bytes")
    ]
    return table("limit | a training image takes | the machine does | images/s", rows)


def scaling_table(rows: list[Figures]) -> str:
    return table(
        "of the network | value | training, ms/image",
        [[*map(str, next(iter(row.items()))), spread(row["ms_per_image"], ".2f")] for row in rows],
    )


def report(results: Figures) -> str:
    """What was measured, as tables: median (quartiles)."""
    parts = [
        ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value) + "\n",
        sides_table(results["sides"]),
        ratios_table(results),
        rates_table(results),
        limit_table(results["limit"]),
        scaling_table(results["scaling"]),
    ]
    return "\n".join(parts)


def main() -> None:
    """Measures everything, prints the tables and writes the figures."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data.root", dest="root", default="data", help="where CIFAR-10 lies")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--output", type=Path, default=Path("speed.json"), help="the figures")
    arguments, options = parser.parse_known_args()
    if any(option.startswith("--trainer.precision") for option in options):
        parser.error("trainer.precision is the hardware's here: the sides would differ in it")
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"output is {str(arguments.output)!r}: there is no such folder")
    root, quick = arguments.root, arguments.quick
    rounds = 2 if quick else 24
    # Of a GPU's epochs, which are short, the whole.
    batches = EPOCH // BATCH_SIZE if DEVICE.type == "cuda" else 10
    results: Figures = {
        "command": " ".join(sys.argv),
        "machine": machine(),
        "sides": sides(root, rounds, batches, options),
        "data": data_path(root, rounds, 1_000),
        "evaluation": evaluation(root, rounds, 1_000),
        "help": help_time(2 if quick else 10),
        "limit": limit(),
        "scaling": scaling(quick),
    }
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
