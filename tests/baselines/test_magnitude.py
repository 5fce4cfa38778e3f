from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pnorm_decay import AdamPWD, param_groups
from pnorm_decay.baselines import MagnitudePruning
from pnorm_decay.sparsity import layer_sparsity, zero_fraction

EXAMPLE = torch.zeros(2, 1, 6, 6)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 5, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 7))


def train(model, pruning, optimizer, steps, begin=0):
    for step in range(begin, steps):
        inputs = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(inputs), inputs[:, 0, 0, 0].long() % 7).backward()
        pruning.before_step(step)
        optimizer.step()
        pruning.after_step(step)
        optimizer.zero_grad()


@settings(max_examples=25)
@given(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["layer", "global"]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_the_target_is_met_to_one_weight(target, scope, num_steps, steps, warmup):
    model = network()
    pruning = MagnitudePruning(target, scope=scope, num_steps=num_steps, end=1.0)
    pruning.setup(model, EXAMPLE, steps=steps, warmup=min(warmup, steps // 2))
    train(model, pruning, torch.optim.AdamW(model.parameters(), lr=1e-2), steps)
    sizes = {"0.weight": 45, "3.weight": 560}
    layers = {name: value * sizes[name] for name, value in layer_sparsity(model).items()}
    if scope == "layer":
        for name, size in sizes.items():
            assert round(layers[name]) == size - round((1 - target) * size)
    else:
        assert round(sum(layers.values())) == 605 - round((1 - target) * 605)


def test_equal_ratio_steps_from_the_end_of_warmup_to_a_fraction_of_the_run():
    model = network()
    pruning = MagnitudePruning(0.75, num_steps=2, end=0.5)
    pruning.setup(model, EXAMPLE, steps=20, warmup=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    fractions = []
    for step in range(20):
        train(model, pruning, optimizer, step + 1, begin=step)
        fractions.append(round(zero_fraction(model), 2))
    assert fractions == [0.0] * 6 + [0.5] * 3 + [0.75] * 11


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_smallest_weights_go_and_stay_away_whatever_the_optimizer_does(scope):
    model = network()
    before = {name: w.detach().abs().clone() for name, w in model.named_parameters() if w.ndim > 1}
    pruning = MagnitudePruning(0.5, scope=scope, num_steps=1, end=0.1)
    pruning.setup(model, EXAMPLE, steps=10, warmup=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    pruning.after_step(0)  # before anything has moved
    zero = {name: model.get_parameter(name) == 0 for name in before}
    groups = [list(before)] if scope == "global" else [[name] for name in before]
    for names in groups:
        pruned = torch.cat([before[name][zero[name]] for name in names])
        kept = torch.cat([before[name][~zero[name]] for name in names])
        assert pruned.max() <= kept.min()
    train(model, pruning, optimizer, 10, begin=1)
    for name, was_zero in zero.items():
        assert torch.equal(model.get_parameter(name) == 0, was_zero)
    assert bool((model[1].weight != 0).all())  # norms and biases are not pruned
    assert list(model.state_dict()) == list(network().state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),  # it would move the zeros
        lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
        lambda model: AdamPWD(param_groups(model, p=0.8, lambda_p=1e-3), lr=1e-2),
    ],
    ids=["AdamW", "SGD", "AdamPWD"],
)
def test_it_goes_on_exactly_from_a_checkpoint(make):
    def start():
        model = network()
        pruning = MagnitudePruning(0.9, num_steps=5)
        pruning.setup(model, EXAMPLE, steps=20, warmup=2)
        return model, pruning, make(model)

    whole = start()
    train(*whole, steps=20)
    first = start()
    train(*first, steps=9)
    assert 0 < zero_fraction(first[0]) < 0.9
    state = [part.state_dict() for part in first]
    second = start()
    for part, saved in zip(second, state, strict=True):
        part.load_state_dict(saved)
    train(*second, steps=20, begin=9)
    for ours, theirs in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, mask in second[1].state_dict()["masks"].items():
        assert torch.equal(mask, whole[1].state_dict()["masks"][name])


def test_pruned_weights_have_no_gradient_that_clipping_or_moments_would_count():
    model = network()
    pruning = MagnitudePruning(0.5, num_steps=1, end=0.1)
    pruning.setup(model, EXAMPLE, steps=10, warmup=0)
    pruning.after_step(0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    pruning.before_step(1)
    for name, weight in model.named_parameters():
        kept = weight != 0 if weight.ndim > 1 else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(weight.grad, kept.float()), name


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": float("nan")},
        {"sparsity": 0.5, "scope": "channel"},
        {"sparsity": 0.5, "num_steps": 0},
        {"sparsity": 0.5, "num_steps": 1.5},
        {"sparsity": 0.5, "end": 0.0},
        {"sparsity": 0.5, "end": 1.1},
    ],
)
def test_bad_options_name_the_key(options):
    with pytest.raises(ValueError, match=r"^\w+=.*: must be"):
        MagnitudePruning(**options)
