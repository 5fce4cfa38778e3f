"""A step takes its numbers from the parameter's group, and moves nothing that it should not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from pnorm_decay import SGDPWD, AdamPWD, attach_pnorm_decay
from pnorm_decay.baselines import CoupledAdam, ProximalAdam

BACKENDS: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


def attached(params: Any, lr: float, **options: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(params, lr=lr)
    attach_pnorm_decay(optimizer, **options)
    return optimizer


DECAYING: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamPWD": AdamPWD,
    "AdamPWD exact": lambda params, **options: AdamPWD(params, exact=True, **options),
    "SGDPWD": SGDPWD,
    "attached": attached,
    "proximal": ProximalAdam,
    "hard threshold": lambda params, **o: ProximalAdam(params, **(o | {"p": 0.0})),
    "coupled": CoupledAdam,
}


def stepped(make: Callable[..., torch.optim.Optimizer], lr: float, group: dict[str, Any]):
    """A weight after one step without a gradient, in a group with options of its own."""
    weight = Parameter(torch.tensor([[0.9, 0.2, 0.04]]))
    optimizer = make([{"params": [weight], **group}], lr=lr, p=0.8, lambda_p=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", DECAYING)
def test_the_learning_rate_is_the_groups(name):
    make = DECAYING[name]
    own = stepped(make, lr=1e-4, group={"lr": 0.1})
    torch.testing.assert_close(own, stepped(make, lr=0.1, group={}), rtol=0, atol=0)
    assert not torch.equal(own, stepped(make, lr=1e-4, group={}))


@pytest.mark.parametrize("name", DECAYING)
def test_the_strength_is_the_groups(name):
    make = DECAYING[name]
    own = stepped(make, lr=0.1, group={"lambda_p": 0.1})
    assert not torch.equal(own, stepped(make, lr=0.1, group={}))
    free = stepped(make, lr=0.1, group={"lambda_p": 0.0})
    assert torch.equal(free, torch.tensor([[0.9, 0.2, 0.04]]))


@pytest.mark.parametrize("name", DECAYING)
def test_a_parameter_without_a_gradient_stays(name):
    moving, frozen = (Parameter(torch.tensor([[0.3, 0.02]])) for _ in range(2))
    optimizer = DECAYING[name]([moving, frozen], lr=0.1, p=0.8, lambda_p=0.5)
    for _ in range(2):
        moving.grad = torch.zeros_like(moving)
        optimizer.step()
    assert not torch.equal(moving, torch.tensor([[0.3, 0.02]]))
    assert torch.equal(frozen, torch.tensor([[0.3, 0.02]]))


@pytest.mark.parametrize("how", BACKENDS, ids=str)
@pytest.mark.parametrize("cls", [AdamPWD, SGDPWD])
@pytest.mark.parametrize("exact", [False, True])
def test_the_l2_term_needs_no_p_norm_beside_it(cls, exact, how):
    weight = Parameter(torch.tensor([[0.9, -0.2], [0.04, 0.0]]))
    before = weight.detach().clone()
    optimizer = cls([weight], lr=0.1, p=0.8, lambda_p=0.0, weight_decay=2.0, exact=exact, **how)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before / (1 + 0.1 * 2.0))
