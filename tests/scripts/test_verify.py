from __future__ import annotations

import pandas as pd
import pytest

from conftest import REPOSITORY
from pnorm_decay import records

RECORDED = records.read(REPOSITORY / "results" / "demo" / "resnet_digits.csv")


def quickest():
    rows = RECORDED[(RECORDED["method"] == "pwd") & (RECORDED["seed"] == 0)]
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


# The spread decides: this machine may round differently than the one of the record.
@pytest.mark.parametrize(("change", "spread", "code"), [(0.0, 5.0, 0), (12.0, 0.1, 1)])
def test_a_run_done_again_is_as_recorded_and_a_false_record_is_found(
    run_program, tmp_path, change, spread, code
):
    row = quickest()
    row["val_accuracy"] -= change
    records.write(tmp_path / "demo" / "resnet_digits.csv", with_seeds(row, spread))
    done = run_program("scripts/verify.py", "--results", str(tmp_path))
    assert done.code == code, done.out
    assert f"record {row['val_accuracy'].item():.2f} %" in done.out
    assert ("NOT AS RECORDED" in done.out) == bool(code)


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
