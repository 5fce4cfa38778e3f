"""A run's checkpoint: everything that training needs to go on where it was cut off."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pnorm_decay.files import atomic_write, read_regular
from pnorm_decay.training.progress import console

CHECKPOINT_FILE = "checkpoint.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A checkpoint's content is not what was written."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists, dicts) atomically, with its checksum.

    What was at ``path`` stays beside it as ``previous(path)``.

    Raises:
        OSError: the folder cannot be written or the disk is full; an older checkpoint is left.
    """
    content = serialised(state)
    with atomic_write(path) as file:
        file.write(hashlib.sha256(content).digest())
        file.write(content)
        if path.exists():
            os.replace(path, previous(path))


def load(path: Path) -> dict[str, Any] | None:
    """The state in a checkpoint, on the CPU, or None where there is none.

    A damaged checkpoint is reported in a line, and the previous one taken.
    """
    for candidate in (path, previous(path)):
        try:
            return read(candidate)
        except FileNotFoundError:
            continue
        except (CheckpointError, OSError) as error:
            console.print(f"warning: {candidate} is left out: {error}", style="yellow")
    return None


def read(path: Path) -> dict[str, Any]:
    """The state in one checkpoint file, on the CPU.

    Raises:
        CheckpointError: the file was cut short or changed.
        OSError: it cannot be read.
    """
    content = read_regular(path)
    digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError("its checksum is wrong")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(str(error).partition("\n")[0]) from error


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` is kept."""
    return path.with_name(f"previous_{path.name}")


def remove(path: Path) -> None:
    """Removes a checkpoint and the one before it."""
    for file in (path, previous(path)):
        file.unlink(missing_ok=True)


def save_model(path: Path, model: nn.Module) -> None:
    """Writes a model's state dict atomically, for ``torch.load``.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    content = serialised(model.state_dict())
    with atomic_write(path) as file:
        file.write(content)


def serialised(state: dict[str, Any]) -> memoryview:
    """What ``torch.save`` writes; in memory, because of a full disk it tells as a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator of a run: Python's, NumPy's, torch's.

    Args:
        device: what the run works on. The other GPUs' generators are other runs'.
    """
    _, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what ``random_state`` gave, also where the run now works on another GPU."""
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    cuda = state["cuda"]
    if isinstance(cuda, list):  # of an older version: every GPU's
        cuda = cuda[device.index or 0] if len(cuda) > (device.index or 0) else None
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
