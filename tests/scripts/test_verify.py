from __future__ import annotations

import pandas as pd
import pytest
import torch

from conftest import REPOSITORY, SHORT
from pnorm_decay import records
from pnorm_decay.deploy import save_sparse
from pnorm_decay.models import ResNet18
from pnorm_decay.training import load_run

RESULTS = REPOSITORY / "results" / "demo"


def quickest(name="resnet_digits"):
    rows = records.read(RESULTS / f"{name}.csv")
    rows = rows[(rows["method"] == "pwd") & (rows["seed"] == 0)]
    return rows.sort_values("seconds").head(1)


def with_seeds(row, spread):
    """The row, and two more seeds that differ from it by a spread."""
    others = [
        row.assign(
            run_id=f"seed{seed}", seed=seed, val_accuracy=row["val_accuracy"] + sign * spread
        )
        for seed, sign in ((1, 1), (2, -1))
    ]
    return pd.concat([row, *others])


@pytest.mark.slow
def test_a_run_done_again_is_as_recorded_and_a_false_record_is_found(run_program, tmp_path):
    true, false = quickest(), quickest("nanogpt_pydoc")
    false["val_accuracy"] -= 12
    # The spread decides: this machine may round differently than the one of the record.
    records.write(tmp_path / "demo" / "resnet_digits.csv", with_seeds(true, 5.0))
    records.write(tmp_path / "demo" / "nanogpt_pydoc.csv", with_seeds(false, 0.1))
    done = run_program("scripts/verify.py", "--results", str(tmp_path))
    assert done.code == 1, done.out
    text, images = done.out[: done.out.index("demo/resnet_digits")], done.out
    assert f"record {false['val_accuracy'].item():.2f} %" in text
    assert "NOT AS RECORDED (" in text
    assert f"record {true['val_accuracy'].item():.2f} %" in images
    assert "    as recorded (" in images


def test_what_takes_too_long_is_left_out(run_program, tmp_path):
    records.write(tmp_path / "demo" / "resnet_digits.csv", quickest())
    done = run_program("scripts/verify.py", "--results", str(tmp_path), "--longest", "0.1")
    assert done.code == 0
    assert "left out, its runs take more than 0.1 s" in done.out


def test_a_run_that_cannot_be_done_is_an_error(run_program, tmp_path):
    row = quickest().assign(p=0.0)
    records.write(tmp_path / "demo" / "resnet_digits.csv", row)
    done = run_program("scripts/verify.py", "--results", str(tmp_path))
    assert done.code == 1
    assert "error" in done.out


def test_without_records_there_is_nothing_to_verify(run_program, tmp_path):
    assert run_program("scripts/verify.py", "--results", str(tmp_path)).code == 2


def test_other_data_than_the_recorded_leave_an_experiment_out(run_program, tmp_path):
    records.write(tmp_path / "demo" / "resnet_digits.csv", quickest().assign(data="other digits"))
    done = run_program("scripts/verify.py", "--results", str(tmp_path))
    assert "recorded on other digits" in done.out
    assert done.code == 0


@pytest.fixture
def shipped(run_program, tmp_path):
    """Results of a short run with its network, of which verify.py trains nothing again."""
    results, runs = tmp_path / "results", tmp_path / "runs"
    places = [f"runs_dir={runs}", f"results_dir={results}", "logger=none"]
    short = ["experiment=demo/resnet_digits", *SHORT, "optimizer=adamw", "seed=1"]
    assert run_program("experiments/train.py", *short, *places).code == 0
    collected = ["--runs", str(runs), "--results", str(results)]
    assert run_program("scripts/collect.py", *collected).code == 0
    (folder,) = runs.glob("*/*/*")
    path = results / "networks" / "demo" / f"{folder.name}.safetensors"
    path.parent.mkdir(parents=True)
    model, _ = load_run(folder)
    save_sparse(model, path)
    return path


def verify(run_program, path):
    return run_program("scripts/verify.py", "--results", str(path.parents[2]))


def test_a_shipped_network_is_evaluated_or_it_is_said_why_not(run_program, shipped):
    done = verify(run_program, shipped)
    assert done.code == 0, done.out
    recorded = records.read(shipped.parents[2] / "demo" / "resnet_digits.csv")
    accuracy = recorded["val_accuracy"].item()
    assert f"{shipped}: demo/resnet_digits, adamw, evaluated in fp32" in done.out
    assert f"record {accuracy:.2f} %, now {accuracy:.2f} %, difference +0.00 %" in done.out
    assert "as recorded (up to" in done.out

    other = ResNet18(10, 1, width=4)  # untrained
    torch.nn.init.zeros_(other.head.weight)
    save_sparse(other, shipped)
    recorded["val_accuracy"] += 30
    records.write(shipped.parents[2] / "demo" / "resnet_digits.csv", recorded, replace=True)
    changed = verify(run_program, shipped)
    assert changed.code == 1
    assert "NOT AS RECORDED" in changed.out

    whole = shipped.read_bytes()
    shipped.write_bytes(whole[:-20])
    damaged = verify(run_program, shipped)
    assert damaged.code == 1
    assert f"{shipped}: error: {shipped}: " in damaged.out
    save_sparse(ResNet18(10, 1, width=6), shipped)
    assert "does not fit ResNet18" in verify(run_program, shipped).out
    shipped.write_bytes(whole)
    unknown = shipped.rename(shipped.with_name("0123456789ab.safetensors"))
    nobodys = verify(run_program, unknown)
    assert nobodys.code == 1
    assert f"{unknown}: error: no recorded run has the id 0123456789ab" in nobodys.out
