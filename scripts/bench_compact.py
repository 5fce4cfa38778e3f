"""Measures how much of trained sparse networks `compact` removes: parameters, multiply-adds, time.

The networks are those in results/networks/, and of those below the folder of runs one of each
experiment, method, p and percent of zeros. Multiply-adds are of one input's matrix products and
convolutions, attention's own left out; times are medians of one forward pass in fp32, full and
compacted network by turns.

    python scripts/bench_compact.py
    python scripts/bench_compact.py --runs ../other/runs --batch-sizes 1 64
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench_common import machine, trained_networks, write_rows
from pnorm_decay import records
from pnorm_decay.data import DataError
from pnorm_decay.deploy import CompactError, SparseFileError, compact, load_sparse
from pnorm_decay.sparsity import structured_share, zero_fraction
from pnorm_decay.training.building import build_data, build_model, saved_network
from pnorm_decay.training.settings import ConfigError, Settings
from verify import settings_of

console = Console(highlight=False)


def shipped_networks(results: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, sparse file, config) of the networks in ``results/networks`` that are recorded."""
    for path in sorted((results / "networks").rglob("*.safetensors")):
        experiment = "/".join(path.parent.parts[-2:])
        try:
            runs = records.read(results / f"{experiment}.csv")
            found = runs[runs["run_id"] == path.stem].to_dict("records")
            if not found:
                raise ConfigError(f"no recorded run has the id {path.stem}")
            run = {str(column): value for column, value in found[0].items()}
            config = settings_of(experiment, run).config
        except (ConfigError, records.RecordError) as error:
            console.print(f"{path} is left out: {error}")
            continue
        name = f"{experiment} {run['method']} p={run['p']:g} {100 * run['sparsity']:.0f} %"
        yield f"{name} {path.stem}", path, config


def load(network: Path, config: dict[str, Any], batch_size: int) -> tuple[nn.Module, Tensor]:
    """A saved network, and a batch of its data."""
    settings = Settings.from_config(config)
    data = build_data(settings)
    data.setup(torch.device("cpu"))
    batch = data.train_batch(0, batch_size, config["seed"])[0]
    if network.suffix != ".safetensors":
        return saved_network(network, config), batch
    model = build_model(settings, data)
    load_sparse(network, into=model)
    return model.eval(), batch


@torch.no_grad()
def multiply_adds(model: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(inputs[:1])
    return counter.get_total_flops() // 2


@torch.no_grad()
def milliseconds(models: list[nn.Module], inputs: Tensor, seconds: float) -> list[float]:
    """The median time of each model's forward pass, taken by turns."""
    times: list[list[float]] = [[] for _ in models]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(inputs)
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure(
    name: str, network: Path, config: dict[str, Any], batch_size: int, seconds: float
) -> dict[str, Any]:
    model, inputs = load(network, config, batch_size)
    small = compact(model, inputs[:2])
    before, after = milliseconds([model, small], inputs, seconds)
    adds = [multiply_adds(each, inputs) for each in (model, small)]
    return {
        "network": name,
        "sparsity": round(zero_fraction(model), 4),
        "structured_share": round(structured_share(model), 4),
        "batch_size": batch_size,
        "parameters": size(model),
        "parameters_left": round(size(small) / size(model), 4),
        "multiply_adds": adds[0],
        "multiply_adds_left": round(adds[1] / adds[0], 4),
        "milliseconds": round(before, 3),
        "compact_milliseconds": round(after, 3),
        "speedup": round(before / after, 3),
        **machine(),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title="What compact leaves of trained networks")
    table.add_column("network")
    for column in ("batch", "zeros", "params\nleft", "mult-adds\nleft", "ms", "speedup"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shares = (f"{row[key]:.1%}" for key in ("parameters_left", "multiply_adds_left"))
        took = f"{row['milliseconds']:.2f} -> {row['compact_milliseconds']:.2f}"
        table.add_row(
            row["network"], str(row["batch_size"]), f"{row['sparsity']:.1%}", *shares, took,
            f"{row['speedup']:.2f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where networks/ is")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument("--output", type=Path, default=Path("results/bench/compact.csv"))
    arguments = parser.parse_args()
    if min(arguments.batch_sizes) < 1:
        parser.error("--batch-sizes must be at least 1")
    rows = []
    own = (
        (name, network, result["config"])
        for name, network, result in trained_networks(arguments.runs)
    )
    for name, network, config in chain(shipped_networks(arguments.results), own):
        for batch_size in arguments.batch_sizes:
            try:
                seconds = arguments.seconds
                rows.append(measure(name, network, config, batch_size, seconds))
            except (DataError, ConfigError, CompactError, SparseFileError) as error:
                console.print(f"{name} is left out: {error}")
    if not rows:
        parser.exit(
            2, f"error: no sparse network in {arguments.results}/networks/ or {arguments.runs}/\n"
        )
    show(rows)
    write_rows(arguments.output, rows)
    console.print(f"{arguments.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
