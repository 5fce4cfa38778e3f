"""Evaluates the saved networks of finished runs again, in fp32 unless told otherwise.

    python scripts/evaluate.py
    python scripts/evaluate.py 56ad96ff82f3 --precision bf16

A run evaluates in the precision that it trains in, bf16 where that is fast. How much of a result
lies in the rounding stands in results/<scale>/evaluation/<name>.csv: val_loss in nats and
val_accuracy in percent of each network in each precision. structured_share is the fraction of its
zeros that lie in whole neurons or channels. What stands there is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track

from pnorm_decay import records
from pnorm_decay.data import DataError
from pnorm_decay.files import write_text
from pnorm_decay.messages import one_line
from pnorm_decay.sparsity import structured_share
from pnorm_decay.training.building import build_data, saved_network
from pnorm_decay.training.evaluation import evaluate
from pnorm_decay.training.identity import run_name
from pnorm_decay.training.machine import make_accelerator, prepare_process
from pnorm_decay.training.settings import ConfigError, Settings, TrainerSettings

COLUMNS = ["run_id", "precision", "val_loss", "val_accuracy", "structured_share"]

console = Console(highlight=False, soft_wrap=True, markup=False)


def saved_networks(
    runs: Path, results: Path, chosen: list[str]
) -> Iterator[tuple[Path, Path, dict[str, Any]]]:
    """(network, CSV file, result) of every finished run, or of those chosen by their run_id."""
    for scale, name, result in records.recorded_runs(runs):
        run_id, ended = result["record"]["run_id"], result["record"]["status"]
        network = runs / scale / name / run_id / records.MODEL_FILE
        if ended == "finished" and network.is_file() and (not chosen or run_id in chosen):
            yield network, results / scale / "evaluation" / f"{name}.csv", result


def settings_of(network: Path, result: dict[str, Any]) -> Settings:
    """The settings of a finished run."""
    if not isinstance(result.get("config"), dict):
        raise ConfigError(f"{network.with_name(records.RESULT_FILE)} holds no config")
    return Settings.from_config(result["config"])


def evaluate_saved(
    network: Path, result: dict[str, Any], device: torch.device, precision: str
) -> dict[str, Any]:
    """The row of a run's saved network, see ``COLUMNS``.

    Raises:
        DataError: the data set is missing, or not the one that the run was evaluated on.
        ConfigError: this version does not understand the run's config, or the network is damaged.
    """
    settings = settings_of(network, result)
    accelerator = make_accelerator(device, precision)
    prepare_process(torch.get_num_threads())
    data = build_data(settings)
    if data.label != result["record"]["data"]:
        was = result["record"]["data"]
        raise DataError(f"{network} was evaluated on {was}, the configured data are {data.label}")
    data.setup(accelerator.device)
    model = saved_network(network, result["config"])
    if settings.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    loss, accuracy = evaluate(accelerator.prepare(model), data, settings.trainer, accelerator)
    values = (result["record"]["run_id"], precision, loss, accuracy, structured_share(model))
    return dict(zip(COLUMNS, values, strict=True))


def recorded(path: Path) -> pd.DataFrame:
    """The evaluations that a CSV file holds, none where there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return records.read_numbers(path, texts=["run_id", "precision"])


def is_recorded(path: Path, result: dict[str, Any], precision: str) -> bool:
    rows = recorded(path)
    same_run = rows["run_id"] == result["record"]["run_id"]
    return bool((same_run & (rows["precision"] == precision)).any())


def record(path: Path, row: dict[str, Any]) -> None:
    """Adds an evaluation to a CSV file."""
    rows = pd.concat([recorded(path), pd.DataFrame([row])])
    rows = rows.sort_values(["run_id", "precision"], ignore_index=True)
    write_text(path, rows.to_csv(index=False, lineterminator="\n"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_ids", nargs="*", metavar="RUN_ID", help="only these (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the CSVs are")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    precision = arguments.precision
    try:
        where = TrainerSettings(steps=1, device=arguments.device, precision=precision)
        device = where.resolve_device()
        where.resolve_precision(device)
        if not arguments.runs.is_dir():
            raise ConfigError(
                f"there is no folder {arguments.runs}; --runs says where the runs are"
            )
        found = list(saved_networks(arguments.runs, arguments.results, arguments.run_ids))
        if unknown := set(arguments.run_ids) - {result["record"]["run_id"] for *_, result in found}:
            lacking = ", ".join(sorted(unknown))
            raise ConfigError(f"no saved network of {lacking} below {arguments.runs}/")
        new = [these for these in found if not is_recorded(*these[1:], precision)]
        console.print(
            f"{len(found)} saved networks below {arguments.runs}/, {len(new)} to evaluate"
        )
        left_out = False
        for network, path, result in track(new, "evaluating", console=console):
            try:
                row = evaluate_saved(network, result, device, precision)
            except (ConfigError, DataError) as error:
                console.print(f"left out: {one_line(error)}")
                left_out = True
                continue
            record(path, row)
            name, was = run_name(settings_of(network, result)), result["record"]
            console.print(
                f"{row['run_id']} {name}: accuracy {row['val_accuracy']:.2f} %, "
                f"in the run {was['val_accuracy']:.2f} % ({was['device']})"
            )
    except (ConfigError, records.RecordError, OSError) as error:
        console.print(f"error: {one_line(error)}")
        sys.exit(2)
    sys.exit(2 if left_out else 0)


if __name__ == "__main__":
    main()
