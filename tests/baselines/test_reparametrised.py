from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pnorm_decay.baselines import Factorised, ReWA
from pnorm_decay.baselines.reparametrised import Power, Product
from pnorm_decay.optim import split_decayed
from pnorm_decay.sparsity import zero_fraction

EXAMPLE = torch.zeros(2, 6)
INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] > 0).long()
METHODS = [
    lambda: Factorised(factors=2, tolerance=0.01),
    lambda: Factorised(factors=3, tolerance=0.01),
    lambda: ReWA(power=3, order=1, eps=0.0, tolerance=0.01),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def loss_of(model):
    return nn.functional.cross_entropy(model(INPUTS), TARGETS)


def training_loss(model):
    with torch.no_grad():
        return float(loss_of(model.eval()))


def trained(method, steps=300, weight_decay=0.3):
    model = network()
    method.setup(model, EXAMPLE, steps=steps, warmup=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    for step in range(steps):
        loss_of(model).backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    return model.eval()


@settings(max_examples=20)
@given(st.integers(2, 5), st.floats(1e-3, 10), st.integers(0, 1000))
def test_factors_start_with_the_weights_variance_and_away_from_zero(factors, scale, seed):
    torch.manual_seed(seed)
    weight = scale * torch.randn(100, 100)
    parts = Product(factors).right_inverse(weight)
    assert len(parts) == factors
    for part in parts:
        size = scale ** (1 / factors)
        assert part.square().mean().sqrt().item() == pytest.approx(size, rel=0.02)
        assert part.abs().min() > 0.1 * size
        assert part.abs().max() < 3 * size
        assert abs(part.mean().item()) < 0.05 * size
    product = Product(factors)(*parts)
    assert product.square().mean().sqrt().item() == pytest.approx(scale, rel=0.1)
    expected = math.prod(part.double() for part in parts)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-6 * scale)


def test_decay_on_the_factors_is_the_penalty_of_p_2_over_k():
    # At fixed w the factors' decay is least where all have the same size |w|^(1/K).
    for factors in (2, 3, 4):
        w = torch.tensor(0.3)
        p = Factorised.exponent({"factors": factors})
        halves = factors * (w ** (1 / factors)) ** 2 / 2
        assert halves.item() == pytest.approx((w**p / p).item())


@settings(max_examples=50)
@given(
    st.floats(-2, 2),
    st.sampled_from([3, 5, 9]),
    st.floats(0, 1.9),
    st.sampled_from([0.0, 1e-3]),
    st.floats(-3, 3),
)
def test_the_step_of_rewa(w, power, order, eps, grad):
    function = Power(power, order, eps)
    y = function.right_inverse(torch.tensor(w, dtype=torch.float64)).requires_grad_()
    product = function(y)
    assert product.item() == pytest.approx(w, rel=1e-9, abs=1e-300)
    (grad * product).backward()
    plain = power * y.detach() ** (power - 1) * grad  # the chain rule's
    size = y.detach().abs()
    if eps or size > 1e-2:
        expected = plain * size**order / (size ** (power - 1) + eps)
        assert y.grad.item() == pytest.approx(expected.item(), rel=1e-9)
    else:
        assert y.grad.item() == pytest.approx((power * size**order * grad).item())


def test_the_exponent_that_records_give_rewa():
    # The penalty's slope where the decay lambda y balances the step K |y|^M g.
    power, order, decay = 9, 2, 0.1
    p = ReWA.exponent({"power": power, "order": order})
    assert p == pytest.approx(8 / 9)
    for w in (0.2, 0.01):
        y = w ** (1 / power)
        balance = decay * y / (power * y**order)
        assert balance == pytest.approx(decay / power * w ** (p - 1))


@pytest.mark.parametrize("make", METHODS)
def test_training_acts_on_what_is_behind_the_weights_and_the_plain_model_follows(make):
    method = make()
    model = trained(method, steps=5)
    assert not any(name.endswith("0.weight") for name, _ in split_decayed(model)[0])
    plain = method.plain_model()
    assert list(plain.state_dict()) == list(network().state_dict())
    torch.testing.assert_close(plain.eval()(INPUTS), model(INPUTS))
    assert not torch.equal(plain[0].weight, network()[0].weight)


@pytest.mark.parametrize("make", METHODS)
def test_small_weights_go_as_far_as_the_training_loss_allows(make):
    method = make()
    model = trained(method)
    before = training_loss(model)
    trained_weights = [w.clone() for _, w in split_decayed(method.plain_model())[0]]
    method.finish(training_loss)
    plain = method.plain_model()
    assert training_loss(plain) <= before + 0.01
    assert 0.2 < zero_fraction(plain) < 1
    weights = [w for _, w in split_decayed(plain)[0]]
    pairs = list(zip(trained_weights, weights, strict=True))
    gone = torch.cat([old[new == 0].abs() for old, new in pairs])
    for old, new in pairs:
        assert torch.equal(new[new != 0], old[new != 0])
    left = torch.cat([new[new != 0].abs() for new in weights])
    assert gone.max() < left.min()
    # A tenth of a decade more would have cost too much.
    for weight in weights:
        weight.data[weight.abs() < 1.26 * left.min()] = 0
    assert training_loss(plain) > before + 0.01


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Factorised, {"factors": 1}),
        (Factorised, {"factors": 2.5}),
        (Factorised, {"factors": 2, "tolerance": -1.0}),
        (Factorised, {"factors": 2, "tolerance": float("nan")}),
        (ReWA, {"power": 2}),
        (ReWA, {"power": 1}),
        (ReWA, {"order": -1}),
        (ReWA, {"power": 3, "order": 2}),
        (ReWA, {"eps": -1.0}),
    ],
)
def test_bad_options_name_the_key(kind, options):
    defaults = {"tolerance": 0.01}
    if kind is ReWA:
        defaults |= {"power": 9, "order": 2, "eps": 0.0}
    with pytest.raises(ValueError, match=r"^\w+=.*: must be"):
        kind(**{**defaults, **options})


def test_models_it_cannot_take():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    still = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(still[0].weight)
    for model, message in ((tied, "share"), (still, r"0\.weight is zero")):
        with pytest.raises(ValueError, match=message):
            Factorised(factors=2, tolerance=0.0).setup(model, EXAMPLE, steps=1, warmup=0)
