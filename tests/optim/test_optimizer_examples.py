"""The README's examples of AdamPWD, and those in docstrings, run."""

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pnorm_decay
from pnorm_decay import optim, sparsity

README = Path(__file__).resolve().parents[2] / "README.md"
OTHERS = ("lightning", "transformers")  # too heavy for the test environment


def examples() -> list[str]:
    """The README's Python blocks that use AdamPWD or the decay of another optimizer."""
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [block for block in blocks if re.search("AdamPWD|attach_pnorm_decay", block)]


@pytest.mark.parametrize("number", range(len(examples())))
def test_an_example_of_the_readme_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = examples()[number]
    monkeypatch.chdir(tmp_path)  # for what the trainers write
    for package in OTHERS:
        if package in code:
            pytest.importorskip(package)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inputs = torch.randn(64, 4)
    dataset = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    names = {
        "model": model,
        "loader": DataLoader(dataset, batch_size=16),
        "dataset": dataset,
        "loss_fn": nn.CrossEntropyLoss(),
        "torch": torch,
        "epochs": 2,
    }
    exec(compile(code, f"README.md, example {number}", "exec"), names)
    after = list(model.parameters())
    changed = any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert changed == bool(re.search(r"\.(step|train)\(\)|\.fit\(", code))


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
