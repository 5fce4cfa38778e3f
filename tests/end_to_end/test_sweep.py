"""`experiments/sweep.py` from the command line."""

from __future__ import annotations

import json
import shutil

import pytest

from conftest import SHORT
from pnorm_decay import records

SWEEP = "experiments/sweep.py"
ONE = ["demo", "--experiments", "resnet_digits", "--sweeps", "sgd"]


@pytest.fixture
def command(tmp_path):
    """A sweep of two short runs, in this process."""
    places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    own = ["grid.sgd_lr='0.01,0.02'", "logger=none", "hydra/launcher=basic"]
    return [SWEEP, *ONE, "--record", "--", *SHORT, *places, *own]


def results(tmp_path):
    return sorted((tmp_path / "runs" / "demo" / "resnet_digits").glob("*/result.json"))


def test_a_sweep_is_done_and_recorded_once_and_what_is_missing_again(
    run_program, command, tmp_path
):
    done = run_program(*command)
    assert done.code == 0, done.err
    paths = results(tmp_path)
    assert [json.loads(path.read_text())["record"]["method"] for path in paths] == ["sgd", "sgd"]
    assert "demo/resnet_digits, sgd" in done.err
    recorded = tmp_path / "results" / "demo" / "resnet_digits.csv"
    assert set(records.read(recorded)["run_id"]) == {path.parent.name for path in paths}
    written = recorded.stat().st_mtime_ns
    again = run_program(*command)
    assert again.code == 0
    assert again.err == "demo/resnet_digits, sgd: all 2 runs are already complete\n"
    assert recorded.stat().st_mtime_ns == written  # figures that are drawn from it stay, too

    paths[0].unlink()
    third = run_program(*command)
    assert third.code == 0
    assert "all 2 runs" not in third.err
    assert third.err.count("already complete") == 1
    assert results(tmp_path) == paths

    paths[0].write_text("{")
    broken = run_program(*command)
    assert broken.code != 0
    assert "result.json is not valid JSON" in broken.err


def test_ctrl_c_stops_all_sweeps(run_program, command, monkeypatch):
    begun = []

    def interrupted(run, accelerator):
        begun.append(run.id)
        raise KeyboardInterrupt

    monkeypatch.setattr("pnorm_decay.training.run.train_and_record", interrupted)
    two = [*command[: command.index("sgd")], "adamw", *command[command.index("sgd") :]]
    done = run_program(*two)
    assert (done.code, len(begun)) == (130, 1)


def test_the_best_runs_are_repeated_and_recorded(run_program, tmp_path):
    places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    tiny = ["data=pydoc_topics", "model.n_layer=1", "model.n_embd=8", "trainer.steps=2"]
    own = ["trainer.threads=1", "schedule.warmup_steps=0", "logger=none", "hydra/launcher=basic"]
    which = ["cpu", "--experiments", "nanogpt_shakespeare", "--sweeps", "sgd"]
    for _ in range(2):
        done = run_program(SWEEP, "--record", *which, "--", *tiny, *places, *own)
        assert done.code == 0, done.err
        rows = records.read(tmp_path / "results" / "cpu" / "nanogpt_shakespeare.csv")
        best = rows.loc[rows["val_accuracy"].where(rows["seed"] == 0).idxmax(), "lr"]
        assert sorted(rows["seed"]) == [0, 0, 1, 2]
        assert set(rows.loc[rows["seed"] > 0, "lr"]) == {best}
    first, repeated = done.err.splitlines()
    assert first == "cpu/nanogpt_shakespeare, sgd: all 2 runs are already complete"
    assert repeated == "cpu/nanogpt_shakespeare, sgd: all 4 runs are already complete"
    shutil.rmtree(tmp_path / "runs")  # as on a machine that has the records alone
    elsewhere = run_program(SWEEP, "--record", *which, "--", *tiny, *places, *own)
    assert elsewhere.code == 0, elsewhere.err
    assert elsewhere.err == done.err


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
