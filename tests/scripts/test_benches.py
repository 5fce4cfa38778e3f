"""The benchmarks of training and of sweeps, on tiny cases."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pandas as pd
import pytest

from conftest import REPOSITORY


@pytest.fixture
def load(monkeypatch):
    def load(name: str) -> Any:
        path = REPOSITORY / "scripts" / f"{name}.py"
        monkeypatch.syspath_prepend(path.parent)
        specification = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, name, module)
        specification.loader.exec_module(module)
        return module

    return load


def test_training_is_compared_with_a_straightforward_loop(load, monkeypatch, tmp_path, capsys):
    bench = load("bench_training")
    case = ["experiment=demo/nanogpt_pydoc", "trainer.threads=1"]
    monkeypatch.setattr(bench, "CASES", {"tiny": case})
    output = tmp_path / "training.csv"
    arguments = ["--seconds", "0.05", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    (row,) = pd.read_csv(output).to_dict("records")
    assert row["unit"] == "tokens"
    assert row["steps_timed"] >= 3
    speeds = row["ours_per_second"], row["straightforward_per_second"]
    assert row["ratio"] == pytest.approx(speeds[0] / speeds[1], rel=0.01)
    assert 0 < row["outside_share"] < 1
    assert "tiny" in capsys.readouterr().out


def test_ways_of_doing_a_sweep_are_compared(load, monkeypatch, tmp_path, capsys):
    bench = load("bench_sweep")
    short = ["model.width=4", "trainer.epochs=null", "trainer.steps=3", "logger=none"]
    monkeypatch.setattr(bench, "EXPERIMENTS", {"demo/resnet_digits": short})
    monkeypatch.setattr(bench, "SWEEP", ["optimizer.p=0.5,0.8"])
    output = tmp_path / "sweep.csv"
    arguments = ["--ways", "1x1", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    (row,) = pd.read_csv(output).to_dict("records")
    assert (row["workers"], row["threads_each"], row["ratio"]) == (1, 1, 1.0)
    assert row["runs_per_hour"] > 0
    assert "runs per hour" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["2", "0x1", "axb"])
def test_a_way_that_is_none_is_refused(load, monkeypatch, capsys, text):
    bench = load("bench_sweep")
    monkeypatch.setattr(sys, "argv", ["bench", "--ways", text])
    with pytest.raises(SystemExit):
        bench.main()
    assert "must be WORKERSxTHREADS" in capsys.readouterr().err
