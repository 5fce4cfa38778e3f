"""Fixtures for the whole suite: single-threaded torch, the real data, the programs."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.hydra import Hydra
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

HISTOGRAM_PART = re.compile(r"\.(_type|bins|values)$")  # of the name of an entry of W&B's history

# An example may take as long as it takes: the machine may be busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no GPU; those marked `first` go first."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
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


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Training flushes them to zero in the whole process."""
    yield
    torch.set_flush_denormal(False)


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
        if "experiment=demo/resnet_digits" in arguments:  # which a GPU machine may lack
            pytest.importorskip("sklearn")
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        # Whether the config sets hydra.mode, for which Hydra composes all of it; ours never does.
        monkeypatch.setattr(Hydra, "get_mode", lambda *args, **options: None)
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


def read_wandb(folder: Path) -> dict[str, Any]:
    """What the one offline W&B run below ``folder`` has logged, by W&B's own reader of its file.

    Returns:
        W&B's summary of it, without what W&B adds on its own; also ``group``, ``job_type`` and, as
        ``keys``, the names in its history.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    program = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json"]
    summary, lines = (
        subprocess.run([*program, *more, path], capture_output=True, check=True, text=True).stdout
        for more in (["--summary"], [])
    )
    records = [json.loads(line) for line in lines.splitlines()]
    run = next(record["run"] for record in records if record["type"] == "run")
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    keys = {name for row in rows for name in row if not name.startswith("_")}
    found = json.loads(summary) | {"group": run["run_group"], "job_type": run["job_type"]}
    shown = {k: v for k, v in found["summary"].items() if not k.startswith("_")}
    return found | {"summary": shown, "keys": {HISTOGRAM_PART.sub("", key) for key in keys}}
