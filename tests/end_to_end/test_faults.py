"""Runs and sweeps that are killed, fail, meet each other or a full disk; runs of two processes."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import wandb
from filelock import FileLock

from conftest import REPOSITORY, SHORT
from pnorm_decay import files, records
from pnorm_decay.models import ResNet18
from pnorm_decay.training import checkpoint, claiming

TRAIN = "experiments/train.py"
DIGITS = "experiment=demo/resnet_digits"
TIMING = {"seconds", "finished_at"}


@pytest.fixture
def places(tmp_path):
    return [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}", "logger=none"]


def rows(runs: Path) -> dict[str, dict[str, object]]:
    """The records below a folder by run, without what differs between two doings of a run."""
    found = [result["record"] for _, _, result in records.recorded_runs(runs)]
    return {row["run_id"]: {k: v for k, v in row.items() if k not in TIMING} for row in found}


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_with_the_same_bits(tmp_path):
    with wandb.init(mode="offline", dir=tmp_path):  # has a service, which children would share
        assert "WANDB_SERVICE" in os.environ
    command = [sys.executable, str(REPOSITORY / "scripts" / "soak.py"), "--kills", "1"]
    done = subprocess.run([*command, "--", "trainer.steps=60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills" in done.stdout


def test_a_damaged_checkpoint_costs_steps_but_not_the_result(
    run_program, places, tmp_path, monkeypatch
):
    arguments = [DIGITS, *SHORT, "logger=none", "trainer.checkpoint_minutes=1e-9"]
    assert run_program(TRAIN, *arguments, f"runs_dir={tmp_path / 'whole'}").code == 0
    original = checkpoint.save

    def save_and_stop(path: Path, state: dict) -> None:
        original(path, state)
        if state["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    assert run_program(TRAIN, *arguments, *places).code == 130
    monkeypatch.undo()
    (path,) = (tmp_path / "runs").glob("*/*/*/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:1000])
    done = run_program(TRAIN, *arguments, *places)
    assert done.code == 0, done.err
    assert "checkpoint.pt is left out: its checksum is wrong" in done.err
    assert rows(tmp_path / "runs") == rows(tmp_path / "whole")


def test_a_checkpoint_of_another_version_is_left_out(run_program, places, tmp_path):
    arguments = [DIGITS, *SHORT, *places]
    assert run_program(TRAIN, *arguments).code == 0
    (path,) = (tmp_path / "runs").glob("*/*/*/result.json")
    path.unlink()
    checkpoint.save(path.with_name("checkpoint.pt"), {"step": 3})
    done = run_program(TRAIN, *arguments)
    assert done.code == 0, done.err
    assert "another version wrote it" in done.err
    assert path.exists()


SWEEP = ["-m", DIGITS, *SHORT, "optimizer.p=0.5,1.5", "optimizer.lr=1e-3,1e-2"]


@pytest.mark.slow
def test_a_killed_multirun_does_only_what_is_missing_and_the_same_anywhere(
    run_program, places, tmp_path
):
    longer = ["trainer.steps=40"]  # so that there is something to kill
    two = ["hydra.launcher.n_jobs=2"]
    command = [sys.executable, str(REPOSITORY / TRAIN), *SWEEP, *places, *longer, *two]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while not rows(tmp_path / "runs") and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done_before = rows(tmp_path / "runs")
    assert done_before, (tmp_path / "log").read_text()

    again = run_program(TRAIN, *SWEEP, *places, *longer, "hydra/launcher=basic")
    assert again.code == 0, again.err
    assert again.err.count("already complete") == len(done_before)

    # In another order, one after the other, in one process.
    backwards = ["-m", DIGITS, *SHORT, "optimizer.p=1.5,0.5", "optimizer.lr=1e-2,1e-3"]
    one = ["hydra/launcher=basic", f"runs_dir={tmp_path / 'other'}", "logger=none"]
    assert run_program(TRAIN, *backwards, *longer, *one).code == 0
    assert rows(tmp_path / "runs") == rows(tmp_path / "other")


def test_a_terminated_multirun_saves_in_every_worker(places, tmp_path):
    two = ["hydra.launcher.n_jobs=2", "trainer.steps=100000", "trainer.eval_every=20"]
    command = [sys.executable, str(REPOSITORY / TRAIN), *SWEEP, *places, *two]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while len(list((tmp_path / "runs").glob("*/*/*/metrics.csv"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.terminate()
        assert process.wait() == 130
    states = [checkpoint.read(path) for path in (tmp_path / "runs").glob("*/*/*/checkpoint.pt")]
    assert len(states) == 2
    assert all(0 < state["step"] < 100000 for state in states)
    assert "the same command goes on" in (tmp_path / "log").read_text()


def test_a_failing_run_is_recorded_and_tried_again(run_program, places, tmp_path, monkeypatch):
    original = ResNet18.forward

    def next_one(self, images):
        assert failed() is None  # nothing of the run that failed is left in memory
        return original(self, images)

    def fail_once(self, images):
        nonlocal failed
        failed = weakref.ref(self)
        monkeypatch.setattr(ResNet18, "forward", next_one)
        raise RuntimeError("out of memory\nwith details")

    failed: Any = None

    monkeypatch.setattr(ResNet18, "forward", fail_once)
    sweep = [*SWEEP, *places, "hydra/launcher=basic"]
    first = run_program(TRAIN, *sweep)
    assert first.code == 2
    assert "failed: RuntimeError: out of memory" in first.err
    assert gc.get_freeze_count() == 0
    assert "failure.json" in first.err.splitlines()[-1]
    status = [row["status"] for row in rows(tmp_path / "runs").values()]
    assert sorted(status) == ["failed", "finished", "finished", "finished"]
    (path,) = (tmp_path / "runs").glob("*/*/*/failure.json")
    failure = json.loads(path.read_text())
    assert failure["record"]["reason"] == "RuntimeError: out of memory"
    assert "with details" in failure["traceback"]

    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert run_program("scripts/collect.py", *folders).code == 0
    assert run_program("scripts/plot.py", *folders[2:], "--format", "png").code == 0
    frame = records.read(tmp_path / "results" / "demo" / "resnet_digits.csv")
    assert (frame["status"] == "failed").sum() == 1

    second = run_program(TRAIN, *sweep, "skip_recorded=true")
    assert second.code == 0, second.err
    assert second.err.count("already complete") == 3
    assert {row["status"] for row in rows(tmp_path / "runs").values()} == {"finished"}


def test_a_run_is_done_once_at_a_time(run_program, places, tmp_path, monkeypatch):
    assert run_program(TRAIN, DIGITS, *SHORT, *places).code == 0
    (path,) = (tmp_path / "runs").glob("*/*/*/result.json")
    path.unlink()
    lock = tmp_path / "runs" / claiming.LOCKS / path.parent.name
    held, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(lock):
            held.set()
            enough.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    sweep = run_program(TRAIN, "-m", DIGITS, *SHORT, *places, "hydra/launcher=basic")
    assert sweep.code == 2
    last = sweep.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith("left to the process that is doing it")
    assert not path.exists()

    say = claiming.console.print

    def let_go_when_it_waits(*words: object, **style: object) -> None:
        say(*words, **style)
        if "waiting for it" in str(words):
            enough.set()

    monkeypatch.setattr(claiming.console, "print", let_go_when_it_waits)
    single = run_program(TRAIN, DIGITS, *SHORT, *places)
    thread.join()
    assert single.code == 0
    assert "waiting for it" in single.err
    assert path.exists()


def test_a_sweep_ends_when_its_runs_are_done_by_whatever_process(run_program, places, tmp_path):
    """As after its main process was killed, whose workers may be saving still."""
    assert run_program(TRAIN, DIGITS, *SHORT, *places).code == 0
    (path,) = (tmp_path / "runs").glob("*/*/*/result.json")
    path.unlink()
    sweep = ["-m", DIGITS, *SHORT, *places, "seed=0,1", "hydra.launcher.n_jobs=1"]
    lock = FileLock(tmp_path / "runs" / claiming.LOCKS / path.parent.name)
    with (tmp_path / "log").open("wb") as log:
        with lock:
            command = [sys.executable, str(REPOSITORY / TRAIN), *sweep]
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while not rows(tmp_path / "runs"):  # of the other run
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            assert not path.exists()
        assert process.wait() == 0
    assert path.exists()
    said = (tmp_path / "log").read_text()
    assert said.count("left to the process that is doing it") == 1
    assert said.count("accuracy") == 2


def test_a_full_disk_is_one_clear_line_and_loses_nothing(
    run_program, places, tmp_path, monkeypatch
):
    assert run_program(TRAIN, DIGITS, *SHORT, *places).code == 0
    before = rows(tmp_path / "runs")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    done = run_program(TRAIN, DIGITS, *SHORT, *places, "seed=1", "trainer.checkpoint_minutes=1e-9")
    assert done.code == 2
    assert "error: [Errno 28] No space left on device" in done.err.splitlines()[-1]
    monkeypatch.undo()
    assert rows(tmp_path / "runs") == before


def test_a_finished_run_is_recorded_where_there_is_no_room_for_its_network(
    run_program, places, tmp_path
):
    arguments = [DIGITS, *SHORT, *places]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # bytes, of any file
    try:
        done = run_program(TRAIN, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "is recorded, but its network is not saved: [Errno 27] File too large" in last
    (row,) = rows(tmp_path / "runs").values()
    assert row["status"] == "finished"
    assert not list((tmp_path / "runs").rglob("*.tmp"))
    assert "already complete" in run_program(TRAIN, *arguments).err


def test_a_folder_that_cannot_be_written_is_one_clear_line(run_program, tmp_path):
    (tmp_path / "file").write_text("")
    places = [f"runs_dir={tmp_path / 'file' / 'runs'}", "logger=none"]
    done = run_program(TRAIN, DIGITS, *SHORT, *places)
    assert done.code == 2
    assert "error: [Errno 20] Not a directory" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.slow
def test_two_processes_train_as_one(run_program, tmp_path):
    arguments = [
        "experiment=demo/nanogpt_pydoc",
        "trainer.steps=20",
        "trainer.eval_every=10",
        "trainer.threads=1",
        "trainer.precision=fp32",
        "trainer.device=cpu",
        "logger=none",
    ]
    done = run_program(TRAIN, *arguments, f"runs_dir={tmp_path / 'one'}")
    assert done.code == 0, done.err
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(REPOSITORY / TRAIN), *arguments, f"runs_dir={tmp_path / 'two'}"]
    both = subprocess.run(command, capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    (alone,), (shared,) = rows(tmp_path / "one").values(), rows(tmp_path / "two").values()
    assert both.stderr.count("validation accuracy") == 1  # one of them speaks
    assert shared["device"] == "2 x cpu, fp32"
    for key in ("val_loss", "train_loss", "val_accuracy", "sparsity"):
        assert shared[key] == pytest.approx(alone[key], rel=1e-3), key
    other = {"device", "val_loss", "train_loss", "val_accuracy", "best_val_accuracy"}
    other |= {"val_accuracy_zeroed", "sparsity", "zero_fraction"}
    for key in alone.keys() - other:
        assert shared[key] == alone[key], key
