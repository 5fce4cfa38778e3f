"""Fixtures for the whole suite: single-threaded torch, the real data, the programs."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("PNORM_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
# Overrides that make a run of experiment=demo/resnet_digits a matter of a moment.
SHORT = [
    "model.width=4",
    "trainer.epochs=null",
    "trainer.steps=6",
    "trainer.eval_every=3",
    "trainer.threads=1",  # the suite's processes share the cores
]

# An example may take as long as it takes: the machine may be busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU that this torch can use"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn: a test that asks for it runs on a CPU everywhere, and on a GPU too."""
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # the suite's own processes share the cores


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data files; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real data files in {SHARED_DATA}")
    return SHARED_DATA


@dataclass(frozen=True)
class Finished:
    """A program that ended: its exit status and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_program(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Finished]:
    """Runs a program of the repository as its command line would, in this process."""

    def run(program: str, *arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        code: object = 0
        try:
            runpy.run_path(str(REPOSITORY / program), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:  # what a program may set for its whole process
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_flush_denormal(False)
            torch.set_num_threads(1)
        captured = capfd.readouterr()
        return Finished(code if isinstance(code, int) else int(code is not None), *captured)

    return run
