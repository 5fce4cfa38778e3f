"""A sweep whose processes are asked to stop or killed, alone or all together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import REPOSITORY

WAITING = Path(__file__).with_name("waiting.py")
TRAIN = REPOSITORY / "experiments" / "train.py"


class Started:
    """A sweep of runs that wait, on two processes, in a group of its own."""

    def __init__(
        self, folder: Path, seeds: str, program: Path = WAITING, at_once: str = "n_jobs=2"
    ) -> None:
        self.runs, self.log = folder / "runs", folder / "log"
        command = [sys.executable, str(program), "-m", f"runs_dir={self.runs}", f"seed={seeds}"]
        command += [f"results_dir={folder}", "logger=none", f"hydra.launcher.{at_once}"]
        with self.log.open("wb") as log:
            self.main = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def process(self, seed: int, *others: int) -> int:
        """Waits until a run has begun, in a process other than those known."""
        while True:
            pids = [int(path.suffix[1:]) for path in self.runs.glob(f"{seed}.[0-9]*")]
            new = set(pids) - set(others)
            if new:
                return new.pop()
            assert self.main.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def let(self, seed: int, event: str = "go") -> None:
        (self.runs / f"{seed}.{event}").touch()

    def saved(self) -> set[str]:
        return {path.stem for path in self.runs.glob("*.saved")}

    def end(self) -> tuple[int, str]:
        return self.main.wait(), self.log.read_text()


def wait_for_end(*pids: int) -> None:
    while any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path) -> Iterator[type[Started]]:
    started: list[Started] = []

    def start(seeds: str, program: Path = WAITING, at_once: str = "n_jobs=2") -> Started:
        started.append(Started(tmp_path, seeds, program, at_once))
        return started[-1]

    yield start
    for sweep in started:
        if sweep.main.poll() is None:  # the test has failed
            os.killpg(sweep.main.pid, signal.SIGKILL)


def test_what_happens_to_one_process_costs_no_other_run(start):
    sweep = start("0,1,2,3,4")
    stopped, killed = sweep.process(0), sweep.process(1)
    os.kill(stopped, signal.SIGTERM)
    another = sweep.process(0, stopped)  # goes on with it
    os.kill(killed, signal.SIGKILL)
    failing = sweep.process(2)
    assert failing not in (stopped, killed)
    sweep.let(2, "fail")
    after = sweep.process(3)
    assert after not in (stopped, killed, failing)  # the next has a process that never failed
    sweep.let(3)
    assert sweep.process(4) == after  # which goes on as long as all is well
    sweep.let(4)
    sweep.let(0, "fail")
    code, log = sweep.end()
    assert code != 0
    assert log.endswith("RuntimeError: out of memory\n")  # of run 0, though run 1 ended before it
    assert sweep.saved() == {"0"}
    assert f"process {stopped} was asked to stop; a new one goes on" in log
    assert (
        "[2/5] pwd p=0.8 lambda_p=0.001 lr=0.001 seed=1: failed: its process was ended by SIG"
        in log
    )
    (path,) = sweep.runs.glob("*/*/*/failure.json")
    record = json.loads(path.read_text())["record"]
    assert (record["seed"], record["status"]) == (1, "failed")
    assert "SIGKILL, as the system does when memory is full" in record["reason"]
    wait_for_end(another, after)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=SLOW),
        pytest.param(signal.SIGINT, marks=SLOW),
    ],
)
def test_a_sweep_that_is_asked_to_stop_stops_every_process(start, number):
    sweep = start("0,1,2")
    first, second = sweep.process(0), sweep.process(1)
    os.kill(first, signal.SIGTERM)
    first = sweep.process(0, first)  # one that was not there at first
    (sweep.runs / "0.saved").unlink()
    if number == signal.SIGINT:
        os.killpg(sweep.main.pid, number)  # as a terminal does
    else:
        os.kill(sweep.main.pid, number)
    code, log = sweep.end()
    assert code == 130, log
    assert sweep.saved() == {"0", "1"}
    assert "Traceback" not in log
    wait_for_end(first, second)


@SLOW
def test_the_processes_of_a_killed_sweep_save_and_end(start):
    sweep = start("0,1,2")
    pids = sweep.process(0), sweep.process(1)
    sweep.let(1)
    sweep.process(2)
    sweep.main.kill()
    wait_for_end(*pids)
    assert sweep.saved() == {"0", "2"}
    assert "Traceback" not in sweep.log.read_text()


@SLOW
def test_idle_processes_of_a_killed_sweep_end_too(start):
    sweep = start("0,1")
    busy, idle = sweep.process(0), sweep.process(1)
    sweep.let(1)
    sweep.main.kill()
    wait_for_end(busy, idle)
    assert sweep.saved() == {"0"}


def children(pid: int) -> list[str]:
    try:
        return [" ".join(child.cmdline()) for child in psutil.Process(pid).children()]
    except psutil.Error:  # it has just ended
        return []


def test_ctrl_c_before_anything_has_begun_is_quiet(start, monkeypatch):
    sweep = start("0,1", TRAIN)
    while not any("forkserver" in command for command in children(sweep.main.pid)):
        assert sweep.main.poll() is None, sweep.log.read_text()
        time.sleep(0.01)
    os.killpg(sweep.main.pid, signal.SIGINT)  # the workers import
    code, log = sweep.end()
    assert code == 130, log
    assert len(log.splitlines()) == 2, log

    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    sweep = start("0,1", TRAIN)
    while "hydra" not in sweep.log.read_text():  # the sweep itself imports
        assert sweep.main.poll() is None, sweep.log.read_text()
        time.sleep(0.01)
    os.killpg(sweep.main.pid, signal.SIGINT)
    code, log = sweep.end()
    assert code == -signal.SIGINT
    assert "Traceback" not in log


@SLOW
@pytest.mark.parametrize(("setting", "at_once"), [("runs_per_gpu=auto", 4), ("runs_per_gpu=3", 6)])
def test_runs_share_a_gpu_as_measured_or_as_asked_for(start, monkeypatch, setting, at_once):
    monkeypatch.setenv("PRETENDED_GPUS", "2")
    sweep = start("0,1,2,3,4,5,6", at_once=setting)
    for seed in range(7):
        pid = sweep.process(seed)
        while not (told := (sweep.runs / f"{seed}.{pid}").read_text()):
            time.sleep(0.01)
        assert told == str(at_once)
        sweep.let(seed)
    code, log = sweep.end()
    assert code == 0, log
    assert ("2 runs share a GPU: one takes 0.0 GiB and 50 % of its time" in log) == (
        setting == "runs_per_gpu=auto"
    )
