"""What the benchmarks share: what machine they ran on, and how their rows are written."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pnorm_decay import records
from pnorm_decay.files import write_text
from pnorm_decay.training.settings import ConfigError, bearable

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NO_KERNELS = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")  # of a profile's device events


def composed(overrides: list[str]) -> DictConfig:
    """The config of a run, as `experiments/train.py` would compose it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def device_and_output(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, recorded: Path
) -> tuple[torch.device, Path]:
    """What ``--device`` and ``--output`` say; an error of the parser where that cannot be.

    Args:
        parser: tells of the error.
        arguments: with ``device`` and ``output``.
        recorded: the output where none is given, which is on a CPU alone.
    """
    name = arguments.device
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"--device {name}: must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {name}: torch sees no CUDA device here")
    if device.type == "cuda" and arguments.output is None:
        parser.error("--output is needed on a GPU: what is recorded was measured on a CPU")
    return device, arguments.output or recorded


def thread_count(text: str) -> int:
    """A number of CPU threads from a command line, for ``argparse``."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a positive whole number")
    try:
        return bearable(int(text), "--threads")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def synchronize(device: torch.device) -> None:
    """Waits until a device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels_of(events: Iterable[Any]) -> int:
    """How many kernels the device ran, of a profile's events: no copies, no marks of ranges."""
    return sum(
        event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(NO_KERNELS)
        for event in events
    )


def kernel_launches(step: Callable[[], object], device: torch.device, steps: int = 3) -> float:
    """Kernels that a step launches on a GPU, counted by torch's profiler."""
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        synchronize(device)
    return round(kernels_of(recorded.events()) / steps, 2)


def machine(device: torch.device | None = None) -> dict[str, str | int]:
    """What the numbers were taken on: the machine and, where it is one, the GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    compiler = ""
    with contextlib.suppress(OSError):  # there is none
        command = [os.environ.get("CC", "cc"), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        compiler = done.stdout.partition("\n")[0]
    on_gpu = device is not None and device.type == "cuda"
    return {
        **({"device": torch.cuda.get_device_name(device)} if on_gpu else {}),
        "machine": f"{name or platform.processor()} ({platform.machine()})",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": compiler,
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
