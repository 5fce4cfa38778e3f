"""Trains one recorded run of each experiment again, and compares it with its record.

    python scripts/verify.py
    python scripts/verify.py --longest 900

Of each experiment whose data are there it takes the most accurate run of pWD with seed 0 that took
less than --longest seconds. Machines round differently, so that a run is not the same everywhere:
a difference of accuracy counts if it is more than three standard deviations of the recorded seeds,
one of sparsity if it is more than 0.05.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from pnorm_decay.figures.explorer import command
from pnorm_decay.figures.loading import SCALES, Experiment, average_seeds, load_all

console = Console(highlight=False, soft_wrap=True, markup=False)

SPARSITY_ALLOWED = 0.05
# The standard deviation, in percent, of an experiment that is recorded with one seed.
UNKNOWN_SPREAD = 1.0


def chosen_run(experiment: Experiment, longest: float) -> dict[str, Any] | None:
    """The recorded run to repeat, None where all take too long."""
    runs = experiment.finished
    runs = runs[runs["method"].str.startswith("pwd") & (runs["seed"] == 0)]
    runs = runs[runs["seconds"] <= longest].sort_values("val_accuracy", ascending=False)
    return None if runs.empty else {str(k): v for k, v in runs.iloc[0].items()}


def spread(experiment: Experiment) -> float:
    """The standard deviation of the accuracy over seeds, in percent: the settings' mean one."""
    settings = average_seeds(experiment.finished)
    repeated = settings.loc[settings["seeds"] > 1, "val_accuracy_std"]
    return UNKNOWN_SPREAD if repeated.empty else float((repeated**2).mean() ** 0.5)


def train(experiment: Experiment, run: dict[str, Any], folder: str) -> dict[str, Any] | str:
    """The record of the run done again, or why there is none."""
    words = shlex.split(command(f"{experiment.scale}/{experiment.name}", run) or "")
    own = [f"runs_dir={folder}", "skip_recorded=false", "logger=none"]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}  # as in a sweep
    done = subprocess.run(
        [sys.executable, *words[1:], *own],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    results = sorted(Path(folder).glob(f"{experiment.scale}/{experiment.name}/*/result.json"))
    if done.returncode or not results:
        return (done.stdout.strip().splitlines() or ["it gave no result"])[-1]
    record: dict[str, Any] = json.loads(results[0].read_text())["record"]
    return record


def verify(experiment: Experiment, longest: float) -> bool:
    """Repeats one run and prints what came out; False where it differs by more than seeds do."""
    name = f"{experiment.scale}/{experiment.name}"
    run = chosen_run(experiment, longest)
    if run is None:
        console.print(f"{name}: left out, its runs take more than {longest:g} s (see --longest)")
        return True
    shown = " ".join(
        f"{column}={run[column]:g}"
        for column in ("p", "lambda_p", "lr", "target_sparsity")
        if not pd.isna(run[column])
    )
    console.print(f"{name}: {run['method']} {shown}, recorded in {run['seconds']:.0f} s ...")
    with tempfile.TemporaryDirectory() as folder:
        record = train(experiment, run, folder)
    if isinstance(record, str):
        if "to a local copy" in record:  # the data are not there
            console.print(f"{name}: left out. {record}")
            return True
        console.print(f"{name}: error: {record}")
        return False
    if record["data"] != run["data"]:
        console.print(f"{name}: left out, recorded on {run['data']}, here are {record['data']}")
        return True
    if record["status"] != "finished":
        console.print(f"    NOT AS RECORDED: {record['reason']}")
        return False
    allowed = 3 * spread(experiment)
    difference = record["val_accuracy"] - run["val_accuracy"]
    same = (
        abs(difference) <= allowed and abs(record["sparsity"] - run["sparsity"]) <= SPARSITY_ALLOWED
    )
    verdict = "as recorded" if same else "NOT AS RECORDED"
    for what, unit, scale, digits in (("val_accuracy", " %", 1, 2), ("sparsity", "", 1, 4)):
        console.print(
            f"    {what}: record {run[what] * scale:.{digits}f}{unit}, "
            f"now {record[what] * scale:.{digits}f}{unit}, "
            f"difference {(record[what] - run[what]) * scale:+.{digits}f}{unit}"
        )
    console.print(f"    {verdict} (up to {allowed:.2f} % and {SPARSITY_ALLOWED} count as alike)")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the CSVs are")
    parser.add_argument(
        "--longest", type=float, default=100, help="seconds that a run may have taken (default 100)"
    )
    args = parser.parse_args()
    experiments, errors = load_all(args.results, SCALES)
    same = [verify(experiment, args.longest) for experiment in experiments]
    for error in errors:
        console.print(f"error: {error}")
    sys.exit(2 if errors else 0 if all(same) else 1)


if __name__ == "__main__":
    main()
