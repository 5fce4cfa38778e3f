"""A sweep's runs beside each other, in processes of their own.

The processes come from a server (multiprocessing's forkserver) that has imported everything once; a
process does run after run, until one of them fails.

- A process that is killed, by the out-of-memory killer for instance: its run is recorded as failed.
- One that is asked to stop, where the sweep is not: it saves, and a new one goes on with its run.
- A sweep that is asked to stop passes it on. When it is killed, its processes save and end.
- A run that a process of another sweep is doing: it is looked at again once that process has ended
  with it. What that one did not complete, this sweep does.

(The pool of joblib, Hydra's launcher, ends with the first process that is killed, and takes runs of
a process that was asked to stop for done. Submitit's local executor starts all runs at once.)
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from filelock import FileLock, Timeout
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from pnorm_decay.training import sharing, stopping
from pnorm_decay.training.progress import TOTAL, console
from pnorm_decay.training.provenance import git_commit
from pnorm_decay.training.run import LeftError, ProcessDiedError, RunError, measure, record_lost
from pnorm_decay.training.settings import ConfigError, Settings, cores
from pnorm_decay.training.tracking import LoggerError

LOOK_SECONDS = 0.2  # between two looks at whether the sweep was asked to stop

Job = tuple[int, Sequence[str]]  # a run's place in the sweep, and what it overrides

git_commit()  # of the code that is loaded now, which processes forked from this one will run


@dataclass(frozen=True)
class Sweep:
    """What the runs of a sweep have in common.

    Attributes:
        context: Hydra's, with the loader of configs.
        task: does a run, given its config.
        config: the sweep's config, without what the single runs override.
        total: how many runs there are.
    """

    context: HydraContext
    task: TaskFunction
    config: DictConfig
    total: int
    at_once: int = 1  # how many of them are done beside each other

    def run(
        self, number: int, overrides: Sequence[str], task: TaskFunction | None = None
    ) -> JobReturn:
        """Does one run in this process.

        Args:
            number: the run's, from 0.
            overrides: what the run overrides in the config.
            task: what is done instead of the sweep's task.

        Returns:
            How it ended; also where it failed.

        Raises:
            Stopped: the process was asked to stop, and the run's state is saved.
        """
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
            config.hydra.job.env_set[TOTAL] = str(self.total)
            config.hydra.launcher.n_jobs = self.at_once
        return run_job(
            task_function=task or self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self.context,
        )

    def check(self, overrides: Sequence[Sequence[str]]) -> None:
        """Composes so many of the runs that each of their words is met, and starts none.

        Raises:
            ConfigError: a value is not what a run takes.
        """
        met: set[str] = set()
        for number, words in enumerate(overrides):
            if not met.issuperset(words):
                met.update(words)
                tried = self.run(number, words, Settings.from_config)
                if tried.status != JobStatus.COMPLETED:
                    raise tried._return_value


class Worker:
    """A process that does runs, one at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # The second is imported by the first optimizer of any process, which takes a second.
        context.set_forkserver_preload([__name__, "torch._dynamo"])
        self.connection, its_end = context.Pipe()
        self.process = context.Process(target=_work, args=(its_end,))
        resource_tracker.ensure_running()  # first, because its start lets the signals through
        with stopping.postponed():  # in the new process until it can save
            self.process.start()
        its_end.close()

    def give(self, sweep: bytes, number: int, overrides: Sequence[str], task: bytes = b"") -> None:
        """Has it do a run, or a task other than the sweep's with the run's config.

        Raises:
            OSError: the process has ended.
        """
        self.connection.send((sweep, number, list(overrides), task))

    def result(self) -> JobReturn | None:
        """How its run ended, once the connection is ready; None where the process was stopped.

        Raises:
            ProcessDiedError: the process ended in any other way.
        """
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
        if code == 0:
            return None
        if code > 0:
            raise ProcessDiedError(f"its process ended with status {code}")
        hint = ", as the system does when memory is full" if code == -signal.SIGKILL else ""
        raise ProcessDiedError(f"its process was ended by {signal.Signals(-code).name}{hint}")

    def close(self) -> None:
        """Lets it end when it has nothing to do."""
        self.connection.close()


_idle: list[Worker] = []  # for the next run, also of the next sweep of this process


@atexit.register
def close_idle() -> None:
    """Lets all processes end that have nothing to do."""
    while _idle:
        _idle.pop().close()


class Runs:
    """The runs of a sweep, and the processes that do them.

    Args:
        sweep: what the runs have in common.
        overrides: of each run.
        first: the number of the first run.

    Attributes:
        left: those that are to be started.
        busy: the processes, each with the run that it does.
        done_elsewhere: those that other processes do, with the locks that tell how long.
        ended: how the others ended, by their places.
    """

    def __init__(self, sweep: Sweep, overrides: Sequence[Sequence[str]], first: int) -> None:
        self.sweep, self.first = sweep, first
        self.common = cloudpickle.dumps((sweep, Singleton.get_state()))
        self.left = collections.deque(enumerate(overrides))
        self.busy: dict[Worker, Job] = {}
        self.done_elsewhere: list[tuple[Path, Job]] = []
        self.ended: dict[int, JobReturn] = {}

    def start_next(self) -> None:
        """Has a process do the first that is left."""
        place, words = job = self.left.popleft()
        self.busy[_start(self.common, self.first + place, words)] = job

    def ready(self) -> list[Worker]:
        """The processes whose runs have ended; waits a moment for one."""
        connections = [worker.connection for worker in self.busy]
        ready = multiprocessing.connection.wait(connections, timeout=LOOK_SECONDS)
        return [worker for worker in self.busy if worker.connection in ready]

    def settle(self, worker: Worker) -> None:
        """Notes how a process's run has ended, and keeps the process or lets it go."""
        place, words = job = self.busy.pop(worker)
        try:
            result = worker.result()
        except ProcessDiedError as error:
            if not stopping.requested():
                lost = functools.partial(record_lost, cause=error)
                self.ended[place] = self.sweep.run(self.first + place, words, lost)
            return
        lock = lock_of_another(result)
        if lock is not None:
            self.done_elsewhere.append((lock, job))
        elif result is not None:
            self.ended[place] = result
        elif not stopping.requested():
            self.left.appendleft(job)
            pid = worker.process.pid
            console.print(f"process {pid} was asked to stop; a new one goes on for it")
        if result is not None and self.left and logging_failed(result):
            console.print(f"the other {len(self.left)} runs are left out, for the same reason")
            self.left.clear()
        # After a failure, such as a full memory, a process may not be what it was.
        if lock or (result and result.status == JobStatus.COMPLETED):
            _idle.append(worker)
        else:
            worker.close()


def launch(
    sweep: Sweep,
    overrides: Sequence[Sequence[str]],
    first: int,
    n_jobs: object = None,
    runs_per_gpu: object = "auto",
) -> list[JobReturn]:
    """Does runs beside each other.

    Args:
        sweep: what they have in common.
        overrides: of each run.
        first: the number of the first run.
        n_jobs: how many are done beside each other; -1: one a core; None: `runs_per_gpu` on each
            GPU or, without one, one a core.
        runs_per_gpu: a number, or "auto": measured.

    Returns:
        How each ended, in order.

    Raises:
        ConfigError: a value is not what a run takes, or not the launcher's; none has begun.
        Stopped: the sweep was asked to stop; the runs that had begun have saved their states.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "-m: the processes that torchrun starts share a run, and a sweep starts its own; leave "
            "torchrun out, or add hydra/launcher=basic, which does one run after the other"
        )
    sweep.check(overrides)
    setup_globals()
    at_once = how_many_at_once(sweep, overrides, first, n_jobs, runs_per_gpu)
    runs = Runs(dataclasses.replace(sweep, at_once=at_once), overrides, first)
    told = False  # the workers, to stop
    try:
        while runs.busy or ((runs.left or runs.done_elsewhere) and not stopping.requested()):
            runs.left.extend(_take_free(runs.done_elsewhere))
            while runs.left and len(runs.busy) < at_once and not stopping.requested():
                runs.start_next()
            if stopping.requested() and not told:
                told = True
                for worker in runs.busy:
                    worker.process.terminate()
            for worker in runs.ready():
                runs.settle(worker)
    finally:
        for worker in runs.busy:  # an error, or a second Ctrl-C, which stops at once
            worker.process.kill()
    if stopping.requested():
        raise stopping.Stopped
    return [runs.ended[place] for place in sorted(runs.ended)]


def how_many_at_once(
    sweep: Sweep,
    overrides: Sequence[Sequence[str]],
    first: int,
    n_jobs: object,
    runs_per_gpu: object,
) -> int:
    """How many runs are done beside each other, by the launcher's settings or a measurement."""
    on_cpu = OmegaConf.select(sweep.config, "trainer.device") == "cpu"
    gpus = 0 if on_cpu else torch.cuda.device_count()
    at_once = sharing.how_many(n_jobs, runs_per_gpu, gpus, cores())
    if at_once is None:
        at_once = gpus * (measured(sweep, overrides, first) if len(overrides) > gpus else 1)
    return at_once


def measured(sweep: Sweep, overrides: Sequence[Sequence[str]], first: int) -> int:
    """How many runs are to share a GPU, by what the first that is to be done takes of one.

    Where that cannot be measured it is 1: the run itself will say what is wrong.
    """
    common, task = cloudpickle.dumps((sweep, Singleton.get_state())), cloudpickle.dumps(measure)
    for number, words in enumerate(overrides, first):
        worker = _start(common, number, words, task)
        while not multiprocessing.connection.wait([worker.connection], timeout=LOOK_SECONDS):
            if stopping.requested():
                worker.process.kill()  # it has nothing to save
                return 1
        try:
            ended = worker.result()
        except ProcessDiedError:
            return 1
        if ended is None or ended.status != JobStatus.COMPLETED:
            worker.close()
            return 1
        _idle.append(worker)
        found = ended.return_value
        if found is not None:
            shared = sharing.runs_per_gpu(found, cores() // torch.cuda.device_count())
            console.print(
                f"{shared} runs share a GPU: one takes {found.memory / 2**30:.1f} GiB and "
                f"{100 * found.busy:.0f} % of its time (hydra.launcher.runs_per_gpu sets it)"
            )
            return shared
    return 1


def logging_failed(ended: JobReturn) -> bool:
    """Whether a run failed because W&B cannot be used, which takes a minute to find out."""
    return isinstance(ended._return_value, LoggerError)


def lock_of_another(ended: JobReturn | None) -> Path | None:
    """The lock of a run that another process is doing, where that is why it was not done."""
    error = ended and ended._return_value
    return error.lock if isinstance(error, LeftError) else None


def _take_free(waiting: list[tuple[Path, Job]]) -> list[Job]:
    """Takes out the jobs whose locks no process holds now."""
    free = []
    for lock, job in list(waiting):
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            waiting.remove((lock, job))
            free.append(job)
    return free


def _start(common: bytes, number: int, overrides: Sequence[str], task: bytes = b"") -> Worker:
    """A worker that does this run, or another task with its config."""
    while _idle:
        worker = _idle.pop()
        try:
            worker.give(common, number, overrides, task)
            return worker
        except OSError:  # it has ended in the meantime
            worker.close()
    worker = Worker()
    worker.give(common, number, overrides, task)
    return worker


def _work(jobs: multiprocessing.connection.Connection) -> None:
    """What a worker does: runs until there are no more, or until it is asked to stop."""
    stopping.install()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    setup_globals()
    while True:
        try:
            common, number, overrides, task = jobs.recv()
        except EOFError:
            return
        sweep, state = pickle.loads(common)
        Singleton.set_state(state)
        try:
            ended = sweep.run(number, overrides, pickle.loads(task) if task else None)
        except stopping.Stopped:
            return
        with contextlib.suppress(BrokenPipeError):  # the sweep was killed
            jobs.send_bytes(_packed(ended))


def _stop_with_parent() -> None:
    """Asks this process to stop when the sweep's main process has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _packed(ended: JobReturn) -> bytes:
    """The result of a run for another process; of an error that cannot travel, its message."""
    try:
        content = cloudpickle.dumps(ended)
        pickle.loads(content)
        return content
    except Exception:
        error: Any = ended._return_value
        ended.return_value = RunError(f"{type(error).__name__}: {error}")
        return cloudpickle.dumps(ended)
