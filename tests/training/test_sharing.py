"""How many runs share a GPU: the decision, and what it is made from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnorm_decay.training import sharing
from pnorm_decay.training.settings import ConfigError
from pnorm_decay.training.sharing import Footprint, how_many, runs_per_gpu

GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "busy", "cores", "expected"),
    [
        (2, 1.0, 16, 1),  # a large network fills the GPU alone
        (2, 0.5, 16, 2),
        (2, 0.34, 16, 3),
        (2, 0.2, 16, 5),
        (20, 0.2, 16, 3),  # memory: 72 of 80 GiB are used
        (100, 0.2, 16, 1),  # the run itself will say that it does not fit
        (2, 0.2, 4, 4),
        (2, 0.2, 0, 1),
    ],
)
def test_runs_fill_the_gpu_as_far_as_memory_and_cores_suffice(memory, busy, cores, expected):
    assert runs_per_gpu(Footprint(memory * GIB, 80 * GIB, busy), cores) == expected


@given(st.integers(1, 10**12), st.integers(0, 10**12), st.floats(0.01, 1), st.integers(0, 256))
def test_no_more_than_fit_and_at_least_one(memory, free, busy, cores):
    number = runs_per_gpu(Footprint(memory, free, busy), cores)
    assert 1 <= number <= max(1, cores, 1)
    assert number == 1 or number * memory <= free
    assert number == 1 or number * busy < 1.51  # half a run more than fills it, at most


def test_settings_come_before_the_measurement():
    assert how_many(None, "auto", gpus=2, cores=8) is None
    assert how_many(None, 3, gpus=2, cores=8) == 6
    assert how_many(None, "auto", gpus=0, cores=8) == 8
    assert how_many(None, 3, gpus=0, cores=8) == 8
    assert how_many(5, 3, gpus=2, cores=8) == 5
    assert how_many(-1, "auto", gpus=2, cores=8) == 8


@pytest.mark.parametrize("value", [0, -2, 1.5, True, "many"])
def test_bad_settings_are_named(value):
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.n_jobs=.*must be null, -1 or a whole"):
        how_many(value, "auto", 0, 2)
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.runs_per_gpu=.*must be auto or a who"):
        how_many(None, value, 0, 2)


class Event:
    """What torch.cuda.Event is here, on a device that needs 10 ms for whatever it is given."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 10.0


def test_a_run_is_measured(device, monkeypatch, run_program, tmp_path):
    """On a CPU, which stands for a GPU that holds 3 GiB and needs 10 of the 40 ms of each step."""
    from pnorm_decay.training import run as running

    found = []

    def measure(run, accelerator):
        found.append(sharing.footprint(run.settings, run.data, accelerator))
        return {"status": "finished"}

    monkeypatch.setattr(running, "train_and_record", measure)
    if device.type == "cpu":
        for name, value in (
            ("mem_get_info", (40 * GIB, 80 * GIB)),
            ("max_memory_reserved", 3 * GIB),
            ("reset_peak_memory_stats", None),
            ("synchronize", None),
            ("_sleep", None),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        take_step, steps = sharing.take_step, []
        monkeypatch.setattr(sharing, "take_step", lambda run: steps.append(take_step(run)))
        clock = SimpleNamespace(perf_counter=lambda: 0.04 * len(steps))
        monkeypatch.setattr(sharing, "time", clock)
    options = ["experiment=demo/nanogpt_pydoc", "trainer.threads=1", "logger=none"]
    options += [f"trainer.device={device.type}", f"runs_dir={tmp_path}"]
    done = run_program("experiments/train.py", *options)
    assert done.code == 0, done.err
    (footprint,) = found
    if device.type == "cpu":
        assert footprint == Footprint(4 * GIB, 41 * GIB, pytest.approx(0.25))
    else:
        assert 0 < footprint.busy <= 1
        assert sharing.CONTEXT < footprint.memory < footprint.free
