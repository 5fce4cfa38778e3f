"""Ctrl-C and SIGTERM: the first lets a run save and stop, a second Ctrl-C stops at once.

A sweep's workers stop by the same signal, which the terminal or the sweep's main process sends
them; each finishes its step, saves, and then leaves the runs that it is still given undone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import psutil

from pnorm_decay.training.progress import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# One Ctrl-C may arrive twice: from the terminal, and from a program that passes it on.
DOUBLE_SECONDS = 0.5

_since: float | None = None  # when the first signal came
_old_handlers: dict[int, Any] = {}


class Stopped(KeyboardInterrupt):
    """A run was asked to stop and has saved its state."""


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _since is not None


def is_worker() -> bool:
    """Whether this process was started by a sweep's main process."""
    return multiprocessing.parent_process() is not None


def install() -> None:
    """Takes over the signals, for the rest of this process's life or until ``uninstall``."""
    if not _old_handlers and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            _old_handlers[number] = signal.signal(number, _on_signal)


def uninstall() -> None:
    """Gives the signals back and forgets those that came."""
    global _since
    for number, handler in _old_handlers.items():
        signal.signal(number, handler)
    _old_handlers.clear()
    _since = None


@contextlib.contextmanager
def graceful() -> Iterator[None]:
    """Takes the signals over in a block."""
    install()
    try:
        yield
    finally:
        uninstall()


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _since
    now = time.monotonic()
    if _since is None:
        _since = now
        if not is_worker():
            console.print("stopping when the state is saved; Ctrl-C again stops at once")
            _pass_on()
    elif number == signal.SIGINT and now - _since > DOUBLE_SECONDS and not is_worker():
        raise KeyboardInterrupt


def _pass_on() -> None:
    """Sends SIGTERM to the workers that joblib has started for this process."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "--process-name" in child.cmdline():  # its helper processes have no name
                child.terminate()
