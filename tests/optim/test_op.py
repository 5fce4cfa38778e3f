"""A step inside torch.compile: one graph, which no change of an option compiles again."""

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pnorm_decay import SGDPWD, AdamPWD, param_groups
from pnorm_decay.optim import op

pytestmark = pytest.mark.skipif(
    not op.IS_COMPILED, reason="this torch breaks the graph at the step, which is then eager"
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize("make", [AdamPWD, lambda groups: SGDPWD(groups, lr=0.1, momentum=0.9)])
def test_the_step_is_one_graph_whatever_the_options_become(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    compiled, eager = nn.Linear(4, 3), nn.Linear(4, 3)
    eager.load_state_dict(compiled.state_dict())
    optimizers = [make(param_groups(m, p=0.8, lambda_p=0.01)) for m in (compiled, eager)]
    steps = [torch.compile(optimizers[0].step, fullgraph=True, backend="eager"), optimizers[1].step]
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="pnorm_decay"):
        warnings.simplefilter("error")
        for number in range(5):
            for model, optimizer, step in zip((compiled, eager), optimizers, steps, strict=True):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 0.1 * number)
                optimizer.param_groups[0].update(p=0.5 + 0.1 * number, lambda_p=0.01 * number)
                optimizer.param_groups[1]["lr"] = 0.1 * number
                step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_training_step_is_compiled_around_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    results = []
    for network, wrap in ((model, torch.compile), (twin, lambda function, **_: function)):
        optimizer = AdamPWD(param_groups(network, p=0.8, lambda_p=0.1), lr=0.1)

        def train(inputs: torch.Tensor, network: Any = network, optimizer: Any = optimizer) -> None:
            network(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = wrap(train, backend="eager")
        for _ in range(3):
            step(torch.ones(2, 4))
        results.append(list(network.parameters()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_copied_optimizer_compiles_its_own_step() -> None:
    model = nn.Linear(4, 3)
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=0.1))
    other = copy.deepcopy(optimizer)
    params = other.param_groups[0]["params"] + other.param_groups[1]["params"]
    for param in params:
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in params]
    torch.compile(other.step, fullgraph=True, backend="eager")()
    assert all(not torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not optimizer.state


@torch.no_grad()
def read_before(params: list[nn.Parameter], optimizer: Any) -> torch.Tensor:
    before = [param * 3.0 for param in params]
    optimizer.step()
    changes = [(p - b).abs().sum() for p, b in zip(params, before, strict=True)]
    return torch.stack(changes).sum()


def scaled_gradient(params: list[nn.Parameter], optimizer: Any) -> None:
    for param in params:
        param.grad = param.grad * 0.1
    optimizer.step()


def halved_first(params: list[nn.Parameter], optimizer: Any) -> None:
    with torch.no_grad():
        for param in params:
            param.mul_(0.5)
    optimizer.step()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("function", [read_before, scaled_gradient, halved_first])
def test_it_is_right_whatever_the_compiler_makes_of_what_is_around_it(
    function: Any, backend: str
) -> None:
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend=backend)):
        torch.compiler.reset()
        params = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)) for _ in range(2)]
        optimizer = SGDPWD(params, lr=0.1, p=0.8, lambda_p=0.1, momentum=0.9)
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        step = wrap(function)
        returned = [step(params, optimizer) for _ in range(2)]
        results.append((returned, params))
    (expected, weights), (actual, compiled) = results
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(compiled, weights)
