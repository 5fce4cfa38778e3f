from __future__ import annotations

import math

import pytest
import torch

from pnorm_decay.baselines import CoupledAdam, ProximalAdam


def test_the_exact_step_is_adams_then_the_minimiser():
    torch.manual_seed(0)
    start, grad = torch.randn(4, 5), torch.randn(4, 5)
    for p in (0.0, 0.5, 1.0, 1.5):
        plain, ours, free = (torch.nn.Parameter(start.clone()) for _ in range(3))
        groups = [{"params": [ours]}, {"params": [free], "lambda_p": 0.0}]
        optimizer = ProximalAdam(groups, lr=0.1, p=p, lambda_p=2.0)
        plain.grad, ours.grad, free.grad = grad, grad.clone(), grad.clone()
        optimizer.step()
        torch.optim.Adam([plain], lr=0.1).step()
        torch.testing.assert_close(free, plain)
        grid = (torch.arange(-40000, 40001) / 10000).double()[:, None, None]
        penalty = (grid != 0).double() if p == 0 else grid.abs() ** p / p
        best = grid.flatten()[((grid - plain.detach()) ** 2 / 2 + 0.2 * penalty).argmin(0)]
        torch.testing.assert_close(ours.double(), best, atol=1e-4, rtol=0)
        assert p > 1 or 0 < int((ours == 0).sum()) < 20


def test_the_coupled_gradient_is_that_of_the_penalty():
    torch.manual_seed(0)
    start, grad = torch.randn(4, 5), torch.randn(4, 5)
    start[0, 0] = 0
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours.grad = grad.clone()
    inside = theirs[theirs != 0]
    ((theirs * grad).sum() + 0.3 * inside.abs().pow(0.7).sum() / 0.7).backward()
    CoupledAdam([ours], lr=0.1, p=0.7, lambda_p=0.3).step()
    torch.optim.Adam([theirs], lr=0.1).step()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours.grad, theirs.grad)  # whose size Adam's first step divides out


def test_the_coupled_gradient_does_not_settle_where_the_exact_step_does():
    reached = {}
    for kind in (CoupledAdam, ProximalAdam):
        w = torch.nn.Parameter(torch.tensor([[0.5]]))
        optimizer = kind([w], lr=1e-2, p=0.5, lambda_p=1.0)
        path = []
        for _ in range(500):
            w.grad = (w - 0.1).detach()
            optimizer.step()
            path.append(w.item())
        reached[kind] = path[-100:]
    assert set(reached[ProximalAdam]) == {0.0}
    assert min(reached[CoupledAdam]) < 0 < max(reached[CoupledAdam])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ProximalAdam, {"p": 2.5, "lambda_p": 1.0}),
        (ProximalAdam, {"p": 0.0, "lambda_p": -1.0}),
        (ProximalAdam, {"p": 1.0, "lambda_p": -1.0}),
        (ProximalAdam, {"p": 1.0, "lambda_p": math.inf}),
        (CoupledAdam, {"p": 0.0, "lambda_p": 1.0}),
        (CoupledAdam, {"p": 0.5, "lambda_p": -1.0}),
    ],
)
def test_bad_options_are_named(kind, options):
    with pytest.raises(ValueError, match=r"Invalid (p|lambda_p): "):
        kind([torch.nn.Parameter(torch.ones(2, 2))], **options)
