"""Measures what sparse networks take on the disk, in several formats, and how fast they are read.

Networks: ResNet18 (width 64) with random zeros, and the trained ones below the folder of runs, one
of each method, p and percent of zeros. Each format's file is compared with the entropy bound,
H(density) bits a weight for the places of each matrix's zeros and 32 bits a value (16 for bf16),
and read after its pages have been dropped from the system's cache, where the system can do that.
For trained networks val_loss and val_accuracy are those of the network that the sparse file holds.

    python scripts/bench_files.py
    python scripts/bench_files.py --sparsities 0.9 0.99 --runs ../other/runs
"""

from __future__ import annotations

import argparse
import gzip
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import scipy.sparse
import torch
import zstandard
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench_common import machine, trained_networks, write_rows
from evaluate import evaluate_saved
from pnorm_decay.data import DataError
from pnorm_decay.deploy import load_sparse, save_sparse
from pnorm_decay.models import ResNet18

SPARSITIES = [0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995]
SPARSE, ROUNDED = "save_sparse", "save_sparse bf16"

State = dict[str, Tensor]
console = Console(highlight=False)


def save_npz(state: State, path: Path) -> None:
    """SciPy's rows of values and columns, matrix by matrix, in one compressed archive."""
    arrays: dict[str, Any] = {}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            arrays[name] = tensor.numpy()
        else:
            matrix = scipy.sparse.csr_array(tensor.flatten(1).numpy())
            arrays |= {
                f"{name}.{part}": getattr(matrix, part) for part in ("data", "indices", "indptr")
            }
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_npz(path: Path) -> None:
    with np.load(path) as file:
        for name in file.files:
            file[name]


def read_safetensors(path: Path) -> None:
    for tensor in safetensors.torch.load_file(path).values():
        tensor.clone()  # they are read when they are used


def pickled(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read_zstd(path: Path) -> None:
    safetensors.torch.load(zstandard.ZstdDecompressor().decompress(path.read_bytes()))


def read_gzip(path: Path) -> None:
    torch.load(io.BytesIO(gzip.decompress(path.read_bytes())))


Format = tuple[Callable[[State, Path], Any], Callable[[Path], Any]]
FORMATS: dict[str, Format] = {
    "torch.save": (torch.save, torch.load),
    "safetensors": (safetensors.torch.save_file, read_safetensors),
    "safetensors + zstd": (
        lambda state, path: path.write_bytes(
            zstandard.ZstdCompressor().compress(safetensors.torch.save(state))
        ),
        read_zstd,
    ),
    "torch.save + gzip": (
        lambda state, path: path.write_bytes(gzip.compress(pickled(state), 6)),
        read_gzip,
    ),
    "scipy npz": (save_npz, read_npz),
    SPARSE: (save_sparse, load_sparse),
    ROUNDED: (lambda state, path: save_sparse(state, path, values="bf16"), load_sparse),
}


def bound(state: State, value_bytes: int = 4) -> float:
    """The entropy bound in bytes, H(density) of each tensor of two or more dimensions."""
    total = 0.0
    for tensor in state.values():
        size, count = tensor.numel(), int((tensor != 0).sum())
        if tensor.ndim < 2:
            total += size * tensor.itemsize
            continue
        d = count / max(size, 1)
        places = -size * (d * math.log2(d) + (1 - d) * math.log2(1 - d)) / 8 if 0 < d < 1 else 0
        total += min(size * value_bytes, places + count * value_bytes)
    return total


def forget(path: Path) -> bool:
    """Drops a file from the system's cache; False where the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def seconds_of(read: Callable[[Path], Any], path: Path, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        forget(path)
        start = time.perf_counter()
        read(path)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def networks(
    sparsities: list[float], runs: Path
) -> Iterator[tuple[str, State, dict[str, Any] | None]]:
    for sparsity in sparsities:
        generator = torch.Generator().manual_seed(0)
        state = ResNet18().state_dict()
        for tensor in state.values():
            if tensor.ndim > 1:
                tensor[torch.rand(tensor.shape, generator=generator) < sparsity] = 0
            elif tensor.is_floating_point():  # as if trained; all ones would compress too well
                tensor.normal_(generator=generator)
        yield "ResNet18, random zeros", state, None
    for name, path, result in trained_networks(runs):
        yield name, torch.load(path, weights_only=True), result


def accuracy(state: State, result: dict[str, Any] | None, scratch: Path) -> dict[str, Any]:
    """What a trained network reaches in fp32, nothing where its data are missing."""
    if result is None:
        return {}
    torch.save(state, scratch / "model.pt")
    try:
        row = evaluate_saved(scratch / "model.pt", result, torch.device("cpu"), "fp32")
    except (DataError, OSError) as error:
        console.print(f"no accuracy: {error}")
        return {}
    return {key: row[key] for key in ("val_loss", "val_accuracy")}


def measure(
    name: str, state: State, result: dict[str, Any] | None, rounds: int
) -> list[dict[str, Any]]:
    """A row a format."""
    weights = [tensor for tensor in state.values() if tensor.ndim > 1]
    zeros = sum(int((tensor == 0).sum()) for tensor in weights)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind, (save, read) in FORMATS.items():
            path = Path(scratch) / "file"
            start = time.perf_counter()
            save(state, path)
            seconds = time.perf_counter() - start
            size = path.stat().st_size
            reached = {}
            if kind in (SPARSE, ROUNDED):
                reached = accuracy(load_sparse(path), result, Path(scratch))
            rows.append(
                {
                    "network": name,
                    "sparsity": round(zeros / sum(tensor.numel() for tensor in weights), 4),
                    "format": kind,
                    "bytes": size,
                    "dense_ratio": round(rows[0]["bytes"] / size, 2) if rows else 1.0,
                    "bound_ratio": round(size / bound(state, 2 if kind == ROUNDED else 4), 3),
                    "save_seconds": round(seconds, 4),
                    "cold_load_seconds": round(seconds_of(read, path, rounds), 4),
                    "val_loss": None,
                    "val_accuracy": None,
                    **reached,
                    **machine(),
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The sizes on the terminal, a line a network."""
    table = Table(title="Sparse networks as files, in kB")
    for column in ("network", "zeros", *FORMATS, "save_sparse / bound"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for start in range(0, len(rows), len(FORMATS)):
        these = rows[start : start + len(FORMATS)]
        ours = next(row for row in these if row["format"] == SPARSE)
        sizes = [f"{row['bytes'] / 1000:,.0f}" for row in these]
        zeros, ratio = f"{ours['sparsity']:.1%}", f"{ours['bound_ratio']:.2f}"
        table.add_row(ours["network"], zeros, *sizes, ratio)
    console.print(table)


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], not {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", nargs="*", type=fraction, default=SPARSITIES)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--rounds", type=int, default=3, help="times that each file is read")
    parser.add_argument("--output", type=Path, default=Path("results/bench/sparse_files.csv"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(1)
    rows = [
        row
        for name, state, result in networks(arguments.sparsities, arguments.runs)
        for row in measure(name, state, result, arguments.rounds)
    ]
    show(rows)
    write_rows(arguments.output, rows)
    console.print(f"{arguments.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
