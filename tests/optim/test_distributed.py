"""DDP, FSDP2 and ZeroRedundancyOptimizer, in two gloo processes against one process."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pnorm_decay import SGDPWD, AdamPWD, param_groups, sparsity
from pnorm_decay.optim import TargetSparsity
from pnorm_decay.sparsity import zero_fraction, zeroed

OPTIONS = {"lr": 0.05, "p": 0.8, "lambda_p": 0.05}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(3, 8, 6, generator=generator, dtype=torch.float64)
    return list(whole[:, rank * 4 : (rank + 1) * 4] if rank >= 0 else whole)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    for batch in batches(rank):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, p=OPTIONS["p"], lambda_p=OPTIONS["lambda_p"])


def replicated_step(rank: int) -> torch.Tensor:
    """A step of a replicated weight whose gradient is still a sum over the processes."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight = nn.Parameter(distribute_tensor(torch.ones(2, 3), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(torch.full((2, 3), rank + 1.0), mesh, [Partial()])
    SGDPWD([weight], lr=0.1, p=2, lambda_p=0.0, weight_decay=0.1).step()
    return weight.to_local().detach()


def train_to_target(model: nn.Module, rank: int) -> tuple[list[float], float]:
    """The lambda_p of every step, and the sparsity at the end."""
    optimizer = AdamPWD(groups(model), lr=OPTIONS["lr"])
    target = TargetSparsity(optimizer, 0.5, steps=90)
    strengths = []
    for _ in range(30):
        for batch in batches(rank):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            target.step()
            strengths.append(float(optimizer.param_groups[0]["lambda_p"]))
    return strengths, sparsity(model)


def worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name, options in (("ddp", {}), ("ddp_foreach", {"foreach": True})):
        model = DistributedDataParallel(network())
        train(model, AdamPWD(groups(model), lr=OPTIONS["lr"], **options), rank)
        results[name] = list(model.parameters())

    model = DistributedDataParallel(network())
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamPWD, **OPTIONS)
    train(model, zero, rank)
    results["zero"] = list(model.parameters())

    for name, options in (
        ("fsdp2", {}),
        ("fsdp2_foreach", {"foreach": True}),
        ("fsdp2_reference", {"foreach": False}),
        ("fsdp2_slow_s", {"auxiliary_beta": 0.5}),
    ):
        model = network()
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        optimizer = AdamPWD(groups(model), lr=OPTIONS["lr"], **options)
        train(model, optimizer, rank)
        results[name] = [param.full_tensor() for param in model.parameters()]
        results[f"{name}_sparsity"] = sparsity(model, threshold=0.1)
        with zeroed(model, threshold=0.1):
            results[f"{name}_zeroed"] = zero_fraction(model)
    results["replicated"] = replicated_step(rank)
    model = network()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    results["fsdp2_target"] = train_to_target(model, rank)
    model = DistributedDataParallel(network())
    results["ddp_target"] = train_to_target(model, rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddp", {}),
        ("ddp_foreach", {}),
        ("fsdp2", {}),
        ("fsdp2_foreach", {}),
        ("fsdp2_reference", {}),
        ("fsdp2_slow_s", {"auxiliary_beta": 0.5}),
    ],
)
def test_two_processes_train_as_one(
    results: list[dict[str, Any]], name: str, options: dict[str, Any]
) -> None:
    model = network()
    train(model, AdamPWD(groups(model), lr=OPTIONS["lr"], **options), rank=-1)
    for result in results:
        for ours, alone in zip(result[name], model.parameters(), strict=True):
            torch.testing.assert_close(ours, alone)
        if name.startswith("fsdp2"):
            assert 0 < result[f"{name}_sparsity"] == sparsity(model, threshold=0.1)
            assert result[f"{name}_zeroed"] == result[f"{name}_sparsity"]


def test_a_sharded_state_trains_as_one(results: list[dict[str, Any]]) -> None:
    model = network()
    train(model, AdamPWD(model.parameters(), **OPTIONS), rank=-1)
    for result in results:
        for ours, alone in zip(result["zero"], model.parameters(), strict=True):
            torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize("name", ["ddp_target", "fsdp2_target"])
def test_a_target_is_steered_alike_in_all_processes(
    results: list[dict[str, Any]], name: str
) -> None:
    strengths, reached = train_to_target(network(), rank=-1)
    for result in results:
        assert result[name][0] == results[0][name][0]
        assert result[name][0][:20] == pytest.approx(strengths[:20], rel=1e-6)
        assert result[name][1] == pytest.approx(reached, abs=0.02)
    assert reached == pytest.approx(0.5, abs=0.1)  # of 128 weights, in 90 steps


def test_a_gradient_of_another_placement_is_added_up(results: list[dict[str, Any]]) -> None:
    for result in results:
        torch.testing.assert_close(result["replicated"], torch.full((2, 3), 0.7 / 1.01))
