"""Programs of scripts/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest

from conftest import REPOSITORY


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a program of scripts/ by its name, for one test."""

    def load(name: str) -> Any:
        path = REPOSITORY / "scripts" / f"{name}.py"
        monkeypatch.syspath_prepend(path.parent)
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, name, module)
        specification.loader.exec_module(module)
        return module

    return load
