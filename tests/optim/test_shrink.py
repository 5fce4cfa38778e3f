"""Zeros at rest: hold_zeros in every backend, with every decay."""

import warnings
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optim.pwd_oracle import make_parameters, set_gradients
from pnorm_decay import SGDPWD, AdamPWD, attach_pnorm_decay, param_groups, sparsity

HOW: list[dict[str, Any]] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
pytestmark = pytest.mark.filterwarnings("ignore:These parameters are entirely zero")


def attached(params: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.NAdam(params, lr=options.pop("lr"))
    attach_pnorm_decay(optimizer, **options)
    return optimizer


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cls", [AdamPWD, SGDPWD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "decay",
    [
        {"lambda_p": 0.0, "p": 0.8},
        {"lambda_p": 0.0, "p": 0.8, "weight_decay": 0.1},
        {"lambda_p": 0.1, "p": 3.0},
        {"lambda_p": 1e-6, "p": 0.8, "exact": True},
        {"lambda_p": 1e-6, "p": 1.5, "exact": True},
        {"lambda_p": 0.0, "p": 0.8, "auxiliary_beta": 0.5},
    ],
)
def test_zeros_stay_and_the_others_move_as_without(
    decay: dict[str, Any], dtype: torch.dtype, cls: Any, how: dict[str, Any]
) -> None:
    held, free = make_parameters(dtype), make_parameters(dtype)
    zeros = [param == 0 for param in held]
    for params, options in ((held, {"hold_zeros": True, **how}), (free, {"foreach": False})):
        optimizer = cls(params, lr=0.01, **decay, **options)
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
    assert any(zero.any() for zero in zeros)
    for one, other, zero in zip(held, free, zeros, strict=True):
        assert not one[zero].any()
        alike = (one != 0) & (other != 0)  # a zero of the exact step stays, once it is one
        rounding = {"rtol": 0.05, "atol": 5e-3} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(one[alike], other[alike], **rounding)
        assert alike[~zero].float().mean() > 0.9 or not alike[~zero].numel()


@pytest.mark.parametrize("how", HOW)
def test_at_rest_it_is_adam_on_the_survivors(how: dict[str, Any]) -> None:
    """lambda_p = 0 with hold_zeros: what a controller leaves behind, to fine-tune."""
    params, plain = make_parameters(torch.float64), make_parameters(torch.float64)
    ours = AdamPWD(params, lr=0.01, p=0.8, lambda_p=0.0, hold_zeros=True, **how)
    theirs = torch.optim.Adam(plain, lr=0.01)
    zeros = [param == 0 for param in params]
    for step in range(5):
        set_gradients(params, step)
        set_gradients(plain, step)
        ours.step()
        theirs.step()
    for one, other, zero in zip(params, plain, zeros, strict=True):
        torch.testing.assert_close(one, torch.where(zero, 0, other))


@pytest.mark.parametrize("make", [AdamPWD, SGDPWD, attached])
def test_the_undecayed_group_of_param_groups_is_not_held(make: Any) -> None:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.bias)
    optimizer = make(param_groups(model, p=0.8, lambda_p=0.1), lr=0.1, p=0.8, lambda_p=0.1,
                     hold_zeros=True)  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert model.bias.all()


def test_a_zero_of_the_exact_step_comes_back_unless_it_is_held() -> None:
    for hold, revived in ((False, True), (True, False)):
        param = Parameter(torch.tensor([[0.0, 1.0]]))
        optimizer = AdamPWD([param], lr=0.1, p=0.5, lambda_p=0.01, exact=True, hold_zeros=hold)
        param.grad = torch.tensor([[1.0, 0.0]])
        optimizer.step()
        assert bool(param[0, 0] != 0) == revived


def test_a_sparse_network_is_fine_tuned() -> None:
    """The two options of the end of a run: decay rests, zeros stay, the loss goes on falling."""
    torch.manual_seed(0)
    inputs = torch.randn(128, 10)
    targets = (inputs[:, 0] > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=0.3), lr=1e-2)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(inputs), targets)

    def train(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return loss().item()

    decayed = train(200)
    zeros = sparsity(model)
    optimizer.param_groups[0].update(lambda_p=0.0, hold_zeros=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = train(200)
    assert 0.3 < zeros == sparsity(model)
    assert tuned < decayed
