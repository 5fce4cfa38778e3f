"""Tensors of another size never reach raw pointers: every implementation refuses them."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from pnorm_decay import SGDPWD, AdamPWD

HOW: list[dict[str, Any]] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]


def stepped(cls: Any, how: dict[str, Any], **options: Any) -> tuple[Parameter, Any]:
    param = Parameter(torch.ones(40, 40))
    momentum = {"momentum": 0.9} if cls is SGDPWD else {}
    groups = [{"params": [param], "names": ["layer.weight"]}]
    optimizer = cls(groups, lr=0.1, p=0.8, lambda_p=0.1, **momentum, **options, **how)
    param.grad = torch.ones_like(param)
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("what", "options"),
    [
        *(
            (what, opts)
            for what in ("state", "gradient", "grown")
            for opts in ({}, {"exact": True})
        ),
        ("auxiliary", {"auxiliary_beta": 0.5}),
    ],
)
@pytest.mark.parametrize("cls", [AdamPWD, SGDPWD])
def test_another_shape_is_refused(
    what: str, cls: Any, options: dict[str, Any], how: dict[str, Any]
) -> None:
    param, optimizer = stepped(cls, how, **options)
    before = param.detach().clone()
    name = "exp_avg" if cls is AdamPWD else "momentum_buffer"
    if what == "state":
        optimizer.state[param][name] = torch.zeros(8, 8)
    elif what == "auxiliary":
        name = "auxiliary"
        optimizer.state[param][name] = torch.zeros(40, 41)
    elif what == "gradient":  # stale: it was made for the smaller parameter
        param.data = torch.ones(2, 2)
        before, name = param.detach().clone(), "the gradient"
    else:
        param.data = torch.ones(400, 400)
        param.grad = torch.ones_like(param)
        before = param.detach().clone()
    with pytest.raises(RuntimeError, match=rf"{name}.* must match .* layer\.weight"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("cls", [AdamPWD, SGDPWD])
def test_a_state_of_another_shape_is_not_loaded(cls: Any) -> None:
    _, old = stepped(cls, {})
    param = Parameter(torch.ones(8, 8))
    new = cls([{"params": [param], "names": ["head.weight"]}], lr=0.1, p=0.8, lambda_p=0.1)
    with pytest.raises(ValueError, match=r"head\.weight: .*\(40, 40\), the parameter \(8, 8\)"):
        new.load_state_dict(old.state_dict())
    assert not new.state


@pytest.mark.parametrize("how", HOW)
def test_entries_of_others_in_the_state_are_left_alone(how: dict[str, Any]) -> None:
    """As SAM and its kin keep them: before the first step, and of any shape."""
    for cls in (AdamPWD, SGDPWD):
        param = Parameter(torch.ones(3, 3))
        optimizer = cls([param], lr=0.1, p=0.8, lambda_p=0.1, **how)
        optimizer.state[param]["old_p"] = torch.zeros(7)
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert torch.equal(optimizer.state[param]["old_p"], torch.zeros(7))
        assert (param < 1).all()
