"""The warnings: zero tensors under p < 2, biases and norms that decay unasked."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from pnorm_decay import SGDPWD, AdamPWD, attach_pnorm_decay, param_groups


def lora() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 3, bias=False)})
    nn.init.zeros_(model["b"].weight)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def attach(groups: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attach_pnorm_decay(optimizer, **{"p": 0.5, "lambda_p": 0.1, **options})
    return optimizer


def assert_told_once(optimizer: torch.optim.Optimizer, message: str) -> None:
    """The first step warns, at the line that called it; the second does not."""
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("make", [AdamPWD, SGDPWD, attach])
def test_a_zero_tensor_is_named_once(make: Any) -> None:
    model = lora()
    optimizer = make(param_groups(model, p=0.5, lambda_p=0.1))
    assert_told_once(optimizer, r"entirely zero.*: b\.weight\. Leave")
    assert not model["b"].weight.any()


def test_a_tensor_without_a_name_is_described() -> None:
    params = [Parameter(torch.ones(2, 2)), Parameter(torch.zeros(2, 3))]
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match=r": number 1 \(shape \(2, 3\)\)\. Leave"):
        AdamPWD(params, p=0.5, lambda_p=0.1).step()


def test_torchs_own_names_are_used() -> None:
    model = lora()
    with pytest.warns(UserWarning, match=r": b\.weight\. Leave"):
        AdamPWD(model.named_parameters(), p=0.5, lambda_p=0.1).step()


def test_the_warning_comes_when_decay_begins() -> None:
    model = lora()
    optimizer = AdamPWD(param_groups(model, p=0.5, lambda_p=0.0))
    nn.init.ones_(model["a"].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group, p, strength in ((0, 0.5, 0.0), (0, 2.0, 0.1)):
            optimizer.param_groups[group].update(p=p, lambda_p=strength)
            optimizer.step()
    nn.init.zeros_(model["b"].weight)
    optimizer.param_groups[0]["p"] = 0.5
    with pytest.warns(UserWarning, match=r"b\.weight"):
        optimizer.step()


@pytest.mark.parametrize(("p", "excluded"), [(0.5, True), (1.9, True), (2.0, False), (3.0, False)])
def test_zero_tensors_can_be_excluded(p: float, excluded: bool) -> None:
    model = lora()
    groups = param_groups(model, p=p, lambda_p=0.1, zero_init="exclude")
    assert ("b.weight" in groups[1]["names"]) == excluded
    assert ("b.weight" in groups[0]["names"]) != excluded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamPWD(groups).step()
    assert model["b"].weight.any()


def with_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    return model


def make_adam(params: Any) -> torch.optim.Optimizer:
    return AdamPWD(params, p=0.5, lambda_p=0.1)


def make_sgd(params: Any) -> torch.optim.Optimizer:
    return SGDPWD(params, p=0.5, lambda_p=0.1)


@pytest.mark.parametrize("make", [make_adam, make_sgd, attach])
def test_biases_that_decay_unasked_are_named_once(make: Any) -> None:
    optimizer = make(with_norm().named_parameters())
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does before the first step
    message = r"biases and norms, too: 0\.bias, 1\.weight, 1\.bias and 1 more\. .*param_groups"
    assert_told_once(optimizer, message)


def test_biases_in_a_group_of_their_own_without_a_strength_are_named() -> None:
    """As the Hugging Face Trainer groups them: by `weight_decay` alone."""
    parameters = dict(with_norm().named_parameters())
    vectors = [parameters[name] for name in ("0.bias", "1.weight")]
    matrices = [parameters[name] for name in ("0.weight", "2.weight")]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
    with pytest.warns(UserWarning, match=r"too: number 0 \(shape \(2,\)\), number 1"):
        make_adam(groups).step()
    optimizer = make_adam(matrices)
    optimizer.step()
    optimizer.add_param_group({"params": vectors})
    with pytest.warns(UserWarning, match="biases and norms"):
        optimizer.step()


@pytest.mark.parametrize("make", [make_adam, make_sgd, attach])
def test_what_is_meant_to_decay_does_so_without_a_word(make: Any) -> None:
    model = with_norm()
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(param_groups(model, p=0.5, lambda_p=0.1)).step()
        make([{"params": model.parameters(), "p": 0.5, "lambda_p": 0.1}]).step()
        make(vectors).step()
        make([{"params": model.parameters(), "lambda_p": 0.0}]).step()
    assert [str(warning.message) for warning in caught] == []


def test_the_warning_waits_for_the_end_of_a_warm_up() -> None:
    optimizer = make_adam(with_norm().parameters())
    optimizer.param_groups[0]["lambda_p"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    optimizer.param_groups[0]["lambda_p"] = 0.1
    with pytest.warns(UserWarning, match="biases and norms"):
        optimizer.step()
