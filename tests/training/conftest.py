"""Runs of `experiments/train.py`, for the tests of this folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TRAIN = "experiments/train.py"


@dataclass
class Done:
    """A run that ended: its folder, its record, the rows of metrics.csv."""

    folder: Path
    record: dict[str, Any]
    history: list[dict[str, float]]


@pytest.fixture
def train(run_program, tmp_path) -> Callable[..., Done]:
    def train(*overrides: str, name: str = "runs") -> Done:
        places = [f"runs_dir={tmp_path / name}", f"results_dir={tmp_path / 'results'}"]
        done = run_program(TRAIN, *overrides, *places)
        assert done.code == 0, done.err
        (path,) = (tmp_path / name).glob("*/*/*/result.json")
        with (path.parent / "metrics.csv").open() as file:
            history = [
                {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)
            ]
        return Done(path.parent, json.loads(path.read_text())["record"], history)

    return train
