"""How accurate a recipe is: trains recipes with several seeds, tests each run, prints the table.

    python benchmarks/accuracy.py recipes/fast.yaml recipes/strong.yaml --seeds 0 1 2
    python benchmarks/accuracy.py recipes/fast.yaml --seeds 0 -- --model.layers [9,9,9]
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
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    """Runs a command of train.py; ends with its exit code if it fails."""
    code = subprocess.run([sys.executable, str(PROJECT / "train.py"), *args]).returncode
    if code:
        sys.exit(code)


def measure(recipe: Path, seed: int, options: list[str], folder: Path, data_root: str) -> Row:
    """Trains and tests one run, which lies, or will lie, in `folder`."""
    place = ["--trainer.default_root_dir", str(folder), "--data.root", data_root]
    started = list(folder.glob("lightning_logs/*/checkpoints/last.ckpt"))
    begin = ["--ckpt", "last"] if started else ["--config", str(recipe), *options]
    train_py("fit", *begin, *place, *([] if started else ["--seed_everything", str(seed)]))
    run = max(folder.glob("lightning_logs/*/checkpoints/last.ckpt")).parents[1]
    starts = json.loads((run / "run.json").read_text())
    figures = {"val": None, "test": None, "test_mirrored": None}
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    for stage, verb in (("val", "validate"), ("test", "test")):
        if stage == "val" and has_no_validation(run):
            continue
        train_py(verb, "--ckpt", checkpoint, "--mirror", *place)
        report = json.loads((run / "checkpoints" / f"{verb}.json").read_text())
        figures[stage] = round(100 * report["acc"], 2)
        if stage == "test":
            figures["test_mirrored"] = round(100 * report["acc_mirrored"], 2)
    return row(recipe.stem, seed, options, starts, run) | figures


def has_no_validation(run: Path) -> bool:
    return bool(re.search(r"^  val_size: 0$", (run / "config.yaml").read_text(), re.MULTILINE))


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
        key = (one["recipe"], one["dataset"], one["options"], one["device"])
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
