"""DDP, FSDP2 and ZeroRedundancyOptimizer, in several processes against one process.

On a CPU they are two and talk by gloo; on GPUs there is one a GPU, up to two, and NCCL.
"""

import socket
from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass
class Place:
    """A process of a training: its device, and which of how many it is."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def mesh(self) -> dist.device_mesh.DeviceMesh:
        return dist.device_mesh.init_device_mesh(self.device.type, (self.size,))


ALONE = Place(torch.device("cpu"))


def network(place: Place = ALONE) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    return model.to(place.device)


def batches(place: Place) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(3, 8, 6, generator=generator, dtype=torch.float64)
    return list(whole.chunk(place.size, dim=1)[place.rank].to(place.device))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, place: Place = ALONE) -> None:
    for batch in batches(place):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, p=OPTIONS["p"], lambda_p=OPTIONS["lambda_p"])


def replicated_step(place: Place) -> torch.Tensor:
    """A step of a replicated weight whose gradient is still a sum over the processes."""
    mesh = place.mesh()
    ones = torch.ones(2, 3, device=place.device)
    weight = nn.Parameter(distribute_tensor(ones, mesh, [Replicate()]))
    weight.grad = DTensor.from_local(ones * (place.rank + 1.0), mesh, [Partial()])
    SGDPWD([weight], lr=0.1, p=2, lambda_p=0.0, weight_decay=0.1).step()
    return weight.to_local().detach()


def train_to_target(model: nn.Module, place: Place = ALONE) -> tuple[list[float], float]:
    """The lambda_p of every step, and the sparsity at the end."""
    optimizer = AdamPWD(groups(model), lr=OPTIONS["lr"])
    target = TargetSparsity(optimizer, 0.5, steps=90)
    strengths = []
    for _ in range(30):
        for batch in batches(place):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            target.step()
            strengths.append(float(optimizer.param_groups[0]["lambda_p"]))
    return strengths, sparsity(model)


def worker(rank: int, kind: str, size: int, port: int, folder: str) -> None:
    place = Place(torch.device(kind, rank) if kind == "cuda" else torch.device(kind), rank, size)
    if kind == "cuda":
        torch.cuda.set_device(place.device)
    backend = "nccl" if kind == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=size)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, options in (("ddp", {}), ("ddp_foreach", {"foreach": True})):
        model = DistributedDataParallel(network(place))
        train(model, AdamPWD(groups(model), lr=OPTIONS["lr"], **options), place)
        results[name] = on_cpu(model.parameters())

    model = DistributedDataParallel(network(place))
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamPWD, **OPTIONS)
    train(model, zero, place)
    results["zero"] = on_cpu(model.parameters())

    for name, options in (
        ("fsdp2", {}),
        ("fsdp2_foreach", {"foreach": True}),
        ("fsdp2_reference", {"foreach": False}),
        ("fsdp2_slow_s", {"auxiliary_beta": 0.5}),
    ):
        model = network(place)
        fully_shard(model, mesh=place.mesh())
        optimizer = AdamPWD(groups(model), lr=OPTIONS["lr"], **options)
        train(model, optimizer, place)
        results[name] = on_cpu(param.full_tensor() for param in model.parameters())
        results[f"{name}_sparsity"] = sparsity(model, threshold=0.1)
        with zeroed(model, threshold=0.1):
            results[f"{name}_zeroed"] = zero_fraction(model)
    results["replicated"] = replicated_step(place).cpu()
    model = network(place)
    fully_shard(model, mesh=place.mesh())
    results["fsdp2_target"] = train_to_target(model, place)
    model = DistributedDataParallel(network(place))
    results["ddp_target"] = train_to_target(model, place)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_cpu(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    size = 2 if request.param == "cpu" else min(2, torch.cuda.device_count())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(request.param, size, port, str(folder)), nprocs=size)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


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
def test_several_processes_train_as_one(
    results: list[dict[str, Any]], name: str, options: dict[str, Any]
) -> None:
    model = network()
    train(model, AdamPWD(groups(model), lr=OPTIONS["lr"], **options))
    for result in results:
        for ours, alone in zip(result[name], model.parameters(), strict=True):
            torch.testing.assert_close(ours, alone)
        if name.startswith("fsdp2"):
            assert 0 < result[f"{name}_sparsity"] == sparsity(model, threshold=0.1)
            assert result[f"{name}_zeroed"] == result[f"{name}_sparsity"]


def test_a_sharded_state_trains_as_one(results: list[dict[str, Any]]) -> None:
    model = network()
    train(model, AdamPWD(model.parameters(), **OPTIONS))
    for result in results:
        for ours, alone in zip(result["zero"], model.parameters(), strict=True):
            torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize("name", ["ddp_target", "fsdp2_target"])
def test_a_target_is_steered_alike_in_all_processes(
    results: list[dict[str, Any]], name: str
) -> None:
    strengths, reached = train_to_target(network())
    for result in results:
        assert result[name][0] == results[0][name][0]
        assert result[name][0][:20] == pytest.approx(strengths[:20], rel=1e-6)
        assert result[name][1] == pytest.approx(reached, abs=0.02)
    assert reached == pytest.approx(0.5, abs=0.1)  # of 128 weights, in 90 steps


def test_a_gradient_of_another_placement_is_added_up(results: list[dict[str, Any]]) -> None:
    for result in results:
        expected = (1 - 0.1 * sum(range(1, len(results) + 1))) / 1.01
        torch.testing.assert_close(result["replicated"], torch.full((2, 3), expected))
