"""What a person sees of a sweep."""

from __future__ import annotations

import warnings

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from pnorm_decay.training.progress import TOTAL, sweep_position, warnings_in_lines

SIX_MINUTES = 360.0


@pytest.fixture
def third_of_sixty(monkeypatch):
    """This process as the third job of a sweep of sixty on two workers."""
    hydra = {"mode": RunMode.MULTIRUN, "job": {"num": 2}, "launcher": {"n_jobs": 2}}
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(hydra))
    monkeypatch.setenv(TOTAL, "60")


def test_the_time_left_is_that_of_the_other_runs_on_all_workers(third_of_sixty):
    assert sweep_position(SIX_MINUTES) == "[3/60, 171:00 left] "


def test_a_run_that_was_complete_already_tells_no_time(third_of_sixty):
    assert sweep_position() == "[3/60] "


def test_other_launchers_do_not_say_how_many_runs_there_are(third_of_sixty, monkeypatch):
    monkeypatch.delenv(TOTAL)
    assert sweep_position(SIX_MINUTES) == "[3] "


def test_a_single_run_has_no_position():
    assert sweep_position(SIX_MINUTES) == ""


def test_a_warning_to_users_is_a_line(capsys):
    with warnings_in_lines():
        warnings.warn("of two\nlines", stacklevel=1)
    assert capsys.readouterr().err == "warning: of two lines\n"
    with pytest.warns(UserWarning, match="afterwards"):
        warnings.warn("afterwards as before", stacklevel=1)
