"""The data cache: files written whole or not at all; an image data set as one of them."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pnorm_decay.data.base import DataError
from pnorm_decay.files import atomic_write

# What NumPy raises on a truncated or altered file: its members carry checksums.
CONTENT = "content"  # the member of a cache file that sums the others up
DAMAGED_CACHE_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@contextmanager
def cache_write(path: Path) -> Iterator[BinaryIO]:
    """As `files.atomic_write`, for a file of the data cache.

    Raises:
        DataError: the folder cannot be written or the disk is full.
    """
    try:
        with atomic_write(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Content:
    """What tells one set of decoded images from another.

    Attributes:
        count: images in both parts.
        sha256: of all pixels and labels, hexadecimal.
    """

    count: int
    sha256: str


@dataclass(frozen=True)
class Images:
    """A data set of images in two parts, with the training part's mean and deviation.

    Images are uint8 `(N, C, H, W)`, labels int64 `(N,)`, mean and std float32 `(C,)` in pixel
    values from 0 to 255.
    """

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def from_arrays(
        cls,
        train_images: np.ndarray,
        train_labels: np.ndarray,
        val_images: np.ndarray,
        val_labels: np.ndarray,
    ) -> "Images":
        """Take the arrays as they are and measure the training part."""
        # Counting the 256 values of each channel is exact, and needs no copy in floating point.
        channels = train_images.shape[1]
        counts = np.stack(
            [np.bincount(train_images[:, c].ravel(), minlength=256) for c in range(channels)]
        )
        values = np.arange(256)
        mean = counts @ values / counts.sum(axis=1)
        variance = counts @ values**2 / counts.sum(axis=1) - mean**2
        return cls(
            torch.from_numpy(train_images),
            torch.from_numpy(train_labels),
            torch.from_numpy(val_images),
            torch.from_numpy(val_labels),
            torch.from_numpy(mean).float(),
            torch.from_numpy(np.sqrt(variance)).float(),
        )

    def to(self, device: torch.device) -> "Images":
        """Move everything to a device."""
        return Images(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @classmethod
    def read(cls, path: Path) -> "Images":
        """Read what `write` wrote.

        Raises:
            One of DAMAGED_CACHE_ERRORS: the file is not whole.
        """
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                **{field.name: torch.from_numpy(arrays[field.name]) for field in fields(cls)}
            )

    def write(self, path: Path) -> None:
        """Write everything to one file, which appears whole or not at all.

        Raises:
            DataError: the folder cannot be written or the disk is full.
        """
        arrays: dict[str, Any] = {name: t.numpy() for name, t in vars(self).items()}
        arrays[CONTENT] = np.array([str(value) for value in astuple(self.content)])
        with cache_write(path) as file:
            np.savez(file, **arrays)

    @property
    def content(self) -> Content:
        """Counted and summed up, which takes a second for CIFAR-10."""
        parts = (self.train_images, self.train_labels, self.val_images, self.val_labels)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.cpu().contiguous().numpy().data)
        return Content(len(self.train_labels) + len(self.val_labels), digest.hexdigest())

    @classmethod
    def read_content(cls, path: Path) -> Content:
        """The content of a file that `write` wrote, without reading the images.

        Raises:
            One of DAMAGED_CACHE_ERRORS: the file is not whole.
        """
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError(path)
        with np.load(path, allow_pickle=False) as arrays:
            if CONTENT in arrays.files:
                count, sha256 = arrays[CONTENT].tolist()
                return Content(int(count), sha256)
        images = cls.read(path)  # of an older version
        images.write(path)
        return images.content
