"""Whole runs on a GPU: they find what a run on a CPU finds, and fail in one line."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SHORT

pytestmark = pytest.mark.cuda
TRAIN = "experiments/train.py"
DIGITS = ["experiment=demo/resnet_digits", *SHORT, "logger=none"]
TEXT = ["experiment=demo/nanogpt_pydoc", "trainer.steps=6", "trainer.eval_every=3"]
TEXT += ["trainer.threads=1", "logger=none"]


@pytest.mark.parametrize(
    "overrides",
    [
        DIGITS,
        [*DIGITS, "trainer.channels_last=true", "model.width=16", "data.crop_padding=1"],
        [*DIGITS, "optimizer=adamw", "pruning=oto", "pruning.end=1"],
        [*DIGITS, "optimizer=adamw", "pruning=magnitude", "pruning.end=1"],
        TEXT,
        [*TEXT, "optimizer=exact"],
        [*TEXT, "optimizer=adamw", "pruning=spred"],
        [*TEXT, "decay_schedule=target_sparsity", "optimizer.lr=1e-2"],
    ],
    ids=lambda words: "_".join(word.rpartition("=")[2] for word in words[-2:]),
)
def test_a_run_finds_what_it_finds_on_a_cpu(train: Any, overrides: list[str]) -> None:
    """In float32, but for rounding: a GPU's convolutions may use TF32."""
    on_gpu, on_cpu = (
        train(*overrides, f"trainer.device={device}", name=device) for device in ("cuda", "cpu")
    )
    assert on_gpu.record["run_id"] == on_cpu.record["run_id"]
    assert on_gpu.record["device"] != on_cpu.record["device"]
    assert on_gpu.record["sparsity"] == pytest.approx(on_cpu.record["sparsity"], abs=0.02)
    for ours, theirs in zip(on_gpu.history, on_cpu.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(train: Any, precision: str) -> None:
    options = [f"trainer.precision={precision}", "trainer.device=cuda", "trainer.steps=60"]
    run = train(*TEXT, *options, "optimizer.lr=1e-2")
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


@pytest.fixture
def little_memory() -> Iterator[None]:
    gpus = range(torch.cuda.device_count())
    for gpu in gpus:
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(2**28 / total, gpu)
    yield
    for gpu in gpus:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)


def test_memory_that_does_not_suffice_is_one_line(
    run_program: Any, train: Any, tmp_path: Path, little_memory: None
) -> None:
    """And the next run of the process has the memory back."""
    torch.cuda.empty_cache()
    large = [*DIGITS, "model.width=256", "trainer.device=cuda", f"runs_dir={tmp_path / 'large'}"]
    done = run_program(TRAIN, *large)
    assert done.code == 2
    *others, told = done.err.splitlines()
    assert all(line.startswith("warning: schedule.warmup") for line in others)
    assert told.startswith("error: ")
    assert "OutOfMemoryError: CUDA out of memory" in told
    (failure,) = (tmp_path / "large").glob("*/*/*/failure.json")
    assert json.loads(failure.read_text())["record"]["status"] == "failed"
    gc.collect()
    train(*DIGITS, "trainer.device=cuda")


def test_a_sweep_on_one_gpu_does_not_depend_on_how_many_share_it(
    run_program: Any, tmp_path: Path
) -> None:
    records = []
    gpus = torch.cuda.device_count()
    seeds = "seed=" + ",".join(map(str, range(2 * gpus)))
    for per_gpu in ("auto", "1", "2"):
        folder = tmp_path / per_gpu
        options = [f"runs_dir={folder}", f"hydra.launcher.runs_per_gpu={per_gpu}", seeds]
        done = run_program(TRAIN, "-m", *TEXT, *options, "trainer.device=cuda")
        assert done.code == 0, done.err
        assert ("of its time (hydra.launcher.runs_per_gpu sets it)" in done.err) == (
            per_gpu == "auto"
        )
        results = [json.loads(p.read_text())["record"] for p in folder.glob("*/*/*/result.json")]
        assert len(results) == 2 * gpus
        records.append({r["seed"]: r["val_loss"] for r in results})
    for one in records[1:]:
        assert one == pytest.approx(records[0], rel=1e-3)
