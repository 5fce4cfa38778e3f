"""A sparsity that is asked for: met over targets, p, learning rates and seeds; resumed; refused."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pnorm_decay import SGDPWD, AdamPWD, attach_pnorm_decay, param_groups, sparsity
from pnorm_decay.optim import TargetSparsity
from pnorm_decay.optim.target import take_census


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")  # a GPU machine may lack it
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


IMAGES, LABELS = digits()


def train(
    model: nn.Module, optimizer: Any, target: TargetSparsity, steps: int, begin: int = 0
) -> None:
    images, labels = (x.to(next(model.parameters()).device) for x in (IMAGES, LABELS))
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(len(IMAGES), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        target.step()


def density_error(model: nn.Module, wanted: float) -> float:
    return (1 - sparsity(model)) / (1 - wanted) - 1


def attached(groups: Any, lr: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.NAdam(groups, lr=lr)
    attach_pnorm_decay(optimizer, p=0.8, lambda_p=1.0)
    return optimizer


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
@pytest.mark.parametrize("p", [0.5, 0.8])
def test_it_is_met(p: float, wanted: float, lr: float, seed: int) -> None:
    model = network(seed)
    optimizer = AdamPWD(param_groups(model, p=p, lambda_p=1.0), lr=lr)
    target = TargetSparsity(optimizer, wanted, steps=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, target, 300)
    assert abs(density_error(model, wanted)) < 0.03
    assert target.is_resting
    group = optimizer.param_groups[0]
    assert (group["lambda_p"], group["hold_zeros"]) == (0, True)
    assert optimizer.param_groups[1]["lambda_p"] == 0
    assert not optimizer.param_groups[1]["hold_zeros"]


@pytest.mark.parametrize("lr", [pytest.param(1e-3, marks=pytest.mark.slow), 1e-2])
@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.98])
def test_it_is_met_by_p_1_whose_weights_can_come_back(wanted: float, lr: float) -> None:
    model = network()
    optimizer = AdamPWD(param_groups(model, p=1.0, lambda_p=1.0), lr=lr)
    target = TargetSparsity(optimizer, wanted, steps=1000)
    train(model, optimizer, target, 1000)
    assert abs(density_error(model, wanted)) < 0.03
    with torch.no_grad():
        accuracy = (model(IMAGES).argmax(1) == LABELS).float().mean()
    # The law for p < 1 lets all weights go at once: 0.1 at 0.98, and at 0.9 with lr 1e-2.
    assert accuracy > (0.9 if lr == 1e-2 else 0.4)


def test_it_is_met_though_lr_falls_early() -> None:
    model = network()
    groups = param_groups(model, p=2 / 3, lambda_p=1.0)
    optimizer = AdamPWD(groups, lr=1e-2, exact=True)
    target = TargetSparsity(optimizer, 0.95, steps=1000)
    train(model, optimizer, target, 500)
    for group in optimizer.param_groups:
        group["lr"], group["initial_lr"] = group["lr"] / 50, group["lr"]
    train(model, optimizer, target, 1000, begin=500)
    assert target.is_resting  # lambda_p for the first lr leaves about 2 % too many
    assert abs(density_error(model, 0.95)) < 0.011


def test_weights_that_never_fall_end_with_a_warning_however_long_it_goes_on() -> None:
    weight = nn.Parameter(torch.cat([torch.ones(620), torch.zeros(380)]))  # without a gradient
    groups = [{"params": [weight], "p": 0.8, "lambda_p": torch.tensor(1.0)}]
    optimizer = AdamPWD(groups, lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4)
    target = TargetSparsity(optimizer, 0.5, steps=100_000)
    target.last_epoch, target.present = 98_000, 0.38
    for _ in range(1999):
        target.step()
    with pytest.warns(UserWarning, match="instead of 0.5"):
        target.step()
    assert optimizer.param_groups[0]["lambda_p"].isfinite()


def test_it_is_met_by_groups_of_different_p() -> None:
    model = network()
    groups = [
        {"params": [model[0].weight], "p": 1.0, "lambda_p": 1.0},
        {"params": [model[2].weight], "p": 0.8, "lambda_p": 1.0},
    ]
    optimizer = AdamPWD(groups, lr=1e-2)
    target = TargetSparsity(optimizer, 0.9, steps=1000)
    train(model, optimizer, target, 1000)
    zeros = [float((model[number].weight == 0).double().mean()) for number in (0, 2)]
    share = (zeros[0] * 64 + zeros[1] * 96) / (64 + 96)
    assert share == pytest.approx(0.9, abs=0.003)
    assert min(zeros) > 0.5


@pytest.mark.parametrize(
    ("make", "p", "lr"),
    [
        (SGDPWD, 0.8, 0.1),
        (lambda groups, lr: SGDPWD(groups, lr=lr, momentum=0.9), 0.5, 0.03),
        (lambda groups, lr: AdamPWD(groups, lr=lr, exact=True), 0.5, 1e-2),
        (lambda groups, lr: AdamPWD(groups, lr=lr, exact=True), 0.8, 1e-2),
        (lambda groups, lr: AdamPWD(groups, lr=lr, exact=True), 1.0, 1e-2),
        (AdamPWD, 1.0, 1e-2),
        (attached, 0.8, 3e-3),
    ],
)
def test_it_is_met_by_every_optimizer(make: Any, p: float, lr: float) -> None:
    model = network()
    optimizer = make(param_groups(model, p=p, lambda_p=1.0), lr=lr)
    target = TargetSparsity(optimizer, 0.9, steps=600)
    train(model, optimizer, target, 600)
    assert abs(density_error(model, 0.9)) < 0.03


def test_what_lambda_p_was_given_does_not_matter_but_for_the_ratios() -> None:
    results = []
    for scale in (1e-4, 1e2):
        model = network()
        groups = [
            {"params": [model[0].weight], "p": 0.8, "lambda_p": scale},
            {"params": [model[2].weight], "p": 0.8, "lambda_p": 2 * scale},
            {"params": [model[4].weight], "p": 0.8, "lambda_p": 0.0},
        ]
        optimizer = AdamPWD(groups, lr=1e-2)
        target = TargetSparsity(optimizer, 0.7, steps=200)
        train(model, optimizer, target, 60)
        first, second, third = target.get_last_value()
        assert second == pytest.approx(2 * first)
        assert first > third == 0
        train(model, optimizer, target, 200, begin=60)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("stop", "p"), [(1, 0.8), (37, 0.8), (150, 0.8), (100, 1.0)])
def test_a_resumed_run_is_the_uninterrupted_one(device: torch.device, stop: int, p: float) -> None:
    def begin() -> tuple[nn.Module, Any, TargetSparsity]:
        model = network().to(device)
        optimizer = AdamPWD(param_groups(model, p=p, lambda_p=1.0), lr=1e-2)
        return model, optimizer, TargetSparsity(optimizer, 0.9, steps=200, interval=3)

    whole = begin()
    train(*whole, 200)
    model, optimizer, target = begin()
    train(model, optimizer, target, stop)
    states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, target)]
    resumed = begin()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed, 200, begin=stop)
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_decays_before_the_way_begins() -> None:
    model = network()
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
    target = TargetSparsity(optimizer, 0.9, steps=200, begin=0.5, end=0.75)
    train(model, optimizer, target, 90)
    assert target.get_last_value() == [0, 0]
    assert target.wanted() == 0
    train(model, optimizer, target, 120, begin=90)
    assert target.get_last_value()[0] > 0
    train(model, optimizer, target, 200, begin=120)
    assert abs(density_error(model, 0.9)) < 0.03


def test_groups_that_are_replaced_are_still_steered() -> None:
    """As accelerate's prepare does, by loading the optimizer's own state."""
    model = network()
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
    target = TargetSparsity(optimizer, 0.9, steps=200)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, target, 200)
    assert abs(density_error(model, 0.9)) < 0.03


def test_a_tensor_lambda_p_is_filled() -> None:
    model = network()
    strength = torch.tensor(1.0)
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=strength), lr=1e-2)  # type: ignore[arg-type]
    target = TargetSparsity(optimizer, 0.9, steps=200)
    train(model, optimizer, target, 200)
    assert optimizer.param_groups[0]["lambda_p"] is strength
    assert abs(density_error(model, 0.9)) < 0.03


@pytest.mark.parametrize(
    ("p", "steps", "reason"),
    [(1.5, 100, "p = 1.5 is above 1"), (0.8, 3, "the run was too short")],
)
def test_a_target_that_is_not_met_is_told_with_the_reason(
    p: float, steps: int, reason: str
) -> None:
    model = network()
    optimizer = AdamPWD(param_groups(model, p=p, lambda_p=1.0), lr=1e-3)
    with warnings.catch_warnings(record=True) as early:
        warnings.simplefilter("always")
        target = TargetSparsity(optimizer, 0.9, steps=steps)
    assert len(early) == (p > 1)
    with pytest.warns(
        UserWarning, match=rf"after {steps} steps 0\.\d+ .* instead of 0\.9: {reason}"
    ):
        train(model, optimizer, target, steps)


def test_a_run_that_goes_on_is_told_once() -> None:
    """As where the number of epochs was given."""
    model = network()
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
    target = TargetSparsity(optimizer, 0.5, steps=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, target, 6)
    messages = [str(warning.message) for warning in said]
    assert len([m for m in messages if "goes on after its 3 steps. Give steps=epochs" in m]) == 1


def test_a_network_that_is_too_sparse_already_is_told() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.data *= torch.rand_like(parameter) < 0.01
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-3)
    target = TargetSparsity(optimizer, 0.5, steps=20)
    with pytest.warns(UserWarning, match="instead of 0.5: more weights than that were zero"):
        train(model, optimizer, target, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, r"Invalid sparsity: 0\.0"),
        ({"sparsity": 1.0}, r"Invalid sparsity: 1\.0"),
        ({"sparsity": float("nan")}, "Invalid sparsity: nan"),
        ({"steps": 0}, "Invalid steps: 0"),
        ({"steps": 1.5}, r"Invalid steps: 1\.5"),
        ({"begin": -0.1}, r"Invalid begin: -0\.1"),
        ({"begin": 0.5, "end": 0.5}, r"Invalid end: 0\.5"),
        ({"end": 1.1}, r"Invalid end: 1\.1"),
        ({"interval": 0}, "Invalid interval: 0"),
        ({"interval": 2.5}, r"Invalid interval: 2\.5"),
        ({"sparsity": "0.9"}, "Invalid sparsity: '0.9'"),
        ({"steps": True}, "Invalid steps: True"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    optimizer = AdamPWD(network().parameters(), p=0.8, lambda_p=1.0)
    with pytest.raises(ValueError, match=message):
        TargetSparsity(optimizer, **{"sparsity": 0.9, "steps": 100, **options})


def test_an_optimizer_that_cannot_decay_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, not a Sequential"):
        TargetSparsity(network(), 0.9, 100)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Adam has no p-norm decay .* attach_pnorm_decay"):
        TargetSparsity(torch.optim.Adam(network().parameters()), 0.9, 100)
    with pytest.raises(ValueError, match="lambda_p is 0 in every group"):
        TargetSparsity(AdamPWD(network().parameters(), p=0.8, lambda_p=0.0), 0.9, 100)


def test_the_census_counts_zeros_exactly_and_quantiles_nearly() -> None:
    from pnorm_decay.optim.target import _Census

    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(300, 700, generator=generator), torch.randn(50, generator=generator)]
    params[0][torch.rand(300, 700, generator=generator) < 0.3] = 0
    census = _Census(take_census(params))
    every = torch.cat([param.flatten() for param in params])
    assert census.sparsity() == float((every == 0).double().mean())
    assert census.quantile(0.2) == 0
    for share in (0.4, 0.7, 0.99):
        assert census.quantile(share) == pytest.approx(float(every.abs().quantile(share)), rel=0.05)
    for size in (2.0**-130, 0.25, 2.0):  # where bins end
        smaller = float((every.abs() < size).double().mean())
        assert census.share_below(size) == pytest.approx(smaller, abs=0.005)
    every.zero_()
    assert _Census(take_census([every])).share_below(0.25) == 1


def test_a_sample_that_is_sparser_than_the_whole_does_not_stop_the_decay() -> None:
    """Every fourth weight is in the sample; here more of those are zero than of the others."""
    from pnorm_decay.optim.target import SAMPLE, _Census

    weights = torch.randn(4 * SAMPLE, generator=torch.Generator().manual_seed(0))
    weights.view(-1, 4)[: int(0.95 * SAMPLE), 0] = 0
    weights.view(-1, 4)[: int(0.9 * SAMPLE), 1:] = 0
    census = _Census(take_census([weights]))
    zeros = census.sparsity()
    assert zeros == pytest.approx(0.9125, abs=1e-4)
    assert census.quantile(zeros) == 0
    expected = float(weights[weights != 0].abs().quantile(0.2))
    assert census.quantile(zeros + 0.2 * (1 - zeros)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("first", [0.6, 0.9])
def test_a_sparse_network_becomes_sparser(first: float) -> None:
    model = network()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data *= torch.rand_like(parameter) > first
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
    target = TargetSparsity(optimizer, 0.95, steps=300)
    train(model, optimizer, target, 300)
    assert abs(density_error(model, 0.95)) < 0.03


def test_a_state_sets_lambda_p_whatever_was_built_first() -> None:
    model = network()
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
    target = TargetSparsity(optimizer, 0.9, steps=200)
    train(model, optimizer, target, 50)
    states = [copy.deepcopy(part.state_dict()) for part in (optimizer, target)]
    before = target.get_last_value()
    optimizer.load_state_dict(states[0])
    late = TargetSparsity(optimizer, 0.9, steps=200)
    late.load_state_dict(states[1])
    assert late.get_last_value() == before
    assert before[0] > 0


@pytest.mark.parametrize(
    ("wanted", "first", "second", "are_held"),
    [
        (0.98, 0.85, 0.845, False),
        (0.98, 0.85, 0.8, True),
        (0.8, 0.7, 0.68, False),
        (0.8, 0.7, 0.65, True),
    ],
)
def test_zeros_of_the_exact_step_are_held_once_too_many_come_back(
    wanted: float, first: float, second: float, are_held: bool
) -> None:
    """As in a run of ResNet18 whose density swung between two and four times the wanted one."""
    weight = nn.Parameter(torch.ones(1000))
    optimizer = AdamPWD([{"params": [weight], "p": 0.8, "lambda_p": 1.0}], exact=True)
    target = TargetSparsity(optimizer, wanted, steps=1000, interval=1)
    target.last_epoch = 500  # where the way asks for nearly all of it
    for share in (first, first, (first + second) / 2, second, second):
        weight.data = (torch.arange(1000) >= 1000 * share).float()
        target.step()
    assert optimizer.param_groups[0]["hold_zeros"] == are_held


def test_frozen_weights_do_not_count() -> None:
    model = network()
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
    model[2].weight.requires_grad_(False)
    target = TargetSparsity(optimizer, 0.9, steps=300)
    train(model, optimizer, target, 300)
    assert model[2].weight.all()
    free = torch.cat([model[0].weight.flatten(), model[4].weight.flatten()])
    assert float((free == 0).float().mean()) == pytest.approx(0.9, abs=0.003)


def test_no_weights_to_decay_are_refused() -> None:
    model = nn.LayerNorm(3)
    with pytest.raises(ValueError, match="hold no weights"):
        TargetSparsity(AdamPWD(param_groups(model, p=0.8, lambda_p=1.0)), 0.9, 10)
