from __future__ import annotations

import csv

import pytest
import torch
import wandb
from torch import nn

from conftest import read_wandb
from pnorm_decay.training.settings import LoggerSettings
from pnorm_decay.training.tracking import (
    Tracker,
    log_weight_histogram,
    shortened,
    write_csv,
)


def model_of(*values: float) -> nn.Module:
    model = nn.Linear(len(values), 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def tracker(tmp_path, **changes):
    logger = {"mode": "offline", "project": "test", "entity": None, "dir": str(tmp_path)}
    run = {"id": "abc", "name": "a run", "group": "a group", "job_type": "pwd", "tags": ["demo"]}
    run["config"] = {"p": 0.5, "lr": 0.1}
    return Tracker(tmp_path, LoggerSettings(**(logger | changes)), run)


def test_histogram_counts_every_decayed_weight_in_its_bin():
    counts, edges = log_weight_histogram(model_of(0.0, 1e-30, 0.011, -0.011, 10.5))
    assert counts.sum() == 5
    assert counts[0] == 2  # the exact zero and what is below the range
    within = counts[(edges[:-1] <= -1.9587) & (edges[1:] > -1.9587)]
    assert within.tolist() == [2]


def test_the_histogram_counts_more_weights_than_float32_can():
    model = nn.Linear(2**12, 2**12 + 1, bias=False, device="meta").to_empty(device="cpu")
    nn.init.constant_(model.weight, 0.5)
    counts, _ = log_weight_histogram(model)
    assert counts.sum() == counts.max() == 2**24 + 2**12


def test_history_goes_to_csv_and_to_wandb_and_the_run_is_closed(tmp_path):
    row = {"step": 1, "lr": 0.1, "val_accuracy": 50.0}
    with tracker(tmp_path) as log:
        assert wandb.run is not None
        log.log(row, model_of(0.0, 1.0))
        log.log(row | {"step": 2}, model_of(0.0, 1.0))
        summary = dict(wandb.run.summary)
    assert wandb.run is None
    assert summary["val_accuracy"] == 50.0
    with (tmp_path / "metrics.csv").open() as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["1", "2"]
    with (tmp_path / "weights.csv").open() as file:
        (*_, last) = csv.DictReader(file)
    assert (last["step"], last["sparsity/weight"]) == ("2", "0.5")
    counts = {name: int(value) for name, value in last.items() if name.startswith("log10/")}
    assert (len(counts), sum(counts.values())) == (88, 2)
    assert (counts["log10/-20"], counts["log10/0"]) == (1, 1)


def test_the_summary_is_the_record_and_not_the_last_row(tmp_path):
    row = {"step": 1, "lr": 0.1, "val_accuracy": 50.0, "seconds": 1.0}
    with tracker(tmp_path) as log:
        log.log(row, nn.Sequential(model_of(0.0, 1.0)))
        log.log(row | {"step": 2, "lr": 1e-5, "val_accuracy": 40.0}, nn.Sequential(model_of(0.0)))
        log.summarise({"run_id": "abc", "p": 0.5, "lr": 0.1, "val_accuracy": 41.0, "seconds": 9.0})
    found = read_wandb(tmp_path)
    assert found.pop("keys") == {"train/lr", "train/seconds", "val/accuracy", "weights/log10_abs",
                                 "weights/sparsity/0.weight"}  # fmt: skip
    assert found["config"] == {"p": 0.5, "lr": 0.1}
    assert found["summary"] == {
        "val_accuracy": 41.0,
        "seconds": 9.0,
        "weights/sparsity/0.weight": 1,
    }
    assert found["group"] == "a group"


def test_a_diverged_run_keeps_no_accuracy_of_before(tmp_path):
    with tracker(tmp_path) as log:
        log.log({"step": 1, "lr": 0.1, "val_accuracy": 50.0}, model_of(1.0))
        log.summarise({"val_accuracy": None, "status": "diverged"})
    summary = read_wandb(tmp_path)["summary"]
    assert summary.get("val_accuracy") is None
    assert summary["status"] == "diverged"


@pytest.mark.parametrize("length", [128, 129, 400])
def test_names_are_no_longer_than_wandb_takes(length):
    names = {shortened("x" * (length - 1) + end) for end in "ab"}
    assert {len(name) for name in names} == {128}
    assert len(names) == 2


def test_a_resumed_history_goes_on(tmp_path):
    row = {"step": 1, "lr": 0.1}
    with tracker(tmp_path, mode="disabled") as log:
        log.log(row, model_of(0.0, 1.0))
        state = log.state_dict()
    with tracker(tmp_path, mode="disabled") as log:
        log.load_state_dict(state)
        log.log(row | {"step": 2}, model_of(0.0, 0.0))
    for name in ("metrics.csv", "weights.csv"):
        with (tmp_path / name).open() as file:
            assert [line["step"] for line in csv.DictReader(file)] == ["1", "2"]


def test_the_run_is_closed_when_training_fails_and_wandb_knows(tmp_path, monkeypatch):
    ended, finish = [], wandb.Run.finish

    def noted(self, exit_code=None, **options):
        ended.append(exit_code)
        finish(self, exit_code, **options)

    monkeypatch.setattr(wandb.Run, "finish", noted)
    with pytest.raises(RuntimeError, match="broken"), tracker(tmp_path):
        raise RuntimeError("broken")
    assert wandb.run is None
    with tracker(tmp_path):
        pass
    assert ended == [1, 0]


def test_a_run_that_an_older_version_began_may_lack_columns(tmp_path):
    write_csv(tmp_path / "metrics.csv", [{"step": 1, "lr": 0.1}, {"step": 2, "lr": 0.1, "new": 3}])
    assert (tmp_path / "metrics.csv").read_text() == "step,lr,new\n1,0.1,\n2,0.1,3\n"
