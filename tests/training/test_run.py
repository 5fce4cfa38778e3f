from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pnorm_decay.training.run import build_optimizer, hyperparameters, identity
from pnorm_decay.training.settings import ConfigError

CONFIG: dict[str, Any] = {
    "data": {"_target_": "D", "path": None, "cache_dir": "data", "flip": True},
    "model": {"width": 16},
    "optimizer": {
        "_target_": "pnorm_decay.AdamPWD",
        "method": "pwd",
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "p": 1,
        "lambda_p": 0.1,
    },
    "pruning": {"name": "none"},
    "schedule": {"final_fraction": 0.1},
    "decay_schedule": {"option": None},
    "trainer": {"steps": 10, "device": "cpu", "threads": "auto", "batch_size": 4},
    "logger": {"mode": "offline"},
    "seed": 0,
    "runs_dir": "runs",
    "results_dir": "results",
}


def changed(**paths: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    for path, value in paths.items():
        *groups, key = path.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


@pytest.mark.parametrize(
    "change",
    [
        {"data__path": "/elsewhere.tar"},
        {"data__cache_dir": "/elsewhere"},
        {"trainer__device": "cuda"},
        {"trainer__threads": 7},
        {"logger__mode": "online"},
        {"runs_dir": "elsewhere"},
        {"optimizer__p": 1.0},
    ],
)
def test_identity_ignores_how_and_where_a_run_is_done(change):
    assert identity(changed(**change), "D") == identity(CONFIG, "D")


@pytest.mark.parametrize(
    "change",
    [
        {"data__flip": False},
        {"model__width": 17},
        {"optimizer__p": 1.1},
        {"optimizer__betas": [0.9, 0.999]},
        {"schedule__final_fraction": 0.2},
        {"decay_schedule__option": "p"},
        {"trainer__steps": 11},
        {"seed": 1},
    ],
)
def test_identity_tells_runs_of_different_results_apart(change):
    assert identity(changed(**change), "D") != identity(CONFIG, "D")


def test_identity_tells_a_lossy_copy_from_the_original():
    assert identity(CONFIG, "CIFAR-10") != identity(CONFIG, "CIFAR-10, JPEG copy")


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(CONFIG, model)
    decayed, undecayed = optimizer.param_groups
    assert [parameter.shape for parameter in decayed["params"]] == [torch.Size([4, 3])]
    assert (decayed["lambda_p"], undecayed["lambda_p"]) == (0.1, 0.0)
    assert len(undecayed["params"]) == 3
    adamw = {"_target_": "torch.optim.AdamW", "method": "adamw", "lr": 1e-3, "weight_decay": 0.5}
    decayed, undecayed = build_optimizer({"optimizer": adamw}, model).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.5, 0.0)
    assert hyperparameters(changed(optimizer=adamw, seed=3)) == {
        "method": "adamw",
        "p": 2.0,
        "lambda_p": 0.5,
        "lr": 1e-3,
        "seed": 3,
        "target_sparsity": None,
    }
    magnitude = {"_target_": "pnorm_decay.baselines.MagnitudePruning", "name": "magnitude"}
    pruned = hyperparameters(changed(optimizer=adamw, pruning={**magnitude, "sparsity": 0.9}))
    assert (pruned["method"], pruned["target_sparsity"]) == ("magnitude", 0.9)


def test_a_bad_option_names_the_group():
    with pytest.raises(ConfigError, match=r"optimizer: .*lambda_p.*-1"):
        build_optimizer(changed(optimizer__lambda_p=-1), nn.Linear(2, 2))
