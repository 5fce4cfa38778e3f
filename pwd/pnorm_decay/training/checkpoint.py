"""A run's checkpoint: everything that training needs to go on where it was cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pnorm_decay.files import atomic_write

CHECKPOINT_FILE = "checkpoint.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists, dicts) atomically."""
    with atomic_write(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any] | None:
    """The state in a checkpoint, on the CPU, or None where there is none."""
    if not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def random_state() -> dict[str, Any]:
    """The state of torch's global generators, which dropout draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what ``random_state`` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
