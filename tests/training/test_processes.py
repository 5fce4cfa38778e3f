"""One run on two processes: what each of them draws, saves, takes up again and says."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import REPOSITORY
from pnorm_decay.data import PydocTopics
from pnorm_decay.training import checkpoint, errors
from pnorm_decay.training.settings import ConfigError

pytestmark = pytest.mark.first  # a compiled backward pass, for one, starts autograd's threads

ARGUMENTS = [
    "experiment=demo/nanogpt_pydoc",
    "model.dropout=0.3",
    "trainer.steps=24",
    "trainer.eval_every=16",
    "trainer.threads=1",
    "trainer.precision=fp32",
    "trainer.device=cpu",
    "logger=none",
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def train(rank: int, port: int, folder: Path, stop_at: int | None, *more: str) -> None:
    """What torchrun starts, in a process of its own; SIGTERM comes to rank 1 alone."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    train_batch = PydocTopics.train_batch

    def watched(self: Any, step: int, *rest: Any) -> Any:
        if sys._getframe(1).f_code.co_name == "batch":
            state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
            (folder / f"random.{rank}.{step}").write_text(state)
        if (rank, step) == (1, stop_at):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_batch(self, step, *rest)

    PydocTopics.train_batch = watched  # type: ignore[method-assign]
    sys.argv = ["train.py", *ARGUMENTS, f"runs_dir={folder}", *more]
    runpy.run_path(str(REPOSITORY / "experiments" / "train.py"), run_name="__main__")


def start(folder: Path, stop_at: int | None, *more: str) -> list[ForkProcess]:
    """Two processes of a run."""
    folder.mkdir(exist_ok=True)
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=train, args=(r, port, folder, stop_at, *more)) for r in (0, 1)]
    for process in ranks:
        process.start()
    return ranks


def two_processes(folder: Path, stop_at: int | None = None, *more: str) -> list[int | None]:
    """Their exit statuses."""
    ranks = start(folder, stop_at, *more)
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def record(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/*/*/result.json")
    found = json.loads(path.read_text())["record"]
    return {key: found[key] for key in found.keys() - {"seconds", "finished_at"}}


def drawn(folder: Path, rank: int, step: int) -> str:
    return (folder / f"random.{rank}.{step}").read_text()


@pytest.mark.slow
def test_two_processes_stop_and_go_on_together(run_program, tmp_path, capfd):
    whole, stopped, alone = tmp_path / "whole", tmp_path / "stopped", tmp_path / "alone"
    assert two_processes(whole) == [0, 0]
    for step in (0, 20):  # dropout masks of their own
        assert drawn(whole, 0, step) != drawn(whole, 1, step)

    capfd.readouterr()
    assert two_processes(stopped, stop_at=4) == [130, 130]
    assert capfd.readouterr().err.count("stopped; the same command goes on") == 1
    shutil.copytree(stopped, alone)
    (path,) = stopped.glob("*/*/*/checkpoint.pt")
    state = checkpoint.read(path)
    assert state["step"] == 10  # the next at which the processes agree
    first, second = (process["loss_sum"] for process in state["processes"])
    assert first != second

    assert two_processes(stopped) == [0, 0]
    assert record(stopped) == record(whole)
    capfd.readouterr()
    assert two_processes(stopped, None, "sweep=pwd") == [0, 0]
    said = capfd.readouterr().err
    assert said.count("already complete") == said.count("this was one run") == 1
    assert drawn(stopped, 1, 23) == drawn(whole, 1, 23)

    done = run_program("experiments/train.py", *ARGUMENTS, f"runs_dir={alone}")
    assert done.code == 0, done.err
    assert "the run had 2 processes, now 1: dropout draws anew" in done.err
    assert record(alone)["status"] == "finished"


def test_what_both_find_is_said_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(errors, "FIRST_SPEAKS_SECONDS", math.inf)
    first, second = start(tmp_path, None, "optimizer.p=abc")
    first.join()
    second.terminate()  # as torchrun does
    second.join()
    assert first.exitcode == 2
    assert capfd.readouterr().err.count("error: optimizer.p=abc") == 1


def test_what_the_second_finds_alone_is_said(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors, "FIRST_SPEAKS_SECONDS", 0.1)
    errors.print_error(ConfigError("its disk is full"))
    assert capfd.readouterr().err == "error: its disk is full\n"
