"""How accurate a recipe is: trains recipes with several seeds, tests each run, prints the table.

    python benchmarks/accuracy.py recipes/fast.yaml recipes/strong.yaml --seeds 0 1 2
    python benchmarks/accuracy.py recipes/fast.yaml --beside_original -- --data.val_size 0
    python benchmarks/accuracy.py              # trains nothing: the table of all results

Options behind `--` go to `fit`. Each run adds a line to benchmarks/results/accuracy.jsonl and is
not repeated; an interrupted one resumes. The best checkpoint by validation accuracy is tested, or
the last of a run without validation.
"""

import argparse
import datetime
import json
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).absolute().parents[1]
RESULTS = PROJECT / "benchmarks" / "results" / "accuracy.jsonl"
HEADER = ("recipe", "data", "device", "n", "val, %", "test, %", "mirrored, %", "fit, min")
Row = dict[str, Any]


def read_rows(results: Path) -> list[Row]:
    """The runs that were measured."""
    lines = results.read_text().splitlines() if results.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def train_py(*arguments: str) -> None:
    """Runs a command of train.py."""
    subprocess.run([sys.executable, str(PROJECT / "train.py"), *arguments], check=True)


def measure(recipe: Path, seed: int, options: list[str], folder: Path, data_root: str) -> Row:
    """Trains a run in `folder`, or resumes an interrupted one, and tests it."""
    place = ["--trainer.default_root_dir", str(folder), "--data.root", data_root]
    last = "lightning_logs/*/checkpoints/last.ckpt"
    if list(folder.glob(last)):
        train_py("fit", "--ckpt", "last", *place)  # ends at once if the run is complete
    else:
        train_py("fit", "--config", str(recipe), *options, *place, "--seed_everything", str(seed))
    (checkpoint,) = folder.glob(last)
    run = checkpoint.parents[1]
    row = describe(recipe.stem, seed, options, run) | {"val": None}
    config = yaml.safe_load((run / "config.yaml").read_text())
    if config["data"]["val_size"]:
        row["val"] = evaluate("validate", run, place)["acc"]
    report = evaluate("test", run, place)
    return row | {"test": report["acc"], "test_mirrored": report["acc_mirrored"]}


def evaluate(verb: str, run: Path, place: list[str]) -> dict[str, float]:
    """Percent of the images that the best checkpoint gets right, also averaged with mirrored."""
    train_py(verb, "--ckpt", "best", "--mirror", *place)
    report = json.loads((run / "checkpoints" / f"{verb}.json").read_text())
    return {name: round(100 * report[name], 2) for name in ("acc", "acc_mirrored")}


def describe(recipe: str, seed: int, options: list[str], run: Path) -> Row:
    """What a run was, without its accuracy; `seconds` is None if it was interrupted."""
    starts = json.loads((run / "run.json").read_text())
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


def original_minutes(data_root: str) -> float:
    """Minutes that the original script would take for its 80 epochs, by the speed of six turns."""
    from speed import measure_sides  # slow to import

    speed = measure_sides(["A"], data_root, rounds=6, batches=10, options=[])["A"]
    return 80 * 50_000 / statistics.median(speed) / 60


def spread(values: list[float]) -> str:
    """`92.10 ± 0.15 (91.73 to 92.47)`: mean, standard deviation, 95 % interval of the mean."""
    from scipy.stats import ttest_1samp  # slow to import

    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    mean, std = statistics.fmean(values), statistics.stdev(values)
    interval = ttest_1samp(values, 0).confidence_interval()
    return f"{mean:.2f} ± {std:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def summarize(rows: list[Row]) -> list[tuple[str, ...]]:
    """A line of the table for each recipe, options, data set and device."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name = f"{row['recipe']} {row['options']}".strip()
        device = f"{row['device']}, {row['precision']}"
        groups.setdefault((name, row["dataset"], device), []).append(row)
    lines = []
    for key, group in groups.items():
        values = {
            name: [row[name] for row in group if row.get(name) is not None]
            for name in ("val", "test", "test_mirrored", "seconds")
        }
        seconds = values.pop("seconds")
        minutes = f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "–"
        lines.append((*key, str(len(group)), *map(spread, values.values()), minutes))
    return lines


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and behind `--` those for `fit`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("accuracy_runs"), help="their folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of all results")
    parser.add_argument("--data.root", dest="data_root", default="data")
    beside = "before and after, time the original script: nothing else should run"
    parser.add_argument("--beside_original", action="store_true", help=beside)
    return parser.parse_args(arguments[:end]), arguments[end + 1 :]


def main() -> None:
    # Ends the running command, too: subprocess.run kills it. Its checkpoints are whole.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments, options = parse_arguments(sys.argv[1:])
    original = [original_minutes(arguments.data_root)] if arguments.beside_original else []
    for recipe in arguments.recipes:
        for seed in arguments.seeds:
            key = (recipe.stem, seed, " ".join(options))
            rows = read_rows(arguments.results)
            if key in [(row["recipe"], row["seed"], row["options"]) for row in rows]:
                print(f"{recipe.stem} with seed {seed} is in {arguments.results}: skipped")
                continue
            name = re.sub(r"[^\w.,=-]+", "_", " ".join([recipe.stem, *options]))
            folder = arguments.runs.absolute() / name / f"seed_{seed}"
            row = measure(recipe, seed, options, folder, arguments.data_root)
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    for line in (HEADER, ("---",) * len(HEADER), *summarize(read_rows(arguments.results))):
        print(f"| {' | '.join(line)} |")
    if original:
        original.append(original_minutes(arguments.data_root))
        minutes = " and ".join(f"{each:.0f}" for each in original)
        print(f"80 epochs of the original script, timed before and after: {minutes} minutes here")


if __name__ == "__main__":
    main()
