import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data.made_up import CPU, write_copy
from pnorm_decay.data import Digits, base


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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small folder of PNG files in CIFAR-10's layout."""
    return write_copy(tmp_path / "copy")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def digits() -> Digits:
    dataset = Digits()
    dataset.setup(CPU)
    return dataset
