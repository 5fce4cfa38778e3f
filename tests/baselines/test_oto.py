from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pnorm_decay.baselines import OTO, compact
from pnorm_decay.deploy import ChannelGroup, channel_groups
from pnorm_decay.models import GPT, ResNet18
from pnorm_decay.sparsity import sparsity, zero_fraction

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEPS = 14


def network() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(width=8)


def train(model, pruning, optimizer, steps, begin=0):
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 8, 8, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        nn.functional.cross_entropy(model(images), labels).backward()
        pruning.before_step(step)
        optimizer.step()
        pruning.after_step(step)
        optimizer.zero_grad()


def start(target=0.5, steps=STEPS, periods=3):
    model = network()
    pruning = OTO(target, periods=periods, end=0.8)
    pruning.setup(model, EXAMPLE, steps=steps, warmup=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, pruning, optimizer


def removed(model) -> tuple[int, int]:
    """How many channels are zero in all that makes them, and how many there are."""
    zero = total = 0
    for group in channel_groups(model, EXAMPLE):
        rows = [part.detach().reshape(group.channels, -1) for part in group.producers]
        zero += int((torch.cat(rows, 1) == 0).all(1).sum())
        total += group.channels
    return zero, total


@pytest.fixture(scope="module")
def pruned():
    model, pruning, optimizer = start()
    train(model, pruning, optimizer, STEPS)
    before = model.eval()(EXAMPLE)
    pruning.finish(lambda _: 0.0)
    return model, before


def test_the_groups_of_a_resnet():
    model = network()
    model.train()
    groups = channel_groups(model, EXAMPLE)
    assert model.training
    # The stem with the first stage's residual stream, two inner widths a stage, three more streams.
    assert sorted(group.channels for group in groups) == sorted(
        [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3
    )
    stem = next(g for g in groups if any(part is model.conv1.weight for part in g.producers))
    assert {id(part) for part in stem.producers} == {
        id(part)
        for layer in (
            model.conv1, model.bn1, model.stages[0][0].conv2, model.stages[0][0].bn2,
            model.stages[0][1].conv2, model.stages[0][1].bn2,
        )
        for part in layer.parameters()
    }  # fmt: skip
    assert {id(weight) for weight in stem.consumers} == {
        id(layer.weight)
        for layer in (
            model.stages[0][0].conv1, model.stages[0][1].conv1, model.stages[1][0].conv1,
            model.stages[1][0].shortcut[0],
        )
    }  # fmt: skip


def test_the_target_is_reached_exactly_and_the_end_changes_nothing(pruned):
    model, before = pruned
    zero, total = removed(model)
    assert zero == round(0.5 * total)
    assert torch.equal(model(EXAMPLE), before)
    assert sparsity(model) == zero_fraction(model)


def test_every_layer_keeps_a_channel_whatever_the_target():
    model, pruning, optimizer = start(target=0.96)
    with torch.no_grad():
        for weight in model.stages[0][0].conv1.parameters():
            weight *= 1e-3  # by their saliency all of its channels would go
    train(model, pruning, optimizer, STEPS)
    for group in channel_groups(model, EXAMPLE):
        rows = [part.detach().reshape(group.channels, -1) for part in group.producers]
        assert (torch.cat(rows, 1) != 0).any()


def test_the_compact_model_has_the_same_logits_and_no_zeros(pruned):
    model, before = pruned
    small = compact(model, EXAMPLE).eval()
    torch.testing.assert_close(small(EXAMPLE), before, rtol=1e-4, atol=1e-5)
    sizes = [sum(w.numel() for w in m.parameters() if w.ndim > 1) for m in (small, model)]
    assert sizes[0] == round((1 - sparsity(model)) * sizes[1])
    assert removed(small)[0] == 0
    assert removed(model)[1] == removed(small)[1] + removed(model)[0]  # and the model is as it was


def test_a_gpt_loses_neurons_of_its_mlps():
    torch.manual_seed(0)
    model = GPT(9, 2, 2, 8, 4, bias=True)
    tokens = torch.randint(9, (2, 4))
    pruning = OTO(0.5, periods=1, end=1.0)
    pruning.setup(model, tokens, steps=3, warmup=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        model(tokens).square().mean().backward()
        pruning.before_step(step)
        optimizer.step()
        pruning.after_step(step)
        optimizer.zero_grad()
    before = model.eval()(tokens)
    pruning.finish(lambda _: 0.0)
    small = compact(model, tokens)
    assert sum(block.mlp.fc.out_features for block in small.blocks) == 32  # of 64
    torch.testing.assert_close(small(tokens), before, rtol=1e-4, atol=1e-6)


def test_groups_go_to_zero_on_a_straight_line_and_the_others_are_left_alone():
    model, pruning, optimizer = start(target=0.3, steps=12, periods=1)  # a period of steps 2 to 9
    train(model, pruning, optimizer, 2)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    before = [[part.detach().clone() for part in g.producers] for g in pruning._groups]
    for step in range(2, 10):
        train(model, pruning, frozen, step + 1, begin=step)
        left = (9 - step) / 8
        number = 0
        for group, old, chosen in zip(pruning._groups, before, pruning._chosen, strict=True):
            number += int(chosen.sum())
            for part, was in zip(group.producers, old, strict=True):
                torch.testing.assert_close(part[chosen].detach(), left * was[chosen])
                assert torch.equal(part[~chosen], was[~chosen])
        assert number == round(0.3 * 360)


def test_the_least_salient_channels_are_chosen():
    group = ChannelGroup(4, [nn.Parameter(torch.rand(4, 3) + 1)], [])
    other = ChannelGroup(4, [nn.Parameter(torch.rand(4, 3) + 1)], [])
    pruning = OTO(0.5)
    pruning._groups = [group, other]
    pruning._pruned = [torch.zeros(4, dtype=torch.bool) for _ in range(2)]
    for each in (group, other):
        each.producers[0].grad = torch.ones(4, 3)
    with torch.no_grad():
        group.producers[0][:] *= 1e-3
        other.producers[0][2] *= 1e-3
    pruning._choose(4)
    chosen = [mask.tolist() for mask in pruning._chosen]
    assert sum(chosen[0]) == 3  # every group keeps one
    assert chosen[1] == [False, False, True, False]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_channel_that_the_loss_depends_on_is_salient_whichever_way_it_would_go(sign):
    """Two channels of equal size: that with a large x.g stays, of either sign."""
    weight = nn.Parameter(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    pruning = OTO(0.5)
    pruning._groups = [ChannelGroup(2, [weight], [])]
    pruning._pruned = [torch.zeros(2, dtype=torch.bool)]
    # The first has |x.g| = 20, the second 0 and a cosine of 0; 1 + cosine alone would prefer it
    # where the first one's cosine is -1.
    weight.grad = torch.tensor([[10.0, 10.0], [10.0, 10.0]]) * sign
    (scores,) = pruning._saliency()
    assert scores[0] > scores[1]


def test_removed_channels_have_no_gradient_that_clipping_or_moments_would_count():
    model, pruning, optimizer = start(periods=1)
    train(model, pruning, optimizer, STEPS - 1)
    assert int(torch.cat(pruning._pruned).sum()) == 180
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    pruning.before_step(STEPS - 1)
    for group, gone in zip(pruning._groups, pruning._pruned, strict=True):
        for part in group.producers:
            assert not part.grad[gone].any()
            assert bool((part.grad[~gone] == 1).all())


def test_it_goes_on_exactly_from_a_checkpoint():
    whole = start()
    train(*whole, steps=STEPS)
    first = start()
    train(*first, steps=6)  # in the middle of the second period
    state = [copy.deepcopy(part.state_dict()) for part in first]
    assert any(bool(mask.any()) for mask in state[1]["chosen"])
    assert any(bool(mask.any()) for mask in state[1]["pruned"])
    second = start()
    for part, saved in zip(second, state, strict=True):
        part.load_state_dict(saved)
    train(*second, steps=STEPS, begin=6)
    for ours, theirs in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Gate(nn.Module):
    """A sigmoid makes one half of zero, which the next layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 4, 3)

    def forward(self, images):
        return self.conv2(torch.sigmoid(self.conv1(images))).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda: nn.Linear(4, 2), torch.zeros(2, 4), "no channels"),
        (Gate, EXAMPLE, "same outputs"),
        (lambda: nn.Conv2d(5, 2, 3), EXAMPLE, "Conv2d does not take an example"),
    ],
)
def test_models_it_cannot_prune(model, example, message):
    with pytest.raises(ValueError, match=message):
        OTO(0.5).setup(model(), example, steps=10, warmup=0)


def test_a_target_that_would_empty_a_layer():
    with pytest.raises(ValueError, match=r"sparsity=0\.99.*at most 0\.96"):
        OTO(0.99).setup(network(), EXAMPLE, steps=10, warmup=0)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.5},
        {"sparsity": 0.5, "periods": 0},
        {"sparsity": 0.5, "end": 0.0},
    ],
)
def test_bad_options_name_the_key(options):
    with pytest.raises(ValueError, match=r"^\w+=.*: must be"):
        OTO(**options)
