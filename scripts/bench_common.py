"""What the benchmarks share: what machine they ran on, and how their rows are written."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pnorm_decay import records
from pnorm_decay.files import write_text


def machine() -> dict[str, str | int]:
    """What the numbers were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    compiler = subprocess.run(
        [os.environ.get("CC", "cc"), "--version"], capture_output=True, text=True, check=False
    )
    return {
        "machine": f"{name or platform.processor()} ({platform.machine()})",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": compiler.stdout.partition("\n")[0],
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a benchmark's rows as CSV, atomically."""
    write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def trained_networks(runs: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, network, result) of finished runs that saved a sparse one.

    Of runs with the same experiment, method, p and percent of zeros it is the first.
    """
    seen = set()
    for scale, experiment, result in records.recorded_runs(runs):
        record = result["record"]
        network = runs / scale / experiment / record["run_id"] / records.MODEL_FILE
        if record["status"] != "finished" or not network.exists():
            continue
        percent = round(100 * record["zero_fraction"])
        name = f"{scale}/{experiment} {record['method']} p={record['p']:g} {percent} %"
        if percent >= 50 and name not in seen:
            seen.add(name)
            yield name, network, result


def reset_peak_memory() -> float:
    """Starts a new measurement of the process's peak; its present bytes (0 where not Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return memory("VmRSS")


def memory(field: str) -> float:
    """Bytes of a line of /proc/self/status, 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) * 1024.0 for x in lines if x.startswith(field + ":")), 0.0)
