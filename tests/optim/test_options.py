"""Every option: bad values are named, missing ones too, and what excludes each other."""

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from pnorm_decay import SGDPWD, AdamPWD

CLASSES = [AdamPWD, SGDPWD]


BAD: list[tuple[str, Any]] = [
    *(("p", value) for value in (0, -0.5, math.nan, math.inf)),
    *(("lambda_p", value) for value in (-1e-9, math.nan, math.inf)),
    *(("lr", value) for value in (-1.0, math.nan, math.inf, torch.tensor(math.nan))),
    *(("weight_decay", value) for value in (-1.0, math.nan)),
    *(("reweight_every", value) for value in (0, 1.5)),
    *(("auxiliary_beta", value) for value in (-0.1, 1.0, math.nan)),
]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("option", "value"), BAD)
def test_a_bad_value_is_named(cls: Any, option: str, value: Any) -> None:
    params = [Parameter(torch.ones(2, 2))]
    good = {"lr": 0.1, "p": 0.5, "lambda_p": 0.1}
    shown = float(value)
    with pytest.raises(ValueError, match=f"Invalid {option}: {shown:g}"):
        cls(params, **{**good, option: value})
    with pytest.raises(ValueError, match=f"Invalid {option}: {shown:g}"):
        cls([{"params": params, option: value}], **good)
    if not isinstance(value, torch.Tensor):
        optimizer = cls(params, **good)
        optimizer.param_groups[0][option] = value
        with pytest.raises(ValueError, match=f"Invalid {option}: {shown:g}"):
            optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, "Invalid betas: "),
        ({"eps": -1.0}, "Invalid eps: -1.0"),
        ({"lr": torch.ones(2)}, "a tensor lr must have one element"),
    ],
)
def test_bad_values_for_adam(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamPWD([Parameter(torch.ones(2))], **{"p": 0.5, "lambda_p": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -1.0}, "Invalid momentum: -1.0"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ],
)
def test_bad_values_for_sgd(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDPWD([Parameter(torch.ones(2))], p=0.5, lambda_p=0.1, **options)


@pytest.mark.parametrize("missing", ["p", "lambda_p"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_missing_value_is_named_unless_groups_bring_it(cls: Any, missing: str) -> None:
    options = {"p": 0.5, "lambda_p": 0.1}
    value = options.pop(missing)
    params = [Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=f"Missing {missing}: give it to {cls.__name__}"):
        cls(params, **options)
    cls([{"params": params, missing: value}], **options)


@pytest.mark.parametrize("other", ["foreach", "differentiable"])
@pytest.mark.parametrize("cls", CLASSES)
def test_options_that_exclude_each_other(cls: Any, other: str) -> None:
    with pytest.raises(RuntimeError, match=f"`fused` and `{other}`"):
        cls([Parameter(torch.ones(2))], p=1, lambda_p=1, fused=True, **{other: True})


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_wrong_is_said_before_what_is_missing(cls: Any) -> None:
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        cls([Parameter(torch.ones(2))], lr=-1.0)
    with pytest.raises(ValueError, match=r"Invalid p: '0\.8'"):
        cls([Parameter(torch.ones(2))], lr=0.1, p="0.8", lambda_p=0.1)
    with pytest.raises(ValueError, match=r"Invalid reweight_every: 2\.0"):
        cls([Parameter(torch.ones(2))], lr=0.1, p=0.8, lambda_p=0.1, reweight_every=2.0)
    with pytest.raises(ValueError, match=r"Invalid p: 2\.5 .*exact"):
        cls([Parameter(torch.ones(2))], lr=0.1, p=2.5, lambda_p=0.1, exact=True)
    for option in ({"reweight_every": 2}, {"auxiliary_beta": 0.5}):
        with pytest.raises(RuntimeError, match=f"`exact` and `{next(iter(option))}`"):
            cls([Parameter(torch.ones(2))], lr=0.1, p=0.8, lambda_p=0.1, exact=True, **option)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_text_is_told_that_it_is_no_number(cls: Any) -> None:
    params = [Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"'0\.8' \(must be a number, not a text; positive"):
        cls(params, lr=0.1, p="0.8", lambda_p=0.1)
    with pytest.raises(ValueError, match=r"Invalid lambda_p: '1' .*not a text"):
        cls(params, lr=0.1, p=0.8, lambda_p="1")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_model_is_told_from_its_parameters(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"not a Linear: give param_groups\(model"):
        cls(torch.nn.Linear(2, 2), lr=0.1, p=0.8, lambda_p=0.1)


@pytest.mark.parametrize("betas", [(0.9,), 0.9, (0.9, 0.99, 0.5), (0.9, 1.0), ("a", 0.9), "ab"])
def test_bad_betas_are_named(betas: Any) -> None:
    with pytest.raises(ValueError, match="Invalid betas: "):
        AdamPWD([Parameter(torch.ones(2))], p=0.5, lambda_p=0.1, betas=betas)
