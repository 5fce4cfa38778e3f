"""A small copy of CIFAR-10 made up for the tests, and what they do with data sets."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pnorm_decay.data import CIFAR10, Digits, cifar10

CPU = torch.device("cpu")
PER_CLASS = {"train": 3, "test": 2}
ARCHIVES = [".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip"]


def pixels(split: str, class_name: str, index: int) -> np.ndarray:
    """The image that the test's copy holds at a place, uint8 (32, 32, 3)."""
    key = [ord(character) for character in f"{split}/{class_name}/{index}"]
    return np.random.default_rng(key).integers(256, size=(32, 32, 3), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


def write_copy(folder: Path, kind: str = "png", suffix: str = ".png") -> Path:
    for split, count in PER_CLASS.items():
        for class_name in cifar10.CLASSES:
            place = folder / split / class_name
            place.mkdir(parents=True)
            for index in range(count):
                content = encoded(pixels(split, class_name, index), kind)
                (place / f"{index:04}{suffix}").write_bytes(content)
    return folder


def pack(folder: Path, archive: Path, top: str = ".") -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, Path(top) / path.relative_to(folder))
    else:
        modes = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz"}
        with tarfile.open(archive, modes[archive.suffix]) as file:  # type: ignore[call-overload]
            file.add(folder, arcname=top)
    return archive


def loaded(path: Path, cache: Path) -> CIFAR10:
    dataset = CIFAR10(path, cache, crop_padding=0, flip=False)
    dataset.setup(CPU)
    return dataset


def raw(dataset: CIFAR10 | Digits, images: Tensor) -> Tensor:
    """Undo the normalisation."""
    mean, std = dataset._images.mean.view(-1, 1, 1), dataset._images.std.view(-1, 1, 1)
    return (images * std + mean).round().to(torch.uint8)


def assert_holds_the_copy(dataset: CIFAR10) -> None:
    images, labels = next(iter(dataset.val_batches(1000)))
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    expected = [pixels("test", name, index) for name in cifar10.CLASSES for index in range(2)]
    assert torch.equal(
        raw(dataset, images).permute(0, 2, 3, 1), torch.from_numpy(np.stack(expected))
    )
    assert dataset.steps_per_epoch(1) == 30
