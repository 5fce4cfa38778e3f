"""Measures how many runs an hour a sweep gets done, for several ways to use the machine's cores.

Each way does the same small sweep with `experiments/train.py -m`, in processes of its own, from
their start to the last finished run; the ways take turns. The first way is what others are
compared with.

    python scripts/bench_sweep.py
    python scripts/bench_sweep.py --ways 1x2 2x1 4x1 --experiments demo/resnet_digits
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench_common import machine, write_rows

TRAIN = Path(__file__).resolve().parents[1] / "experiments" / "train.py"
SWEEP = ["sweep=pwd", "optimizer.p=0.5,0.8,1.0,1.5", "optimizer.lr=1e-3,1e-2"]
EXPERIMENTS = {
    "demo/resnet_digits": ["optimizer.lambda_p=1e-2"],
    "demo/nanogpt_pydoc": ["optimizer.lambda_p=1e-2"],
    "cpu/nanogpt_shakespeare": ["optimizer.lambda_p=1e-2", "trainer.steps=200"],
}

console = Console(highlight=False)


def way(text: str) -> tuple[int, int]:
    """Workers and threads of each, from "2x1"."""
    try:
        workers, threads = map(int, text.split("x"))
    except ValueError:
        workers = threads = 0
    if workers < 1 or threads < 1:
        raise argparse.ArgumentTypeError(f"must be WORKERSxTHREADS, such as 2x1, not {text!r}")
    return workers, threads


def ways_of_this_machine() -> list[tuple[int, int]]:
    """One run with all cores, a run a core, two runs a core, and all runs with all cores."""
    cores = os.cpu_count() or 1
    return list(dict.fromkeys([(1, cores), (cores, 1), (2 * cores, 1), (cores, cores)]))


def seconds_of(experiment: str, workers: int, threads: int) -> tuple[float, int]:
    """Seconds of one sweep, and how many runs it finished."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(TRAIN), "-m", f"experiment={experiment}", *SWEEP]
        command += EXPERIMENTS[experiment]
        command += [f"hydra.launcher.n_jobs={workers}", f"trainer.threads={threads}"]
        command += [f"runs_dir={scratch}", "skip_recorded=false"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr)
        return seconds, len(list(Path(scratch).glob("*/*/*/result.json")))


def measure(experiment: str, ways: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """One row a way."""
    rates: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    for workers, threads in track(ways * rounds, description=experiment, console=console):
        seconds, runs = seconds_of(experiment, workers, threads)
        rates[workers, threads].append(3600 * runs / seconds)
    medians = {way: statistics.median(values) for way, values in rates.items()}
    return [
        {
            "experiment": experiment,
            "workers": workers,
            "threads_each": threads,
            "runs_per_hour": round(rate, 1),
            "ratio": round(rate / medians[ways[0]], 3),
            "rounds": rounds,
            **{key: value for key, value in machine().items() if key != "threads"},
        }
        for (workers, threads), rate in medians.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title="A sweep of eight runs")
    for column in ("experiment", "workers", "threads each", "runs per hour", "ratio"):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    for row in rows:
        numbers = (f"{row['runs_per_hour']:,.0f}", f"{row['ratio']:.2f}")
        table.add_row(row["experiment"], str(row["workers"]), str(row["threads_each"]), *numbers)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME"
    )
    parser.add_argument("--ways", nargs="+", type=way, default=ways_of_this_machine())
    parser.add_argument("--rounds", type=int, default=3, help="sweeps of each way")
    parser.add_argument("--output", type=Path, default=Path("results/bench/sweep.csv"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    rows = [
        row
        for experiment in arguments.experiments
        for row in measure(experiment, arguments.ways, arguments.rounds)
    ]
    show(rows)
    write_rows(arguments.output, rows)
    console.print(f"{arguments.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
