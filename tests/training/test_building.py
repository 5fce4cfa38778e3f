"""The objects that settings describe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnorm_decay.training.building import build_optimizer, check_optimizer
from pnorm_decay.training.settings import ConfigError, OptimizerSettings

PWD = {"_target_": "pnorm_decay.AdamPWD", "method": "pwd", "lr": 1e-3, "p": 1, "lambda_p": 0.1}


def settings(**options):
    return OptimizerSettings.checked(PWD | options, "optimizer")


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, undecayed = build_optimizer(settings(), model).param_groups
    assert [parameter.shape for parameter in decayed["params"]] == [torch.Size([4, 3])]
    assert (decayed["lambda_p"], undecayed["lambda_p"]) == (0.1, 0.0)
    assert len(undecayed["params"]) == 3
    adamw = {"_target_": "torch.optim.AdamW", "method": "adamw", "lr": 1e-3, "weight_decay": 0.5}
    adamw = OptimizerSettings.checked(adamw, "optimizer")
    decayed, undecayed = build_optimizer(adamw, model).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.5, 0.0)


def test_undecayed_parameters_hold_no_zeros_and_are_stepped_as_in_the_recorded_runs():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, undecayed = build_optimizer(settings(hold_zeros=True), model).param_groups
    assert (decayed["hold_zeros"], undecayed["hold_zeros"]) == (True, False)
    assert (decayed["foreach"], undecayed["foreach"]) == (None, False)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"p": 0}, r"optimizer: Invalid p: 0"),
        ({"method": "exact", "exact": True, "p": 3}, r"optimizer: Invalid p: 3"),
        (
            {"method": "exact", "exact": True, "reweight_every": 2},
            r"optimizer: `exact` and `reweight_every` exclude",
        ),
    ],
)
def test_what_only_the_optimizer_knows_is_found_before_there_is_a_model(options, line):
    with pytest.raises(ConfigError, match=line):
        check_optimizer(settings(**options))
