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


def test_a_list_of_runs_is_done_in_its_order(run_program, tmp_path):
    runs = ["optimizer=adamw seed=3", "optimizer.p=0.5 seed=2"]
    places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    done = run_program(
        *("experiments/train.py", "-m", "hydra/sweeper=hour", "hydra/launcher=basic"),
        *(f"hydra.sweeper.runs={json.dumps(runs)}", "optimizer.lr=0.01,0.02"),
        *(*SHORT, *places, "logger=none", "experiment=demo/resnet_digits"),
    )
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if " seed=" in line]
    told = [[word in line for word in ("adamw", "p=0.5", "lr=0.01")] for line in lines]
    first, second = [True, False], [False, True]
    assert told == [[*first, True], [*first, False], [*second, True], [*second, False]]


def test_a_run_of_a_list_that_cannot_be_done_fails_it(run_program, tmp_path):
    runs = f"hydra.sweeper.runs={json.dumps(['optimizer=nosuch'])}"
    done = run_program("experiments/train.py", "-m", "hydra/sweeper=hour", runs, "logger=none")
    assert done.code == 2
    assert "nosuch" in done.err
