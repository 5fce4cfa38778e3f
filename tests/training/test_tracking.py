from __future__ import annotations

import csv

import pytest
import torch
import wandb
from torch import nn

from pnorm_decay.training.settings import LoggerSettings
from pnorm_decay.training.tracking import Tracker, log_weight_histogram, write_csv


def model_of(*values: float) -> nn.Module:
    model = nn.Linear(len(values), 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def tracker(tmp_path, **changes):
    logger = {"mode": "offline", "project": "test", "entity": None, "dir": str(tmp_path)}
    return Tracker(
        tmp_path,
        LoggerSettings(**(logger | changes)),
        run_id="abc",
        experiment="demo/test",
        sweep="none",
        method="pwd",
        name="a run",
        config={"p": 0.5},
    )


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
    assert summary["weights/sparsity/weight"] == 0.5
    with (tmp_path / "metrics.csv").open() as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["1", "2"]
    with (tmp_path / "weights.csv").open() as file:
        (*_, last) = csv.DictReader(file)
    assert (last["step"], last["sparsity/weight"]) == ("2", "0.5")
    counts = {name: int(value) for name, value in last.items() if name.startswith("log10/")}
    assert (len(counts), sum(counts.values())) == (88, 2)
    assert (counts["log10/-20"], counts["log10/0"]) == (1, 1)


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
