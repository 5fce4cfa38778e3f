import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pnorm_decay.data import base


@pytest.fixture(autouse=True)
def forget_loaded_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another has loaded."""
    monkeypatch.setattr(base, "_latest", None)


@pytest.fixture
def shared_file() -> Callable[[str], Path]:
    """Find a real data file beside the repository, or skip the test."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("PNORM_SHARED_DATA", beside))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder} (PNORM_SHARED_DATA names another folder)")
        return folder / name

    return find
