"""Decay for every optimizer that torch has."""

import copy
import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from optim.pwd_oracle import array, factor
from pnorm_decay import AdamPWD, attach_pnorm_decay
from pnorm_decay.optim import OptionScheduler, ramp

OPTIMIZERS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and cls not in (torch.optim.Optimizer, torch.optim.SparseAdam)
)


def make(name: str, seed: int = 0) -> tuple[Parameter, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    param = Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        param[0] = 0
    options: dict[str, Any] = {"lr": 0.05}
    if "weight_decay" in inspect.signature(getattr(torch.optim, name)).parameters:
        options["weight_decay"] = 0.0
    return param, getattr(torch.optim, name)([param], **options)


def step(param: Parameter, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((param - 0.3) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_the_list_of_optimizers_is_torchs() -> None:
    assert {"Adafactor", "LBFGS", "Muon", "Rprop"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("p", [0.8, 1.5, 2, 3])
def test_a_step_ends_in_the_papers_division(name: str, p: float) -> None:
    decayed, optimizer = make(name)
    attach_pnorm_decay(optimizer, p=p, lambda_p=0.5)
    plain, undecayed = make(name)
    for _ in range(3):
        with torch.no_grad():
            plain.copy_(decayed)
        before = array(decayed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(decayed, optimizer)
            step(plain, undecayed)
        expected = array(plain) * factor(before, p, 0.05 * 0.5)
        np.testing.assert_allclose(array(decayed), expected, rtol=1e-9)
        assert p >= 2 or not decayed[0].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_detached_it_is_the_plain_optimizer_again(name: str) -> None:
    param, optimizer = make(name)
    plain, other = make(name)
    attach_pnorm_decay(optimizer, p=0.8, lambda_p=0.5).detach()
    for _ in range(2):
        step(param, optimizer)
        step(plain, other)
    assert torch.equal(param, plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_options_survive_state_dict(name: str) -> None:
    param, optimizer = make(name, seed=1)
    attach_pnorm_decay(optimizer, p=0.8, lambda_p=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(param, optimizer)
        resumed, other = make(name)
        attach_pnorm_decay(other, p=2.0, lambda_p=0.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert (other.param_groups[0]["p"], other.param_groups[0]["lambda_p"]) == (0.8, 0.5)
        with torch.no_grad():
            resumed.copy_(param)
        step(param, optimizer)
        step(resumed, other)
    # Not to the bit: torch itself rounds NAdam's state when it loads it.
    torch.testing.assert_close(param, resumed, rtol=1e-7, atol=0)


def test_a_state_without_the_options_gets_those_given() -> None:
    param, optimizer = make("Adam")
    plain = optimizer.state_dict()
    attach_pnorm_decay(optimizer, p=2.0, lambda_p=0.5)
    optimizer.load_state_dict(plain)
    step(param, optimizer)
    assert optimizer.param_groups[0]["lambda_p"] == 0.5


def test_groups_keep_their_own_and_schedules_act() -> None:
    decayed, free = (Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [decayed]}, {"params": [free], "lambda_p": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attach_pnorm_decay(optimizer, p=1.0, lambda_p=1.0)
    warm_up = OptionScheduler(optimizer, "lambda_p", ramp(0.0, steps=2))
    seen = []
    for _ in range(3):
        decayed.grad, free.grad = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
        optimizer.step()
        warm_up.step()
        seen.append(decayed[0, 0].item())
    second = 1 / (1 + 0.05)  # at lambda_p = 0, 1/2 and 1
    assert seen == pytest.approx([1.0, second, second / (1 + 0.1 / second)])
    assert torch.equal(free, torch.ones(2, 2).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_adampwd_does(dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 60).reshape(6, 10).to(dtype)
    attached, fused = Parameter(values.clone()), Parameter(values.clone())
    first = torch.optim.Adam([attached], lr=0.01)
    attach_pnorm_decay(first, p=0.7, lambda_p=0.1)
    second = AdamPWD([fused], lr=0.01, p=0.7, lambda_p=0.1)
    attached.grad = fused.grad = values.flip(0)
    first.step()
    second.step()
    torch.testing.assert_close(attached, fused)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"p": 0}, "Invalid p: 0"), ({"lambda_p": float("nan")}, "Invalid lambda_p: nan")],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    _, optimizer = make("Adam")
    with pytest.raises(ValueError, match=message):
        attach_pnorm_decay(optimizer, **{"p": 1.0, "lambda_p": 1.0, **options})


def test_decay_is_attached_once() -> None:
    _, optimizer = make("Adam")
    decay = attach_pnorm_decay(optimizer, p=0.8, lambda_p=0.5)
    with pytest.raises(ValueError, match="Adam has p-norm weight decay already"):
        attach_pnorm_decay(optimizer, p=0.8, lambda_p=0.5)
    decay.detach()
    attach_pnorm_decay(optimizer, p=0.8, lambda_p=0.5)
    own = AdamPWD([Parameter(torch.ones(2))], p=0.8, lambda_p=0.5)
    with pytest.raises(ValueError, match="AdamPWD has p-norm weight decay already"):
        attach_pnorm_decay(own, p=0.8, lambda_p=0.5)


@pytest.mark.parametrize("p", [0.5, 0.8, 1, 1.5])
def test_exactly_it_is_what_adampwd_does(p: float) -> None:
    values = torch.linspace(-1, 1, 60).reshape(6, 10).double()
    attached, fused = Parameter(values.clone()), Parameter(values.clone())
    first = torch.optim.Adam([attached], lr=0.1)
    attach_pnorm_decay(first, p=p, lambda_p=1.0, exact=True)
    second = AdamPWD([fused], lr=0.1, p=p, lambda_p=1.0, exact=True)
    attached.grad = fused.grad = values.flip(0)
    first.step()
    second.step()
    torch.testing.assert_close(attached, fused)
    assert (attached == 0).equal(fused == 0)
