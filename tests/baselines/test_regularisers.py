from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from pnorm_decay.baselines import CoupledAdam, ProximalAdam
from pnorm_decay.baselines.proximal import CLOSED_FORMS, proximal_map


def objective(x: float, v: float, p: float, step: float) -> float:
    penalty = float(x != 0) if p == 0 else abs(x) ** p / p
    return (x - v) ** 2 / 2 + step * penalty


def minimiser(v: float, p: float, step: float) -> float:
    """By a grid over [0, |v|], refined around its best point; 0 is always a candidate."""
    grid = np.linspace(0, abs(v), 2001)
    values = [objective(x, abs(v), p, step) for x in grid]
    best = int(np.argmin(values[1:])) + 1
    low, high = grid[best - 1], grid[min(best + 1, len(grid) - 1)]
    inner = minimize_scalar(
        objective, bounds=(low, high), args=(abs(v), p, step), method="bounded",
        options={"xatol": 1e-12 * max(abs(v), 1e-30)},
    ).x  # fmt: skip
    candidates = [0.0, float(inner), abs(v)]
    return math.copysign(min(candidates, key=lambda x: objective(x, abs(v), p, step)), v)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-10, 10, allow_subnormal=False),
    st.sampled_from(CLOSED_FORMS),
    st.floats(1e-8, 10),
)
def test_the_proximal_map_minimises_its_problem(v, p, step):
    ours = proximal_map(torch.tensor(v, dtype=torch.float64), p, step).item()
    theirs = minimiser(v, p, step)
    reached, wanted = objective(ours, v, p, step), objective(theirs, v, p, step)
    assert reached <= wanted + 1e-12 * (v**2 + wanted)
    # Where two points are all but equally good, either will do; elsewhere it is the same point.
    other = objective(theirs if ours == 0 else 0.0, v, p, step)
    if abs(other - reached) > 1e-6 * v**2:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(-10, 10, width=32),
    st.sampled_from(CLOSED_FORMS),
    st.floats(0, 10),
)
def test_it_shrinks_and_is_odd_and_keeps_the_dtype(v, p, step):
    x = torch.tensor([v, -v])
    mapped = proximal_map(x, p, step)
    assert mapped.dtype == torch.float32
    assert mapped[0] == -mapped[1]
    assert mapped[0].abs() <= x[0].abs()
    assert mapped[0] == 0 or math.copysign(1, mapped[0]) == math.copysign(1, v)


@pytest.mark.parametrize(
    ("p", "threshold"), [(0, 0.2), (0.5, 1.5 * 0.04 ** (2 / 3)), (0.667, 2 * 0.02**0.75), (1, 0.02)]
)
def test_thresholds(p, threshold):
    v = torch.tensor([0.999 * threshold, 1.001 * threshold], dtype=torch.float64)
    assert (proximal_map(v, p, 0.02) != 0).tolist() == [False, True]


@pytest.mark.parametrize("p", CLOSED_FORMS)
def test_proximal_adam_is_adam_then_the_map(p):
    torch.manual_seed(0)
    start, grads = torch.randn(4, 5), torch.randn(3, 4, 5)
    plain, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    free = torch.nn.Parameter(start.clone())
    optimizer = ProximalAdam(
        [{"params": [ours]}, {"params": [free], "lambda_p": 0.0}], lr=0.1, p=p, lambda_p=0.5
    )
    adam = torch.optim.Adam([plain], lr=0.1)
    for number, grad in enumerate(grads):
        plain.grad, ours.grad, free.grad = grad.clone(), grad.clone(), grad.clone()
        optimizer.step()
        adam.step()
        if number == 0:
            assert torch.equal(ours, proximal_map(plain.detach(), p, 0.05))
    assert torch.equal(free, plain)


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
        (ProximalAdam, {"p": 0.8, "lambda_p": 1.0}),
        (ProximalAdam, {"p": 1.0, "lambda_p": -1.0}),
        (ProximalAdam, {"p": 1.0, "lambda_p": math.inf}),
        (CoupledAdam, {"p": 0.0, "lambda_p": 1.0}),
        (CoupledAdam, {"p": 0.5, "lambda_p": -1.0}),
    ],
)
def test_bad_options_are_named(kind, options):
    with pytest.raises(ValueError, match=r"Invalid (p|lambda_p): "):
        kind([torch.nn.Parameter(torch.ones(2, 2))], **options)
