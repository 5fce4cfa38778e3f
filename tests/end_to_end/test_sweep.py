"""`experiments/sweep.py` from the command line."""

from __future__ import annotations

import json

from conftest import SHORT

SWEEP = "experiments/sweep.py"
ONE = ["demo", "--experiments", "resnet_digits", "--sweeps", "sgd"]


def test_a_sweep_of_an_experiment_is_done_once(run_program, tmp_path):
    places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    command = [SWEEP, *ONE, "--", *SHORT, *places, "grid.sgd_lr=0.01", "logger=none"]
    command.append("hydra/launcher=basic")
    done = run_program(*command)
    assert done.code == 0, done.err
    (path,) = (tmp_path / "runs" / "demo" / "resnet_digits").glob("*/result.json")
    assert json.loads(path.read_text())["record"]["method"] == "sgd"
    assert "demo/resnet_digits, sgd" in done.err
    assert "already complete" in run_program(*command).err


def test_demo_experiments_name_no_seeds_to_repeat(run_program):
    repeated = run_program(SWEEP, "demo", "--repeat-best")
    assert repeated.code == 0
    assert repeated.err == ""


def test_an_unknown_experiment_is_named(run_program):
    unknown = run_program(SWEEP, "demo", "--experiments", "nosuch")
    assert unknown.code == 2
    assert "nosuch: not in configs/experiment/demo" in unknown.err
