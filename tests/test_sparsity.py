"""What counts as zero, of which tensors."""

import importlib
import math

import pytest
import torch
from torch import nn

import pnorm_decay
from pnorm_decay import sparsity
from pnorm_decay.sparsity import layer_sparsity, structured_share, zero_fraction, zeroed


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[0] = 0.0  # 4 zeros
        model[0].weight[1, 0] = -1e-14
        model[0].bias.zero_()  # does not decay, so does not count
        model[2].weight.fill_(1e-13)  # not below the threshold
    return model


def test_counts_the_decayed_weights_below_the_threshold(model: nn.Module) -> None:
    assert sparsity(model) == 5 / 30
    assert sparsity(model, threshold=2e-13) == 15 / 30
    assert sparsity(model, threshold=0) == 0
    assert sparsity(model.parameters()) == 5 / 30
    assert sparsity([model[0].weight, model[0].weight]) == 5 / 20
    assert zero_fraction(model) == 4 / 30
    assert layer_sparsity(model) == {"0.weight": 5 / 20, "2.weight": 0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_zeros_of_every_dtype_are_found(model: nn.Module, dtype: torch.dtype) -> None:
    """In float16 the threshold itself would be rounded to 0."""
    model = model.to(dtype).requires_grad_(True)
    model[2].weight.data.fill_(1.0)
    assert sparsity(model) == 5 / 30
    assert structured_share(model) == 4 / 5
    with zeroed(model):
        assert zero_fraction(model) == 5 / 30


def test_frozen_and_shared_parameters(model: nn.Module) -> None:
    model.append(nn.Linear(5, 2, bias=False))
    model[3].weight = model[2].weight
    assert sparsity(model) == 5 / 30
    model[2].weight.requires_grad_(False)
    assert sparsity(model) == 5 / 20


def test_not_a_number_is_not_zero(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].weight.fill_(torch.nan)
    assert sparsity(model) == 5 / 30


def test_zeros_of_whole_units_are_told_from_single_ones(model: nn.Module) -> None:
    assert structured_share(model) == 4 / 5  # the first row, not the second's small weight
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0
    assert structured_share(model) == 6 / 7
    assert structured_share(model, threshold=1e-12) == (4 + 10) / (5 + 10)
    assert math.isnan(structured_share(model, threshold=0))


def test_a_convolution_s_units_are_its_channels() -> None:
    weight = torch.ones(3, 2, 3, 3)
    weight[0] = 0  # an output channel: 18 weights
    weight[:, 1] = 0  # an input channel: 27, of which 9 are counted already
    weight[1, 0, 0] = 0  # three weights of a filter
    assert structured_share([weight]) == 36 / 39
    assert structured_share([weight, torch.ones(0, 3)]) == 36 / 39


@pytest.mark.parametrize("nothing", [nn.LayerNorm(3), []])
def test_nothing_that_decays_is_an_error(nothing: object) -> None:
    with pytest.raises(ValueError, match="No decayed weight"):
        sparsity(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_zeroed_restores_the_weights(model: nn.Module, fails: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with zeroed(model, threshold=1e-12) as inside:
            assert inside is model
            assert zero_fraction(model) == 15 / 30
            assert model[0].weight[2, 0] == 1
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_module_and_the_function_of_its_name_do_not_hide_each_other(model: nn.Module) -> None:
    import pnorm_decay.sparsity as imported

    module = importlib.import_module("pnorm_decay.sparsity")
    assert pnorm_decay.sparsity is sparsity is module.sparsity
    for name in module.__all__:
        assert getattr(imported, name) is getattr(module, name)
    assert pnorm_decay.sparsity.layer_sparsity(model) == layer_sparsity(model)
