"""`scripts/evaluate.py` from the command line."""

from __future__ import annotations

import json
import math
import shutil

import pandas as pd
import pytest

from conftest import SHORT

EVALUATE = "scripts/evaluate.py"


@pytest.fixture
def places(tmp_path):
    return ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]


@pytest.fixture
def run_dir(run_program, tmp_path):
    """The folder of one short fp32 run."""
    places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    command = ["experiment=demo/resnet_digits", *SHORT, *places, "logger=none"]
    assert run_program("experiments/train.py", *command, "trainer.precision=fp32").code == 0
    (path,) = (tmp_path / "runs").glob("*/*/*/result.json")
    return path.parent


def evaluations(tmp_path):
    path = tmp_path / "results" / "demo" / "evaluation" / "resnet_digits.csv"
    return pd.read_csv(path, dtype={"run_id": str}).set_index("precision")


def test_in_the_run_s_precision_it_is_what_the_run_recorded(run_program, places, run_dir, tmp_path):
    done = run_program(EVALUATE, *places)
    assert done.code == 0, done.out
    record = json.loads((run_dir / "result.json").read_text())["record"]
    row = evaluations(tmp_path).loc["fp32"]
    assert row["run_id"] == run_dir.name
    assert row["val_loss"] == pytest.approx(record["val_loss"], rel=1e-6)
    assert row["val_accuracy"] == record["val_accuracy"]
    assert math.isnan(row["structured_share"]) == (record["sparsity"] == 0)
    assert "1 to evaluate" in done.out
    assert f"in the run {record['val_accuracy']:.2f} %" in done.out


def test_each_precision_is_a_row_and_is_done_once(run_program, places, run_dir, tmp_path):
    for _ in range(2):
        for precision in ("fp32", "bf16"):
            done = run_program(EVALUATE, run_dir.name, *places, "--precision", precision)
            assert done.code == 0, done.out
    assert "0 to evaluate" in done.out
    rows = evaluations(tmp_path)
    assert list(rows.index) == ["bf16", "fp32"]
    assert 0 < abs(rows["val_loss"]["bf16"] - rows["val_loss"]["fp32"]) < 0.1


def test_bad_input_is_one_line(run_program, places, run_dir):
    unknown = run_program(EVALUATE, "nosuch", *places)
    assert unknown.code == 2
    assert "no saved network of nosuch" in unknown.out

    (run_dir / "model.pt").write_bytes(b"not a network")
    damaged = run_program(EVALUATE, *places)
    assert damaged.code == 2
    assert "model.pt is damaged" in damaged.out


def change_record(run_dir, **values):
    path = run_dir / "result.json"
    result = json.loads(path.read_text())
    result["record"] |= values
    path.write_text(json.dumps(result))


def test_a_diverged_run_is_left_out(run_program, places, run_dir):
    change_record(run_dir, status="diverged", val_accuracy=None)
    done = run_program(EVALUATE, *places)
    assert done.code == 0
    assert "0 saved networks" in done.out


@pytest.fixture
def second(run_dir):
    """The folder of another run with the same network."""
    folder = run_dir.with_name("0123456789ab")
    shutil.copytree(run_dir, folder)
    change_record(folder, run_id=folder.name)
    return folder


def test_only_the_runs_that_are_named_are_evaluated(run_program, places, run_dir, second, tmp_path):
    done = run_program(EVALUATE, second.name, *places)
    assert done.code == 0, done.out
    assert list(evaluations(tmp_path)["run_id"]) == [second.name]


@pytest.mark.parametrize("what", ["data", "network", "config"])
def test_what_does_not_fit_is_left_out_and_the_others_go_on(
    run_program, places, run_dir, second, tmp_path, what
):
    if what == "data":
        change_record(second, data="other digits")
    elif what == "network":
        (second / "model.pt").write_bytes(b"not a network")
    else:
        path = second / "result.json"
        path.write_text(path.read_text().replace('"width": 4', '"breadth": 4'))
    done = run_program(EVALUATE, *places)
    assert done.code == 2
    said = {"data": "was evaluated on other digits", "network": "model.pt is damaged"}
    assert f"left out: {second / 'model.pt'}" in done.out or what == "config"
    assert said.get(what, "model.breadth=4: ResNet18 has no such option") in done.out
    assert list(evaluations(tmp_path)["run_id"]) == [run_dir.name]
