"""What scripts/gpu.py writes of its hour for people to read."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pnorm_decay import compiler
from pnorm_decay.training.settings import bf16_is_fast

REPORT = "report.md"
TITLES = {
    "tests": "the tests that need CUDA",
    "optimizer": "a step of every optimizer",
    "training": "a training step with every optimizer",
    "hour": "the paper's experiments, those that settle most first",
}
OPTIONAL = ("torchvision", "wandb", "matplotlib", "scikit-learn", "triton")
RESULT = re.compile(r"^(tests/\S+?::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.M)
UNREAD = re.compile(r"^ERROR (tests/\S+\.py)(?!\S)", re.M)
# What the authors' public run logs say of the same settings, in percent (docs/report.md).
PUBLISHED = {
    ("adamw", None): "94.05 to 94.23",
    ("magnitude", 0.95): "92.33",
    ("magnitude", 0.99): "85.74",
    ("pwd", 0.004): "93.63 to 94.21 at sparsity 0.62 to 0.68",
    ("pwd", 0.008): "93.08 at sparsity 0.953",
}
GOALS = "at most 1.1 times fused AdamW's step and no more kernels than it; 20,000 images a second"
ENDED = ("finished", "diverged")  # statuses of runs that are not done again
STEP = ("model", "optimizer", "p", "sparsity", "milliseconds", "ratio", "host_milliseconds")
COLUMNS = {  # of the benchmarks' CSV files, shown in the report
    "optimizer": (*STEP, "kernel_launches", "first_step_seconds", "peak_extra_megabytes"),
    "training": (
        *("case", "loop", "per_second", "unit", "step_ratio"),
        *("kernel_launches", "peak_megabytes", "precision"),
    ),
}
HOUR = [  # columns of the hour's runs
    *("experiment", "run", "status", "accuracy, %"),
    *("sparsity", "seconds", "authors' logs, %"),
]


def environment() -> list[str]:
    """What this machine and this Python have, a fact a line."""
    on_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    names = [f"{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}" for g in gpus]
    nvrtc = "not looked for"
    if on_gpu:
        try:
            compiler._nvrtc()
            nvrtc = "found"
        except OSError as error:
            nvrtc = f"missing, so that the fused step is not used: {error}"
    has_bf16 = on_gpu and bf16_is_fast(torch.device("cuda"))
    missing = [name for name in OPTIONAL if not importlib.util.find_spec(import_name(name))]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpu_software = f"CUDA {torch.version.cuda}, driver {driver()}" if on_gpu else "no CUDA"
    return [
        f"GPU: {'; '.join(names) or 'none'}",
        f"torch {torch.__version__}, {gpu_software}",
        f"Python {platform.python_version()}, {platform.platform()}",
        f"{os.cpu_count()} CPU cores, {memory:.0f} GiB of memory",
        f"bf16: {'in hardware' if has_bf16 else 'not on this GPU' if on_gpu else 'not on a GPU'}",
        f"run-time compiler (NVRTC): {nvrtc}",
        f"C compiler: {shutil.which(os.environ.get('CC', 'cc')) or 'none (not needed)'}",
        f"packages that are missing and not needed: {', '.join(missing) or 'none'}",
    ]


def import_name(package: str) -> str:
    return {"scikit-learn": "sklearn"}.get(package, package)


def driver() -> str:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return "unknown"


def test_results(log: str) -> dict[str, Any]:
    """How many tests passed, failed, were skipped, and which failed, from what pytest said."""
    found = dict(RESULT.findall(log))
    counts: dict[str, int] = {}
    for result in found.values():
        counts[result.lower()] = counts.get(result.lower(), 0) + 1
    failed = [name for name, result in found.items() if result in ("FAILED", "ERROR")]
    unread = set(UNREAD.findall(log))
    if unread:
        counts["files that could not be imported"] = len(unread)
    note = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return {"note": note or "no test ended", "failed": failed}


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join('' if x is None else str(x) for x in row)} |" for row in lines)


def csv_table(path: Path, columns: Sequence[str]) -> str:
    """The columns of a CSV file that are there, as a Markdown table."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    shown = frame[[name for name in columns if name in frame.columns]]
    return table(shown.to_numpy().tolist(), list(shown.columns))


def number(value: Any, form: str) -> str:
    """A value of a record, empty where there is none."""
    return "" if value is None or pd.isna(value) else format(value, form)


def published(row: dict[str, Any]) -> str:
    """What the authors' logs say of this run's settings."""
    if row["overrides"] is not None and not pd.isna(row["overrides"]):
        return ""
    key = row["target_sparsity"] if row["method"] == "magnitude" else None
    key = row["lambda_p"] if row["method"] == "pwd" and row["p"] == 0.8 else key
    key = None if key is not None and pd.isna(key) else key
    return PUBLISHED.get((row["method"], key), "")


def hour_rows(state: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A row a run of the list: what came out, or how far it is."""
    by_id = {row["run_id"]: row for of_one in rows.values() for row in of_one}
    found = []
    for run in state["hour"]:
        row = by_id.get(run["run_id"])
        if row is None:
            found.append([run["experiment"], run["name"], "not done", "", "", "", ""])
            continue
        is_image = run["experiment"].startswith("resnet18")
        found.append(
            [
                run["experiment"],
                run["name"],
                row["status"],
                number(row["val_accuracy"], ".2f"),
                number(row["sparsity"], ".4f"),
                number(row["seconds"], ".0f"),
                published(row) if is_image else "",
            ]
        )
    return found


def what_is_left(state: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> str:
    """What is left to do and how to go on, in a few lines."""
    lines = []
    for name, title in TITLES.items():
        entry = state["stages"].get(name)
        if name != "hour" and (entry is None or entry["status"] not in ("done", "cut off")):
            lines.append(f"left: {title} ({'not begun' if entry is None else entry['status']})")
    listed = hour_rows(state, rows)
    not_done = sum(row[2] not in ENDED for row in listed)
    if not_done or not listed:
        of = f"{not_done} of {len(listed)} runs" if listed else "not begun"
        lines.append(f"left: {TITLES['hour']} ({of})")
    sweeps = [entry for entry in state["sweeps"].values() if entry["status"] != "done"]
    if sweeps or not state["sweeps"]:
        of = f"at most {sum(s['runs'] for s in sweeps)} runs" if sweeps else "not begun"
        lines.append(f"left: the sweeps at paper scale ({of})")
    lines += [f"failed: {TITLES.get(k, k)}: {e}" for k, e in state.get("errors", {}).items()]
    lines += [f"left out: {error}" for error in state.get("missing_data", {}).values()]
    if not lines:
        return "nothing is left to do"
    lines.append(
        "the same command goes on; on another machine, too, once gpu/ is there "
        "(with runs/ it also goes on with the runs that had begun)"
    )
    return "\n".join(lines)


def tests_told(state: dict[str, Any]) -> str:
    """What the tests that need CUDA came to."""
    tests = state["stages"].get("tests")
    if tests is None:
        return "Not run yet."
    lines = [f"{tests['status']} after {tests['seconds']:.0f} s:", ""]
    for file, found in tests.get("files", {}).items():
        lines.append(f"- {file}: {found['note']}")
        lines += [f"  - failed: `{name}`" for name in found["failed"]]
    return "\n".join(lines)


def benchmarks_told(state: dict[str, Any], folder: Path) -> Iterator[str]:
    """A heading for each benchmark and, where its CSV file is there, a table."""
    for name, shown in COLUMNS.items():
        entry = state["stages"].get(name, {"status": "not run yet"})
        yield f"### {TITLES[name].capitalize()}: {entry['status']}"
        if (folder / f"{name}.csv").exists():
            try:
                yield csv_table(folder / f"{name}.csv", shown)
            except ValueError as error:  # it is being written
                yield f"{name}.csv cannot be read: {error}"


def report(
    state: dict[str, Any], rows: dict[str, list[dict[str, Any]]], folder: Path, *, rehearsed: bool
) -> str:
    """The report of the hour as Markdown.

    Args:
        state: what is known beside the rows, see ``gpu_hour.Hour``.
        rows: the recorded rows of each experiment.
        folder: where optimizer.csv and training.csv are.
        rehearsed: whether it was all tiny and on a CPU.
    """
    now = datetime.now(UTC).isoformat(timespec="minutes")
    counts = ", ".join(f"{name}.csv: {len(of_one)} runs" for name, of_one in rows.items())
    parts = ["# An hour on a GPU", f"Written {now}."]
    if rehearsed:
        parts.append(
            "**A rehearsal: everything is tiny and on the CPU. No number means anything.**"
        )
    parts += ["## Environment", "\n".join(f"- {line}" for line in state["environment"])]
    parts += ["## Tests that need CUDA", tests_told(state)]
    parts += ["## Benchmarks", f"Goals on an H100: {GOALS}. Ratios are to torch's fused AdamW."]
    parts += benchmarks_told(state, folder)
    parts += ["## The paper's experiments", table(hour_rows(state, rows), HOUR), f"{counts}."]
    parts += ["## What is left"]
    left = what_is_left(state, rows).splitlines()
    parts.append("\n".join(f"- {line.removeprefix('left: ')}" for line in left))
    return "\n\n".join(parts) + "\n"
