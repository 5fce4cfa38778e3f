from __future__ import annotations

import os
import signal

import pytest

from pnorm_decay.training import stopping


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
