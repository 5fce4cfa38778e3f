"""The examples in docstrings run, and the method does what it is for."""

import doctest
import importlib
import pkgutil
import warnings

import pytest
import torch
from torch import nn

import pnorm_decay
from pnorm_decay import optim, sparsity


@pytest.mark.parametrize(
    "name",
    [
        "pnorm_decay.decay",
        "pnorm_decay.sparsity",
        *(f"pnorm_decay.optim.{module.name}" for module in pkgutil.iter_modules(optim.__path__)),
    ],
)
def test_the_examples_in_docstrings_are_right(name: str) -> None:
    module = importlib.import_module(name)
    public = {name: getattr(pnorm_decay, name) for name in pnorm_decay.__all__}
    globals_ = {"torch": torch, **public, **vars(module)}
    assert doctest.testmod(module, extraglobs=globals_).failed == 0


def test_a_network_becomes_sparse_at_no_loss() -> None:
    """What it is for, in one place: most weights exactly 0, and the task still solved."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 20)
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    groups = pnorm_decay.param_groups(model, p=0.8, lambda_p=0.3)
    optimizer = pnorm_decay.AdamPWD(groups, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(600):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert sparsity(model, threshold=1e-30) > 0.8
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.95
