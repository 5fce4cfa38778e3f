"""One run, one process: who is doing a run says so by a lock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from pnorm_decay.training.progress import console, in_sweep

LOCKS = ".locks"  # in runs_dir: a folder of one file a run


@contextlib.contextmanager
def claimed(path: Path, accelerator: Accelerator) -> Iterator[bool]:
    """Keeps other processes from doing the same run at the same time.

    A run of a sweep does not wait for another process's, so that the sweep goes on; a single run
    waits. The lock goes with the process that holds it.

    Args:
        path: the run's lock file.
        accelerator: of several processes that share the run, the main one holds the lock.

    Yields:
        Whether the run is this process's.
    """
    lock = FileLock(path)
    waits = not in_sweep() or accelerator.num_processes > 1
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not waits:
                yield False
                return
            console.print("another process is doing this run; waiting for it")
            lock.acquire()
    accelerator.wait_for_everyone()
    try:
        yield True
    finally:
        lock.release()
