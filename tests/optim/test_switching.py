"""State of torch's Adam, AdamW and SGD loaded into ours and back; pickling and copying."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optim.pwd_oracle import make_parameters, set_gradients
from pnorm_decay import SGDPWD, AdamPWD

HOW: list[dict[str, Any]] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], start: int = 0) -> None:
    for step in range(start, start + 5):
        set_gradients(params, step)
        optimizer.step()


def copied(params: list[Parameter]) -> list[Parameter]:
    twins = make_parameters(params[0].dtype)  # in the same layouts
    with torch.no_grad():
        torch._foreach_copy_(twins, params)
    return twins


def adam_moments(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> list[Any]:
    names = ("step", "exp_avg", "exp_avg_sq")
    return [optimizer.state[param][name] for param in params for name in names]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_from_adam_and_on(theirs: Any, amsgrad: bool, how: dict[str, Any]) -> None:
    params = make_parameters(torch.float64)
    old = theirs(params, lr=0.05, weight_decay=0.3, amsgrad=amsgrad, **how)
    train(old, params)

    ours = copied(params)
    groups = [
        {"params": ours[:1], "lambda_p": 0.0},
        {"params": ours[1:], "p": 0.5, "lambda_p": 0.25},
    ]
    new = AdamPWD(groups, p=0.8, lambda_p=0.1, weight_decay=0.01, reweight_every=2)
    old.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    state = old.state_dict()
    state["param_groups"] = [
        {**state["param_groups"][0], "params": [0]},
        {**state["param_groups"][0], "params": list(range(1, len(ours)))},
    ]
    new.load_state_dict(state)

    first, second = new.param_groups
    assert (first["p"], first["lambda_p"]) == (0.8, 0.0)
    assert (second["p"], second["lambda_p"]) == (0.5, 0.25)
    for group in new.param_groups:
        assert (group["lr"], group["amsgrad"]) == (0.05, amsgrad)  # as torch: loaded
        assert (group["weight_decay"], group["reweight_every"]) == (0.01, 2)  # as given here
    for saved, loaded in zip(adam_moments(old, params), adam_moments(new, ours), strict=True):
        torch.testing.assert_close(saved, loaded, rtol=0, atol=0)
    train(new, ours, start=5)
    assert all(new.state[param]["step"] == 10 for param in ours)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.AdamW])
def test_back_to_adam(theirs: Any, how: dict[str, Any]) -> None:
    params = make_parameters(torch.float64)
    old = AdamPWD(params, lr=0.05, p=0.5, lambda_p=0.1, auxiliary_beta=0.5, **how)
    train(old, params)
    ours, reference = copied(params), copied(params)
    new = theirs(ours, lr=1.0)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    train(new, ours, start=5)

    # The same as Adam that had these moments all along.
    check = torch.optim.Adam(reference, lr=0.05, **how)
    for param, twin in zip(params, reference, strict=True):
        state = old.state[param]
        check.state[twin] = {
            name: state[name].clone() for name in ("step", "exp_avg", "exp_avg_sq")
        }
    train(check, reference, start=5)
    for param, twin in zip(ours, reference, strict=True):
        torch.testing.assert_close(param, twin)


def test_from_sgd_and_back() -> None:
    params = make_parameters(torch.float64)
    old = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    train(old, params)
    ours = copied(params)
    new = SGDPWD(ours, lr=1.0, p=0.5, lambda_p=0.1)
    new.load_state_dict(old.state_dict())
    for param, twin in zip(params, ours, strict=True):
        saved, loaded = (o.state[x]["momentum_buffer"] for o, x in ((old, param), (new, twin)))
        assert torch.equal(saved, loaded)
    train(new, ours, start=5)
    old.load_state_dict(new.state_dict())
    train(old, params, start=10)


OPTIONS = [{}, {"amsgrad": True, "auxiliary_beta": 0.9}, {"reweight_every": 4}]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_resumed_run_is_the_uninterrupted_one(
    options: dict[str, Any], how: dict[str, Any]
) -> None:
    params = make_parameters()
    optimizer = AdamPWD(params, p=0.7, lambda_p=0.1, **options, **how)
    train(optimizer, params)
    resumed = copied(params)
    other = AdamPWD(resumed, lr=1.0, p=2, lambda_p=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, start=5)
    train(other, resumed, start=5)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_optimizer_goes_on(clone: Any) -> None:
    for cls in (AdamPWD, SGDPWD):
        params = make_parameters()
        optimizer = cls(params, p=0.7, lambda_p=0.1)
        train(optimizer, params)
        other = clone(optimizer)
        twins = other.param_groups[0]["params"]
        train(optimizer, params, start=5)
        train(other, twins, start=5)
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin)  # a copy may have another layout


def test_state_on_another_number_of_groups_is_torchs_error() -> None:
    optimizer = AdamPWD(make_parameters(), p=0.7, lambda_p=0.1)
    state = optimizer.state_dict()
    state["param_groups"] *= 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("how", HOW)
def test_a_checkpoint_of_an_old_torch_counts_steps_in_numbers(how: dict[str, Any]) -> None:
    params = make_parameters()
    old = torch.optim.Adam(params)
    train(old, params)
    state = copy.deepcopy(old.state_dict())
    for own in state["state"].values():
        own["step"] = int(own["step"])
    new = AdamPWD(params, p=0.7, lambda_p=0.1, **how)
    new.load_state_dict(state)
    train(new, params, start=5)
    assert all(new.state[param]["step"] == 10 for param in params)


def test_an_optimizer_that_an_older_version_pickled_goes_on() -> None:
    params = make_parameters()
    optimizer = AdamPWD(params, p=0.7, lambda_p=0.1)
    train(optimizer, params)
    for options in (optimizer.defaults, optimizer.param_groups[0]):
        del options["hold_zeros"], options["exact"]
    other = pickle.loads(pickle.dumps(optimizer))
    train(other, other.param_groups[0]["params"], start=5)
    assert other.param_groups[0]["hold_zeros"] is False


def test_a_checkpoint_of_other_groups_is_torchs_error() -> None:
    model = torch.nn.Linear(3, 4)
    old = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    new = AdamPWD([{"params": [model.bias]}, {"params": [model.weight]}], p=0.8, lambda_p=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        new.load_state_dict(old.state_dict())
