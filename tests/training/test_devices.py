from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from pnorm_decay.training import devices

FORK = multiprocessing.get_context("fork")
GPUS = ["GPU-a", "GPU-b"]


def claim_and_stay(folder: Path, told: Connection) -> None:
    told.send(devices.claim(GPUS, folder))
    told.recv()


def start(folder: Path) -> tuple[int, multiprocessing.process.BaseProcess, Connection]:
    """A process that has a GPU: which, the process, and what keeps it."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=claim_and_stay, args=(folder, there), daemon=True)
    process.start()
    return here.recv(), process, here


def test_each_process_has_the_gpu_that_fewest_others_have(tmp_path):
    held = [start(tmp_path) for _ in range(3)]
    assert [number for number, *_ in held] == [0, 1, 0]
    second = held[1][1]
    second.kill()  # a lock goes with its process, whatever ended it
    second.join()
    assert [start(tmp_path)[0] for _ in range(2)] == [1, 1]
    for _, process, _ in held:
        process.kill()


def test_a_cpu_and_a_gpu_of_torchrun_stay(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 3)
    assert devices.own_gpu(cpu) == cpu
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.own_gpu(gpu) == gpu
