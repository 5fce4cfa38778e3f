"""Where a result comes from: commit, versions, machine, time."""

from __future__ import annotations

import functools
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

COMMIT_FILE = "commit.txt"


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """Where a result comes from: commit, versions, device, precision, threads, time."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    count = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    return {
        "commit": git_commit(),
        "device": f"{count}{name}, {precision}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def git_commit() -> str:
    """The short commit of the working tree, with "+" where the code differs from it.

    A copy without git's folder, such as that of `make gpu-bundle`, has it in ``commit.txt``.
    """
    folder = Path(__file__).parent
    note = folder.parents[2] / COMMIT_FILE
    if note.exists():
        return note.read_text(encoding="utf-8").strip()

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = [":(top)pwd", ":(top)configs", ":(top)experiments"]
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
