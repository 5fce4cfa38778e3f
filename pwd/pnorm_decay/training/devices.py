"""Which GPU a process works on, where several processes share a machine."""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_held: list[FileLock] = []  # for the rest of this process's life


def own_gpu(device: torch.device) -> torch.device:
    """The GPU that this process has for itself, where one is wanted and there are several.

    Args:
        device: what the settings ask for; a CPU stays, as do GPUs that torchrun hands out.
    """
    if device.type != "cuda" or "LOCAL_RANK" in os.environ:
        return device
    return torch.device("cuda", _own_number())


@functools.cache
def _own_number() -> int:
    names = [
        str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())
    ]
    return claim(names, Path(tempfile.gettempdir()) / f"pnorm-decay-gpus-{os.getuid()}")


def claim(gpus: Sequence[str], folder: Path) -> int:
    """Takes the first of the GPUs that fewest processes have, until this process ends.

    Processes of other sweeps and single runs count too: a lock file a GPU and process tells.

    Args:
        gpus: names that are the same in every process.
        folder: of the lock files.

    Returns:
        The GPU's place in ``gpus``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for others in itertools.count():
        for number, name in enumerate(gpus):
            lock = FileLock(folder / f"{name}.{others}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _held.append(lock)
            return number
    raise AssertionError("there is always one place more")
