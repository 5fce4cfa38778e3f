"""Trains one recorded run of each experiment again, and compares it with its record.

It also evaluates the networks in results/networks/, which `save_sparse` wrote under the names
<run_id>.safetensors.

    python scripts/verify.py
    python scripts/verify.py --longest 900

Of each experiment whose data are there it takes the most accurate run of pWD with seed 0 that took
less than --longest seconds. Machines round differently, so that a run is not the same everywhere:
a difference of accuracy counts if it is more than three standard deviations of the recorded seeds
of pWD, one of sparsity if it is more than 0.05. Of a network, which is only evaluated again, 0.2 %
and 0.001 count.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from pnorm_decay import sparsity
from pnorm_decay.data import DataError, Dataset
from pnorm_decay.deploy import SparseFileError, load_sparse
from pnorm_decay.figures.explorer import command
from pnorm_decay.figures.loading import SCALES, Experiment, average_seeds, load_all
from pnorm_decay.messages import files_reported, one_line
from pnorm_decay.training.building import build_data, build_model
from pnorm_decay.training.evaluation import evaluate
from pnorm_decay.training.machine import make_accelerator
from pnorm_decay.training.settings import ConfigError, Settings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

console = Console(highlight=False, soft_wrap=True, markup=False)

SPARSITY_ALLOWED = 0.05
NETWORK_ALLOWED = 0.2, 0.001  # accuracy in percent, sparsity
# The standard deviation, in percent, of an experiment that is recorded with one seed.
UNKNOWN_SPREAD = 1.0


def chosen_run(experiment: Experiment, longest: float) -> dict[str, Any] | None:
    """The recorded run to repeat, None where all take too long."""
    runs = experiment.finished
    runs = runs[runs["method"].str.startswith("pwd") & (runs["seed"] == 0)]
    runs = runs[runs["seconds"] <= longest].sort_values("val_accuracy", ascending=False)
    return None if runs.empty else {str(k): v for k, v in runs.iloc[0].items()}


def spread(experiment: Experiment) -> float:
    """The standard deviation of pWD's accuracy over seeds, in percent: the settings' mean one."""
    runs = experiment.finished
    settings = average_seeds(runs[runs["method"].str.startswith("pwd")])
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
    try:
        recorded_data(settings_of(name, run), run)
    except DataError as error:
        console.print(f"{name}: left out. {one_line(error)}")
        return True
    except ConfigError as error:
        console.print(f"{name}: error: {one_line(error)}")
        return False
    with tempfile.TemporaryDirectory() as folder:
        record = train(experiment, run, folder)
    if isinstance(record, str):
        console.print(f"{name}: error: {record}")
        return False
    if record["status"] != "finished":
        console.print(f"    NOT AS RECORDED: {record['reason']}")
        return False
    return is_as_recorded(run, record, 3 * spread(experiment), SPARSITY_ALLOWED)


def is_as_recorded(
    run: Mapping[str, Any], now: Mapping[str, float], allowed: float, of_sparsity: float
) -> bool:
    """Prints what was recorded of a run, what is found now, and whether they are alike."""
    differences = {what: now[what] - run[what] for what in ("val_accuracy", "sparsity")}
    same = (
        abs(differences["val_accuracy"]) <= allowed and abs(differences["sparsity"]) <= of_sparsity
    )
    for what, unit, digits in (("val_accuracy", " %", 2), ("sparsity", "", 4)):
        console.print(
            f"    {what}: record {run[what]:.{digits}f}{unit}, now {now[what]:.{digits}f}{unit}, "
            f"difference {differences[what]:+.{digits}f}{unit}"
        )
    verdict = "as recorded" if same else "NOT AS RECORDED"
    console.print(f"    {verdict} (up to {allowed:.2f} % and {of_sparsity} count as alike)")
    return same


def settings_of(name: str, run: Mapping[str, Any]) -> Settings:
    """The settings of a recorded run.

    Raises:
        ConfigError: this version does not know the run's method, or refuses a value.
    """
    words = shlex.split(command(name, run) or "")
    if not words:
        raise ConfigError(f"no command repeats a run of {run['method']}")
    own = [f"experiment_name={name}", "sweep_name=none"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return Settings.from_config(compose("train", [*words[2:], *own]))


def recorded_data(settings: Settings, run: Mapping[str, Any]) -> Dataset:
    """The data of a recorded run, set up on the CPU.

    Raises:
        DataError: they are missing, or others than those of the record.
    """
    data = build_data(settings)
    data.setup(torch.device("cpu"))
    if data.label != run["data"]:
        raise DataError(f"It was recorded on {run['data']}, here are {data.label}")
    return data


def verify_network(path: Path, experiments: list[Experiment]) -> bool:
    """Evaluates a shipped network and prints what came out; False where it is not as recorded."""
    for experiment in experiments:
        runs = experiment.finished
        found = runs[runs["run_id"] == path.stem].to_dict("records")
        if found:
            name = f"{experiment.scale}/{experiment.name}"
            run = {str(key): value for key, value in found[0].items()}
            console.print(f"{path}: {name}, {run['method']}, evaluated in fp32 ...")
            try:
                now = evaluate_network(path, name, run)
            except DataError as error:
                console.print(f"{path}: left out. {one_line(error)}")
                return True
            except (ConfigError, SparseFileError, OSError) as error:
                console.print(f"{path}: error: {one_line(error)}")
                return False
            return is_as_recorded(run, now, *NETWORK_ALLOWED)
    console.print(f"{path}: error: no recorded run has the id {path.stem}")
    return False


def evaluate_network(path: Path, name: str, run: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy in percent and sparsity of a sparse file.

    Raises:
        ConfigError: this version does not know the run's method.
        DataError: the data set is missing, or another one than was recorded.
        SparseFileError: the file is damaged or of another network.
    """
    settings = settings_of(name, run)
    data = recorded_data(settings, run)
    accelerator = make_accelerator(torch.device("cpu"), "fp32")
    model = build_model(settings, data)
    load_sparse(path, into=model)
    _, accuracy = evaluate(model, data, settings.trainer, accelerator)
    return {"val_accuracy": accuracy, "sparsity": sparsity(model)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the CSVs are")
    parser.add_argument(
        "--longest", type=float, default=100, help="seconds that a run may have taken (default 100)"
    )
    args = parser.parse_args()
    if not args.longest > 0:
        parser.error(f"--longest {args.longest:g}: must be positive")
    experiments, errors = load_all(args.results, SCALES)
    same = [verify(experiment, args.longest) for experiment in experiments]
    networks = sorted((args.results / "networks").rglob("*.safetensors"))
    same += [verify_network(path, experiments) for path in networks]
    for error in errors:
        console.print(f"error: {one_line(error)}")
    sys.exit(2 if errors else 0 if all(same) else 1)


if __name__ == "__main__":
    with files_reported(console):
        main()
