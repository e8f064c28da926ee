"""How accurate a recipe is: trains recipes with several seeds, tests each run, prints the table.

    python benchmarks/accuracy.py recipes/fast.yaml recipes/strong.yaml --seeds 0 1 2
    python benchmarks/accuracy.py recipes/fast.yaml --seeds 0 -- --model.layers='[9,9,9]'
    python benchmarks/accuracy.py              # trains nothing: the table of what was measured

What stands behind `--` goes to `fit`. Each run adds a line to benchmarks/results/accuracy.jsonl,
and is not repeated; one that was interrupted goes on. The checkpoint that is tested is the one with
the best validation accuracy: the test set has no say in anything. The plain accuracy shows each
image once; that of `--mirror` stands in a column of its own.
"""

import argparse
import datetime
import json
import math
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from scipy.stats import t

PROJECT = Path(__file__).absolute().parents[1]
RESULTS = PROJECT / "benchmarks" / "results" / "accuracy.jsonl"
Row = dict[str, Any]


def read_rows(results: Path) -> list[Row]:
    """The runs that were measured."""
    lines = results.read_text().splitlines() if results.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def train_py(*args: str) -> None:
    """Runs a command of train.py, which on a signal saves its run; ends with its exit code."""
    process = subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *args])
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # terminals send it to both
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def fit(recipe: Path, seed: int, options: list[str], folder: Path, place: list[str]) -> Path:
    """Trains a run, or what an interrupted one lacks; returns the run's folder."""
    from checkpoints import find_checkpoint  # slow to import: only where needed

    logs = folder / "lightning_logs"
    if not list(logs.glob("*/checkpoints/last.ckpt")):
        train_py("fit", "--config", str(recipe), *options, *place, "--seed_everything", str(seed))
    elif not is_finished(find_checkpoint("last", "fit", logs)):
        train_py("fit", "--ckpt", "last", *place)
    return find_checkpoint("last", "fit", logs).parents[1]


def is_finished(last: Path) -> bool:
    from checkpoints import epochs_behind, read_checkpoint  # slow to import: only where needed

    config = yaml.safe_load((last.parents[1] / "config.yaml").read_text())
    return bool(epochs_behind(read_checkpoint(last)) == config["trainer"]["max_epochs"])


def measure(recipe: Path, seed: int, options: list[str], folder: Path, data_root: str) -> Row:
    """Trains and tests one run, which lies, or will lie, in `folder`."""
    place = ["--trainer.default_root_dir", str(folder), "--data.root", data_root]
    run = fit(recipe, seed, options, folder, place)
    config = yaml.safe_load((run / "config.yaml").read_text())
    figures = {"val": None, "test": None, "test_mirrored": None}
    for stage, verb in (("val", "validate"), ("test", "test")):
        if stage == "val" and config["data"]["val_size"] == 0:
            continue
        train_py(verb, "--ckpt", str(run / "checkpoints" / "best.ckpt"), "--mirror", *place)
        report = json.loads((run / "checkpoints" / f"{verb}.json").read_text())
        figures[stage] = round(100 * report["acc"], 2)
        if stage == "test":
            figures["test_mirrored"] = round(100 * report["acc_mirrored"], 2)
    starts = json.loads((run / "run.json").read_text())
    return row(recipe.stem, seed, options, starts, run) | figures


def row(recipe: str, seed: int, options: list[str], starts: list[Row], run: Path) -> Row:
    """What a run was, without its figures; `seconds` is None for one that was interrupted."""
    first = starts[0]
    begun = datetime.datetime.fromisoformat(first["date"]).timestamp()
    ended = (run / "checkpoints" / "last.ckpt").stat().st_mtime
    return {
        "recipe": recipe,
        "seed": seed,
        "options": " ".join(options),
        **{name: first[name] for name in ("commit", "device", "precision", "threads", "versions")},
        "dataset": first["data"]["dataset"],
        "seconds": round(ended - begun) if len(starts) == 1 else None,
    }


def spread(values: list[float]) -> str:
    """`92.10 ± 0.15 (91.73 to 92.47)`: mean, standard deviation, 95 % interval of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    std = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return f"{mean:.2f} ± {std:.2f} ({mean - half:.2f} to {mean + half:.2f})"


def summary(rows: list[Row]) -> list[tuple[str, ...]]:
    """A line of the table for each recipe, data set, options and device."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in rows:
        device = f"{one['device']}, {one['precision']}"
        key = (one["recipe"], one["dataset"], one["options"], device)
        groups.setdefault(key, []).append(one)
    lines = []
    for (recipe, dataset, options, device), group in groups.items():
        cells = []
        for name, scale in (("val", 1), ("test", 1), ("test_mirrored", 1), ("seconds", 1 / 60)):
            values = [one[name] * scale for one in group if one.get(name) is not None]
            minutes = f"{statistics.fmean(values):.1f}" if values else "–"
            cells.append(minutes if name == "seconds" or not values else spread(values))
        name = f"{recipe} {options}".strip()
        lines.append((name, dataset, device, str(len(group)), *cells))
    return lines


def show(rows: list[Row]) -> None:
    """Prints the table as Markdown, or nicely in a terminal."""
    heads = ("recipe", "data", "device", "n", "val, %", "test, %", "mirrored, %", "fit, min")
    if not sys.stdout.isatty():
        for line in (heads, ("---",) * len(heads), *summary(rows)):
            print(f"| {' | '.join(line)} |")
        return
    table = Table(*heads)
    for line in summary(rows):
        table.add_row(*line)
    Console().print(table)


def main() -> None:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    ours, options = sys.argv[1:end], sys.argv[end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("accuracy_runs"), help="their folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data_root", default="data")
    args = parser.parse_args(ours)
    for recipe in args.recipes:
        if not recipe.is_file():
            parser.error(f"there is no recipe {str(recipe)!r}")
    for recipe in args.recipes:
        for seed in args.seeds:
            known = {(r["recipe"], r["seed"], r["options"]) for r in read_rows(args.results)}
            if (recipe.stem, seed, " ".join(options)) in known:
                said = f"{recipe.stem} with seed {seed} stands in {args.results}"
                print(f"{said}, and is not measured again (--results names another file)")
                continue
            name = re.sub(r"[^\w.,=-]+", "_", " ".join([recipe.stem, *options]))
            folder = args.runs.absolute() / name / f"seed_{seed}"
            one = measure(recipe, seed, options, folder, args.data_root)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(json.dumps(one) + "\n")
    show(read_rows(args.results))


if __name__ == "__main__":
    main()
