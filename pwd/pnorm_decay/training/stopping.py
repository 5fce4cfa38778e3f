"""Ctrl-C, SIGTERM and SIGHUP: the first lets a run save and stop, a second Ctrl-C stops at once.

A sweep's main process passes it on to its workers, see ``launcher``.
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

from pnorm_decay.training.progress import console, is_first_process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
    """Takes over the signals, for the rest of this process's life or until ``uninstall``.

    A SIGHUP that is ignored (``nohup``) stays so.
    """
    if _old_handlers or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            _old_handlers[number] = signal.signal(number, _on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


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


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Holds signals back: here until the block ends, in a process started in it until ``install``.

    A process that is still importing has nothing to save, but would show its frames.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _since
    now = time.monotonic()
    if _since is None:
        _since = now
        if not is_worker() and is_first_process():
            with contextlib.suppress(OSError):  # a terminal that has hung up
                console.print("stopping when the state is saved; Ctrl-C again stops at once")
    elif number == signal.SIGINT and now - _since > DOUBLE_SECONDS and not is_worker():
        raise KeyboardInterrupt
