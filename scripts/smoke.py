"""A dozen steps of what the installed package has for its users; torch is all that it needs.

    python scripts/smoke.py
    python scripts/smoke.py --deploy

`make test-wheel` runs it in new environments. With --deploy it writes and reads a sparse file, too,
which needs the extra `deploy`.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pnorm_decay
from pnorm_decay import SGDPWD, AdamPWD, attach_pnorm_decay, param_groups, sparsity
from pnorm_decay.baselines import OTO, CoupledAdam, MagnitudePruning, ProximalAdam
from pnorm_decay.deploy import compact, sparse_inference
from pnorm_decay.optim import TargetSparsity

STEPS = 12
OF_EXPERIMENTS = ("hydra", "matplotlib", "omegaconf", "pandas", "pydantic", "safetensors")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    )


def inputs() -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any, steps: int) -> Tensor:
    """Trains on noise; the last loss."""
    targets = torch.arange(16) % 4
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(inputs()), targets)
        optimizer.zero_grad()
        loss.backward()
        for other in others:
            if not isinstance(other, TargetSparsity):
                other.before_step(step)
        optimizer.step()
        for other in others:
            other.step() if isinstance(other, TargetSparsity) else other.after_step(step)
    return loss.detach()


def weights(**options: Any) -> Tensor:
    """What AdamPWD makes of the network."""
    model = network()
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=0.05), lr=1e-2, **options)
    assert train(model, optimizer, steps=STEPS).isfinite()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def try_optimizers() -> None:
    for exact in (False, True):
        reference = weights(exact=exact, fused=False, foreach=False)
        for options in ({"fused": True}, {"foreach": True}, {}):
            ours = weights(exact=exact, **options)
            torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)
    model = network()
    optimizer: torch.optim.Optimizer = SGDPWD(param_groups(model, p=1, lambda_p=1e-3), lr=0.1)
    assert train(model, optimizer, steps=2).isfinite()
    model = network()
    optimizer = torch.optim.NAdam(param_groups(model, p=0.8, lambda_p=0.01), lr=1e-2)
    attach_pnorm_decay(optimizer, p=0.8, lambda_p=0.01)
    assert train(model, optimizer, steps=2).isfinite()


def try_baselines() -> None:
    for kind in (CoupledAdam, ProximalAdam):
        model = network()
        groups = param_groups(model, p=1, lambda_p=0.01)
        assert train(model, kind(groups, lr=1e-2, p=1, lambda_p=0.01), steps=2) > 0
    for method in (MagnitudePruning(0.5), OTO(0.5)):
        model = network()
        method.setup(model, inputs(), steps=STEPS, warmup=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        assert train(model, optimizer, method, steps=STEPS) > 0
        assert sparsity(model) > 0.2


def try_deployment(with_files: bool) -> None:
    model = network()
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
    target = TargetSparsity(optimizer, 0.9, steps=300)
    train(model, optimizer, target, steps=300)
    assert abs(sparsity(model) - 0.9) < 0.01, sparsity(model)
    model.eval()
    small = compact(model, inputs())
    fast = sparse_inference(small, inputs())
    with torch.no_grad():
        for other in (small, fast):
            torch.testing.assert_close(other(inputs()), model(inputs()), rtol=1e-3, atol=1e-4)
    if with_files:
        from pnorm_decay.deploy import load_sparse, save_sparse

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_sparse(model, path)
            loaded = load_sparse(path, into=network())
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded[name], tensor), name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deploy", action="store_true", help="sparse files, too")
    parser.add_argument("--alone", action="store_true", help="fail where more than torch is there")
    arguments = parser.parse_args()
    there = [name for name in OF_EXPERIMENTS if importlib.util.find_spec(name)]
    if arguments.alone and there:
        sys.exit(f"error: the environment has {', '.join(there)}")
    try_optimizers()
    try_baselines()
    try_deployment(arguments.deploy)
    where = f"Python {platform.python_version()}, torch {torch.__version__}"
    sys.stdout.write(f"pnorm-decay {pnorm_decay.__version__} works with {where}\n")


if __name__ == "__main__":
    main()
