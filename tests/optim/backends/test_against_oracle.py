"""Every implementation, option and dtype against the float64 NumPy oracle."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from optim.pwd_oracle import Array, Oracle, array, gradients, make_parameters, set_gradients
from pnorm_decay import SGDPWD, AdamPWD

IMPLEMENTATIONS = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ADAM = {
    "plain": {},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True},
    "elastic_net": {"weight_decay": 0.7, "betas": (0.8, 0.95), "eps": 1e-6},
    "reweight": {"reweight_every": 7},
    "s_dynamics": {"auxiliary_beta": 0.9, "weight_decay": 0.2},
    "both": {"auxiliary_beta": 0.5, "reweight_every": 3},
    "hold": {"hold_zeros": True},
    "exact": {"exact": True, "weight_decay": 0.4},
    "exact_hold": {"exact": True, "hold_zeros": True, "amsgrad": True},
}
SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.5},
    "nesterov": {"momentum": 0.8, "nesterov": True, "maximize": True},
    "both": {"momentum": 0.5, "auxiliary_beta": 0.5, "reweight_every": 3},
    "exact": {"momentum": 0.9, "exact": True, "hold_zeros": True},
}
CASES = [("adam", name) for name in ADAM] + [("sgd", name) for name in SGD]
STEPS = 25
EXPONENTS = [0.1, 0.5, 0.8, 1, 1.5, 1.99, 2, 3]


def options_of(rule: str, name: str, p: float) -> dict[str, Any]:
    if name.startswith("exact") and p > 2:
        pytest.skip("the exact step has p up to 2")
    return {"lr": 0.02, "p": p, "lambda_p": 0.3, **(ADAM if rule == "adam" else SGD)[name]}


def optimizer_of(rule: str, params: list[Any], options: dict[str, Any], how: str) -> Any:
    return (AdamPWD if rule == "adam" else SGDPWD)(params, **options, **IMPLEMENTATIONS[how])


@cache
def gradients_of(step: int) -> list[torch.Tensor]:
    return gradients(make_parameters(torch.float64), step)


def expected_weights(rule: str, options: dict[str, Any]) -> list[Array]:
    """What the oracle makes of the parameters, all as one vector: no weight knows another."""
    params = make_parameters(torch.float64)
    oracle = Oracle(as_vector(params), rule, options)
    for step in range(STEPS):
        oracle.step(as_vector(gradients_of(step)))
    ends = np.cumsum([param.numel() for param in params])[:-1]
    parts = zip(np.split(oracle.w, ends), params, strict=True)
    return [part.reshape(param.shape) for part, param in parts]


def as_vector(tensors: list[Any]) -> Array:
    return np.concatenate([array(tensor).ravel() for tensor in tensors])


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize(("rule", "name"), CASES)
def test_many_steps_in_double_precision(rule: str, name: str, p: float) -> None:
    options = options_of(rule, name, p)
    expected = expected_weights(rule, options)
    for how in IMPLEMENTATIONS:
        params = make_parameters(torch.float64)
        optimizer = optimizer_of(rule, params, options, how)
        for step in range(STEPS):
            for param, grad in zip(params, gradients_of(step), strict=True):
                param.grad = grad.clone()
            optimizer.step()
        for theirs, param in zip(expected, params, strict=True):
            # Rounding grows where a weight passes close by 0, whence so far from 1e-16.
            np.testing.assert_allclose(array(param), theirs, rtol=1e-4, atol=1e-7, err_msg=how)
            assert not param.numel() or np.abs(array(param) - theirs).mean() < 1e-10, how


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.5, 0.8, 1, 1.5, 2, 3])
@pytest.mark.parametrize(("rule", "name"), CASES)
def test_each_step_from_the_same_state(
    rule: str, name: str, p: float, dtype: torch.dtype, how: str
) -> None:
    """To the dtype's rounding, whatever earlier rounding has made of the state."""
    params = make_parameters(dtype)
    options = options_of(rule, name, p)
    optimizer = optimizer_of(rule, params, options, how)
    eps = torch.finfo(dtype).eps
    for step in range(4):
        set_gradients(params, step)
        oracles = []
        for param in params:
            state = optimizer.state[param]
            stored = {
                ours: array(state[theirs])
                for ours, theirs in (
                    ("m", "exp_avg" if rule == "adam" else "momentum_buffer"),
                    ("v", "exp_avg_sq"),
                    ("largest", "max_exp_avg_sq"),
                    ("q", "auxiliary"),
                )
                if theirs in state
            }
            oracle = Oracle(array(param), rule, options, steps=step, **stored)
            assert param.grad is not None
            oracle.step(array(param.grad))
            oracles.append(oracle)
        optimizer.step()
        for oracle, param in zip(oracles, params, strict=True):
            # The logarithm of a factor is at most about 100, so that float32 knows a factor to
            # about 100 eps; then there is storage, and that of q, which fp16 rounds by up to 3e-8.
            has_q = "auxiliary" in optimizer.state[param]
            relative = 150 * torch.finfo(torch.float32).eps + eps * (2 if has_q else 1)
            smallest = 1e-7 if dtype == torch.float16 else torch.finfo(dtype).tiny
            allowed = relative * oracle.moved * oracle.shrunk + smallest
            if has_q and dtype == torch.float16:
                allowed += 1e-5 * oracle.moved
            worst = (np.abs(array(param) - oracle.w) - allowed)[~oracle.undecided]
            assert worst.size == 0 or worst.max() <= 0


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_a_different_p_and_strength_in_each_group(how: str) -> None:
    settings = [(0.5, 0.1), (1.3, 0.2), (2, 0.3)]
    params = [torch.nn.Parameter(torch.full((3, 4), 0.5, dtype=torch.float64)) for _ in settings]
    groups = [
        {"params": [param], "p": p, "lambda_p": strength}
        for param, (p, strength) in zip(params, settings, strict=True)
    ]
    optimizer = AdamPWD(groups, lr=0.1, **IMPLEMENTATIONS[how])
    set_gradients(params, 0)
    for param, (p, strength) in zip(params, settings, strict=True):
        oracle = Oracle(array(param), "adam", {"lr": 0.1, "p": p, "lambda_p": strength})
        assert param.grad is not None
        oracle.step(array(param.grad))
        param.expected = oracle.w  # type: ignore[attr-defined]
    optimizer.step()
    for param in params:
        np.testing.assert_allclose(array(param), param.expected)  # type: ignore[attr-defined]
