from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from pnorm_decay.training import stopping
from pnorm_decay.training.progress import console

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_the_first_signal_only_asks(number, capsys):
    before = signal.getsignal(number)
    with stopping.graceful():
        assert not stopping.requested()
        os.kill(os.getpid(), number)
        assert stopping.requested()
    assert not stopping.requested()
    assert signal.getsignal(number) is before
    assert "stopping when the state is saved" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "DOUBLE_SECONDS", -1.0)
    with stopping.graceful():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_one_ctrl_c_that_arrives_twice_is_one():
    with stopping.graceful():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.requested()


def test_signals_are_postponed_also_in_a_process_that_is_started():
    def signal_itself_and_install(told) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.install()
        told.send(stopping.requested())

    here, there = FORK.Pipe()
    with stopping.postponed():
        process = FORK.Process(target=signal_itself_and_install, args=(there,))
        process.start()
    assert here.recv()
    process.join()
    with stopping.graceful():
        with stopping.postponed():
            signal.raise_signal(signal.SIGHUP)  # to this thread: others may not hold it back
            assert not stopping.requested()
        assert stopping.requested()


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.graceful():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_has_hung_up_does_not_end_a_run(monkeypatch):
    class HungUp:
        encoding = "utf-8"

        def write(self, text: str) -> None:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stderr", HungUp())
    with stopping.graceful():
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopping.requested()
    console.print("more")
