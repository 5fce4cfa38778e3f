"""Equality with torch, layouts, precision, tensors as options, refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from optim.pwd_oracle import make_parameters, set_gradients
from pnorm_decay import SGDPWD, AdamPWD, attach_pnorm_decay, param_groups

CLASSES = [AdamPWD, SGDPWD]
HOW: list[dict[str, Any]] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int = 20) -> None:
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()


def assert_equal_to_the_bit(left: list[Parameter], right: list[Parameter]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (AdamPWD, torch.optim.Adam, {}),
        (AdamPWD, torch.optim.Adam, {"amsgrad": True, "maximize": True, "betas": (0.5, 0.9)}),
        (SGDPWD, torch.optim.SGD, {}),
        (SGDPWD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (SGDPWD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ],
)
def test_without_decay_it_is_torchs_own_to_the_bit(
    ours: Any, theirs: Any, options: dict[str, Any], dtype: torch.dtype, how: dict[str, Any]
) -> None:
    left, right = make_parameters(dtype), make_parameters(dtype)
    train(ours(left, lr=0.01, p=0.5, lambda_p=0, **options, **how), left)
    train(theirs(right, lr=0.01, **options, **how), right)
    assert_equal_to_the_bit(left, right)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(AdamPWD, torch.optim.Adam), (SGDPWD, torch.optim.SGD)]
)
def test_without_decay_the_default_is_torchs_fused_step_where_that_is_right(
    ours: Any, theirs: Any
) -> None:
    def fresh() -> list[Parameter]:
        return [param for param in make_parameters() if param.is_contiguous()]

    left, right = fresh(), fresh()
    train(ours(left, lr=0.01, p=0.5, lambda_p=0), left)
    train(theirs(right, lr=0.01, fused=True), right)
    assert_equal_to_the_bit(left, right)
    # torch's fused step is wrong for a gradient of another memory layout; the default is not.
    image = torch.randn(8, 6, 3, 3)
    left, right = [Parameter(image.clone())], [Parameter(image.clone())]
    gradient = torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)
    for (param,), optimizer in (
        (left, ours(left, lr=0.01, p=0.5, lambda_p=0)),
        (right, theirs(right, lr=0.01, fused=False)),
    ):
        param.grad = gradient
        optimizer.step()
    assert_equal_to_the_bit(left, right)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_learning_rate_of_0_changes_nothing(cls: Any, how: dict[str, Any]) -> None:
    for extra in ({}, {"auxiliary_beta": 0.5}):
        params, before = make_parameters(), make_parameters()
        train(cls(params, lr=0.0, p=0.5, lambda_p=1.0, **extra, **how), params, steps=2)
        assert_equal_to_the_bit(params, before)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1e-3, 0.5, 1, 1.5, 1.999, 2, 2.001, 3, 50])
def test_zeros_stay_below_2_and_move_above_and_all_is_finite(
    p: float, dtype: torch.dtype, cls: Any, how: dict[str, Any]
) -> None:
    largest = torch.finfo(dtype).max
    weights = [0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e-10, 1e-3, 1.0, 1e10, 1e30, largest / 2]
    param = Parameter(torch.tensor([weights, weights]).to(dtype))
    optimizer = cls([param], lr=1e-3, p=p, lambda_p=1.0, **how)
    for _ in range(30):
        param.grad = torch.full_like(param, 3.0)
        optimizer.step()
    assert param.isfinite().all()
    if p < 2:
        assert not param[:, :2].any()
    else:
        assert param[:, :2].all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cls", CLASSES)
def test_no_subnormal_number_is_left(cls: Any, how: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tiny = torch.finfo(dtype).tiny
        param = Parameter(torch.tensor([tiny * 1.5, tiny * 4, -tiny * 1.5, 1.0], dtype=dtype))
        optimizer = cls([param], lr=1.0, p=2, lambda_p=1.0, **how)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert param.tolist() == [0, 2 * tiny, 0, 0.5]


@pytest.mark.parametrize("how", HOW)
def test_a_gradient_that_is_not_a_number_shows(how: dict[str, Any]) -> None:
    for p in (0.5, 0.8, 2):
        param = Parameter(torch.ones(3))
        optimizer = AdamPWD([param], p=p, lambda_p=0.1, **how)
        param.grad = torch.tensor([1.0, math.nan, 1.0])
        optimizer.step()
        assert param.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cls", CLASSES)
def test_large_tensors_are_cut_without_a_seam(cls: Any, how: dict[str, Any]) -> None:
    """Beyond a foreach piece and many blocks of the fused kernel: the result is element-wise."""
    values = torch.linspace(-1, 1, 300_001)
    options = {"lr": 0.1, "p": 0.7, "lambda_p": 0.01, **how}
    whole, part = Parameter(values.clone()), Parameter(values[-7:].clone())
    for param in (whole, part):
        optimizer = cls([param], **options)
        for step in range(3):
            param.grad = (values * (step - 0.5))[-param.numel() :]
            optimizer.step()
    torch.testing.assert_close(whole[-7:], part, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("how", HOW)
def test_a_tensor_learning_rate(how: dict[str, Any]) -> None:
    left, right = make_parameters(torch.float64), make_parameters(torch.float64)
    train(AdamPWD(left, lr=torch.tensor(0.25), p=0.5, lambda_p=0.1, **how), left)
    train(AdamPWD(right, lr=0.25, p=0.5, lambda_p=0.1, **how), right)
    assert_equal_to_the_bit(left, right)


@pytest.mark.parametrize("options", [{}, {"auxiliary_beta": 0.5}, {"reweight_every": 3}])
@pytest.mark.parametrize("how", HOW)
def test_a_capturable_step_keeps_its_numbers_in_tensors(
    how: dict[str, Any], options: dict[str, Any]
) -> None:
    """The path of CUDA graphs, run eagerly on the CPU: the same numbers."""
    left, right = make_parameters(torch.float64), make_parameters(torch.float64)
    rate = torch.tensor(1e-3, dtype=torch.float64)
    settings = {"p": 0.8, "lambda_p": 0.1, **options, **how}
    train(AdamPWD(left, lr=rate, capturable=True, **settings), left, steps=7)
    train(AdamPWD(right, lr=1e-3, **settings), right, steps=7)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # step counts are float32
        assert (a == 0).equal(b == 0)


def test_autograd_differentiates_through_the_step() -> None:
    def after(rate: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        weight = start.clone()
        optimizer = AdamPWD([weight], lr=rate, p=0.8, lambda_p=0.3, differentiable=True)
        for _ in range(2):
            weight.grad = torch.tensor([[0.2, -0.5, 1.0]], dtype=torch.float64)
            optimizer.step()
        return weight

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: after(r, start.detach()), (rate,))
    (slope,) = torch.autograd.grad(after(rate, start).sum(), start)
    assert slope.all()


@pytest.mark.parametrize("how", HOW)
def test_the_state_is_torchs_and_in_the_parameters_dtype(how: dict[str, Any]) -> None:
    for options, extra in (({}, set()), ({"reweight_every": 2}, {"auxiliary"})):
        params = make_parameters(torch.bfloat16)
        optimizer = AdamPWD(params, p=0.5, lambda_p=0.1, **options, **how)
        train(optimizer, params, steps=1)
        for param in params:
            state = optimizer.state[param]
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | extra
            assert state["exp_avg"].dtype == torch.bfloat16
            assert state["exp_avg"].stride() == torch.zeros_like(param).stride()
    plain = SGDPWD(make_parameters(), p=0.5, lambda_p=0.1, **how)
    train(plain, plain.param_groups[0]["params"], steps=1)
    assert not any(plain.state.values())


@pytest.mark.parametrize("how", HOW)
def test_a_parameter_without_gradient_is_left_alone(how: dict[str, Any]) -> None:
    params = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))]
    optimizer = AdamPWD(params, p=0.5, lambda_p=0.1, **how)
    params[1].grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(params[0], torch.ones(2, 2))
    assert not torch.equal(params[1], torch.ones(2, 2))
    assert params[0] not in optimizer.state


def test_the_closure_is_called_with_gradients() -> None:
    param = Parameter(torch.ones(2, 2))
    optimizer = AdamPWD([param], p=0.5, lambda_p=0.1)

    def closure() -> float:
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4
    assert (param < 1).all()


@pytest.mark.parametrize("lambda_p", [0.0, 0.1])
@pytest.mark.parametrize("cls", CLASSES)
def test_sparse_gradients_are_refused(cls: Any, lambda_p: float) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = cls(embedding.parameters(), p=0.5, lambda_p=lambda_p)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not support sparse gradients"):
        optimizer.step()


def attach(params: list[Parameter], lambda_p: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(params, lr=0.1)
    attach_pnorm_decay(optimizer, p=0.5, lambda_p=lambda_p)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [lambda params, strength: AdamPWD(params, lr=0.1, p=0.5, lambda_p=strength), attach],
)
def test_complex_parameters_are_refused_unless_undecayed(make: Callable[..., Any]) -> None:
    def param() -> Parameter:
        param = Parameter(torch.ones(2, 2, dtype=torch.complex64))
        param.grad = torch.ones_like(param)
        return param

    with pytest.raises(RuntimeError, match="does not decay complex parameters"):
        make([param()], 0.1).step()
    ours, theirs = param(), param()
    make([ours], 0.0).step()
    torch.optim.Adam([theirs], lr=0.1).step()
    assert torch.equal(ours, theirs)


# What a user may meet once.


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cls", CLASSES)
def test_p_and_lambda_p_may_be_tensors(cls: Any, how: dict[str, Any]) -> None:
    left, right = make_parameters(torch.float64), make_parameters(torch.float64)
    strength, exponent = torch.tensor(0.25), torch.tensor(0.75)
    train(cls(left, lr=0.01, p=exponent, lambda_p=strength, **how), left, steps=3)
    train(cls(right, lr=0.01, p=0.75, lambda_p=0.25, **how), right, steps=3)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lambda_p", [0.0, 0.1])
def test_a_tensor_learning_rate_whatever_the_decay(lambda_p: float, how: dict[str, Any]) -> None:
    for cls in CLASSES:
        left, right = make_parameters(torch.float64), make_parameters(torch.float64)
        train(cls(left, lr=torch.tensor(0.25), p=0.5, lambda_p=lambda_p, **how), left, steps=3)
        train(cls(right, lr=0.25, p=0.5, lambda_p=lambda_p, **how), right, steps=3)
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lambda_p", [0.0, 0.1])
def test_a_gradient_with_its_sign_in_a_bit(lambda_p: float, how: dict[str, Any]) -> None:
    if not lambda_p and how.get("fused"):
        pytest.skip("torch's fused step refuses it")
    weights = []
    for sign in (torch._neg_view, torch.neg):
        param = Parameter(torch.ones(3, 3))
        optimizer = AdamPWD([param], lr=0.1, p=0.8, lambda_p=lambda_p, **how)
        param.grad = sign(torch.ones(3, 3))
        optimizer.step()
        weights.append(param)
    assert (weights[0] > 1).all() or lambda_p
    assert torch.equal(*weights)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_parameter_that_is_twice_in_a_group_is_refused(cls: Any) -> None:
    param = Parameter(torch.ones(2, 2))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="twice in one parameter group"),
    ):
        cls([param, param], lr=0.1, p=0.8, lambda_p=0.1)


def test_lazy_weights_wait_for_their_first_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"1\.weight.* forward pass"):
        param_groups(model, p=0.8, lambda_p=0.1)
    optimizer = AdamPWD(model.parameters(), p=0.8, lambda_p=0.1)
    optimizer.step()  # nothing has a gradient yet
    model(torch.ones(5, 4)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4
    assert len(param_groups(model, p=0.8, lambda_p=0.1)[0]["params"]) == 2


@pytest.mark.parametrize("cls", CLASSES)
def test_a_capture_needs_capturable(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    param = Parameter(torch.ones(2, 2))
    param.grad = torch.ones_like(param)
    optimizers = [
        cls([param], lr=0.1, p=0.8, lambda_p=0.1, capturable=capturable)
        for capturable in (False, True)
    ]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"graph capture of step.* capturable is False"):
        optimizers[0].step()
    assert torch.equal(param, torch.ones(2, 2))
    optimizers[1].step()
    assert (param < 1).all()


@pytest.mark.parametrize("how", HOW)
def test_autograds_version_counter_sees_the_step(how: dict[str, Any]) -> None:
    param = Parameter(torch.ones(2, 2))
    optimizer = AdamPWD([param], p=0.8, lambda_p=0.1, **how)
    saved = (param * param).sum()  # its gradient needs the weight as it was
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("how", HOW)
def test_a_strength_of_0_in_a_tensor_holds_nothing(how: dict[str, Any]) -> None:
    param = Parameter(torch.tensor([[0.0, 1e-30, 1e-20, 1.0]]))
    optimizer = SGDPWD([param], lr=0.1, p=0.5, lambda_p=torch.tensor(0.0), **how)
    param.grad = torch.tensor([[-1.0, 0.0, 0.0, 0.0]])
    optimizer.step()
    torch.testing.assert_close(param, torch.tensor([[0.1, 1e-30, 1e-20, 1.0]]))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("p", [1 - 9e-16, 1 + 4e-16, 1 - 5e-9, 1 + 5e-9, 1 - 2e-7, 1 + 2e-7])
def test_p_all_but_1_is_1(p: float, how: dict[str, Any]) -> None:
    values = torch.linspace(-1, 1, 300).reshape(3, 100)
    results = []
    for exponent in (p, 1):
        param = Parameter(values.clone())
        optimizer = AdamPWD([param], lr=0.1, p=exponent, lambda_p=1.0, exact=True, **how)
        param.grad = values.flip(1)
        optimizer.step()
        results.append(param)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("how", HOW)
def test_a_parameter_with_its_sign_in_a_bit(how: dict[str, Any]) -> None:
    param = Parameter(torch._neg_view(torch.ones(3)))
    optimizer = SGDPWD([param], lr=0.1, p=2, lambda_p=0.1, **how)
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(param.detach().clone(), torch.full((3,), -1.1 / 1.01))


def test_another_default_device_changes_nothing() -> None:
    torch.set_default_device("meta")
    try:
        param = Parameter(torch.ones(3, 3, device="cpu"))
        optimizer = AdamPWD([param], lr=0.1, p=0.8, lambda_p=0.0)
        decayed = AdamPWD([param], lr=0.1, p=0.8, lambda_p=0.1, exact=True)
        param.grad = torch.ones(3, 3, device="cpu")
        optimizer.step()
        decayed.step()
    finally:
        torch.set_default_device(None)
    assert (param < 0.9).all()
    assert decayed.state[param]["step"] == 1


def test_a_huge_strength_is_no_error() -> None:
    for how in HOW:
        param = Parameter(torch.ones(3, 3))
        optimizer = AdamPWD([param], p=0.5, lambda_p=1e40, exact=True, **how)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert not param.any()
