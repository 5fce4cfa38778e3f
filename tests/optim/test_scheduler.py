"""Schedules of group options."""

import copy

import pytest
import torch
from torch import nn

from pnorm_decay import AdamPWD, param_groups
from pnorm_decay.optim import OptionScheduler, ramp


def optimizer_of(lambda_p: float = 0.4) -> AdamPWD:
    return AdamPWD(param_groups(nn.Linear(2, 2), p=0.8, lambda_p=lambda_p), lr=0.1)


def test_a_ramp_of_p_from_2_to_the_groups_own() -> None:
    optimizer = optimizer_of()
    schedule = OptionScheduler(optimizer, "p", ramp(2.0, steps=4, begin=1))
    seen = []
    for _ in range(7):
        seen.append(optimizer.param_groups[0]["p"])
        schedule.step()
    assert seen == pytest.approx([2.0, 2.0, 1.7, 1.4, 1.1, 0.8, 0.8])
    assert schedule.get_last_value() == [0.8, 0.8]


def test_a_warm_up_of_lambda_p_leaves_undecayed_groups_alone() -> None:
    optimizer = optimizer_of()
    schedule = OptionScheduler(optimizer, "lambda_p", ramp(0.0, steps=4))
    schedule.step()
    assert [group["lambda_p"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.0])


def test_any_function_of_step_and_initial_value() -> None:
    optimizer = optimizer_of()
    schedule = OptionScheduler(optimizer, "lambda_p", lambda step, initial: initial / (1 + step))
    schedule.step()
    schedule.step()
    assert schedule.get_last_value()[0] == pytest.approx(0.4 / 3)


def test_beside_a_learning_rate_schedule() -> None:
    optimizer = optimizer_of()
    p = OptionScheduler(optimizer, "p", ramp(2.0, steps=10))
    lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(10):
        optimizer.step()
        lr.step()
        p.step()
    assert optimizer.param_groups[0]["p"] == 0.8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_resuming_goes_on_with_the_schedule() -> None:
    optimizer = optimizer_of()
    schedule = OptionScheduler(optimizer, "p", ramp(2.0, steps=8))
    for _ in range(3):
        schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    schedule.step()

    other = optimizer_of()
    resumed = OptionScheduler(other, "p", ramp(2.0, steps=8))
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.step()
    assert resumed.get_last_value() == schedule.get_last_value()
    assert resumed.get_last_value() != [0.8, 0.8]


def test_a_tensor_is_filled_for_captured_steps() -> None:
    rate = torch.tensor(0.5)
    optimizer = AdamPWD([nn.Parameter(torch.ones(2))], lr=rate, p=1, lambda_p=0.1)
    schedule = OptionScheduler(optimizer, "lr", lambda step, initial: 0.5 / (step + 1))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25


def test_errors_are_named() -> None:
    with pytest.raises(ValueError, match="No option 'lamda'"):
        OptionScheduler(optimizer_of(), "lamda", ramp(0.0, steps=1))
    with pytest.raises(ValueError, match="Invalid steps: 0"):
        ramp(0.0, steps=0)
    optimizer = optimizer_of()
    OptionScheduler(optimizer, "p", lambda step, initial: -1.0)
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"Invalid p: -1\.0"):
        optimizer.step()
