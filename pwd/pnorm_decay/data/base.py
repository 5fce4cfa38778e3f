"""What the trainer asks of a data set, and what every data set shares.

A training batch is a pure function of the step, the batch size and the seed. A resumed run thus
sees the batches that an uninterrupted one would have seen, and a checkpoint holds no data state.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor


class DataError(RuntimeError):
    """A data set is missing, damaged or of the wrong kind; the message says what to do."""


class Dataset(ABC):
    """One data set, whole on the device.

    Usage: construct (cheap), `setup(device)` once, then `train_batch` for every step and
    `val_batches` for every evaluation.
    """

    @property
    @abstractmethod
    def label(self) -> str:
        """What records and figures call the data. Available before `setup`.

        Raises:
            DataError: the source cannot be read.
        """

    @property
    def identity(self) -> str:
        """What the data are, as a run's id holds it: the label, and more where that says too little.

        Raises:
            DataError: the source cannot be read.
        """
        return self.label

    @property
    @abstractmethod
    def model_args(self) -> dict[str, int]:
        """What the data prescribe to the model's constructor. Available after `setup`."""

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Read, check and move everything to `device`. Doing it again costs nothing.

        Raises:
            DataError: the data are missing, damaged or of the wrong kind.
        """

    @abstractmethod
    def steps_per_epoch(self, batch_size: int) -> int | None:
        """Full batches in an epoch, the incomplete last one dropped; None if there are no epochs.

        Raises:
            ValueError: `batch_size` is below 1 or larger than the training part.
        """

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The inputs and int64 targets of training step `step` (from 0), on the device.

        Depends on its three arguments alone; the device does not change what is drawn.
        """

    @abstractmethod
    def val_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole validation part once, in order; the last batch may be smaller."""


def random_stream(purpose: int, seed: int, number: int) -> np.random.Generator:
    """A random generator of its own for each (purpose, seed, number).

    NumPy's `SeedSequence` mixes the three, so neighbouring seeds and steps are unrelated. (A torch
    CPU generator would keep 32 bits of the seed only.)

    Raises:
        ValueError: `seed` or `number` is negative.
    """
    if seed < 0 or number < 0:
        raise ValueError(f"seed and step must not be negative, got {seed} and {number}")
    return np.random.default_rng((purpose, seed, number))


def to_device(drawn: np.ndarray, device: torch.device) -> Tensor:
    """What was drawn, on the device; the host does not wait until a GPU has it."""
    tensor = torch.from_numpy(drawn)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def check_batch_size(batch_size: int, limit: int | None = None) -> None:
    """Raise `ValueError` unless `batch_size` is in [1, limit]."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None and batch_size > limit:
        raise ValueError(f"batch_size {batch_size} is larger than the training part ({limit:,})")


T = TypeVar("T")
_latest: tuple[Hashable, Any] | None = None


def keep_latest(key: Hashable, load: Callable[[], T]) -> T:
    """Return `load()`, or what it returned last time if the latest call had the same key.

    The runs of a sweep share a process and its data; holding one entry only bounds the memory.
    """
    global _latest
    if _latest is None or _latest[0] != key:
        _latest = None  # the previous data set goes before the next one comes
        _latest = (key, load())
    return _latest[1]
