"""Tensors of another size never reach raw pointers: every implementation refuses them."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from pnorm_decay import SGDPWD, AdamPWD

HOW: list[dict[str, Any]] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]


PLAIN = {"lambda_p": 0.0}


def stepped(cls: Any, how: dict[str, Any], **options: Any) -> tuple[Parameter, Any]:
    param = Parameter(torch.ones(40, 40))
    momentum = {"momentum": 0.9} if cls is SGDPWD else {}
    groups = [{"params": [param], "names": ["layer.weight"]}]
    optimizer = cls(groups, lr=0.1, p=0.8, **{"lambda_p": 0.1, **options}, **momentum, **how)
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
        *((what, PLAIN) for what in ("state", "gradient", "grown")),
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


@pytest.mark.parametrize("how", HOW[:3])
@pytest.mark.parametrize("lambda_p", [0.0, 0.1])
@pytest.mark.parametrize("odd", ["transposed state", "expanded state", "transposed gradient"])
def test_what_lies_otherwise_in_memory_is_stepped_right(
    odd: str, lambda_p: float, how: dict[str, Any]
) -> None:
    results = []
    for options in (how, {"foreach": False}):
        param = Parameter(torch.arange(12.0).reshape(3, 4))
        optimizer = AdamPWD([param], lr=0.1, p=0.8, lambda_p=lambda_p, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        if odd == "transposed state":
            optimizer.state[param]["exp_avg"] = torch.arange(12.0).reshape(4, 3).t()
        elif odd == "expanded state":
            optimizer.state[param]["exp_avg_sq"] = torch.ones(3, 1).expand(3, 4).clone()[:, :4]
        else:
            param.grad = torch.arange(12.0).reshape(4, 3).t()
        optimizer.step()
        results.append(param)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("p", [0.8, 2])
def test_a_tensor_whose_elements_are_elsewhere_takes_the_reference(
    p: float, how: dict[str, Any]
) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    inner, plain = torch.full((2, 2), 0.5), Parameter(torch.full((2, 2), 0.5))
    param = Parameter(TwoTensor(inner, inner.clone()))
    for one in (param, plain):
        optimizer = AdamPWD([one], lr=0.1, p=p, lambda_p=0.1, **how)
        one.grad = torch.ones_like(one)
        optimizer.step()
    torch.testing.assert_close(param.data.a, plain.data)
