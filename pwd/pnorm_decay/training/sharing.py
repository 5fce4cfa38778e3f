"""How many runs share a GPU: as many as fill its time, where its memory and the cores suffice.

A small network leaves a GPU idle while the host prepares its next operation. Runs of other
processes fill that time. They take turns on the GPU (no MPS is assumed), so that more runs than
fill it would only wait for each other.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from pnorm_decay.data import Dataset
from pnorm_decay.training.evaluation import evaluate
from pnorm_decay.training.settings import ConfigError, Settings
from pnorm_decay.training.trainer import Training, take_step

WARM_UP, MEASURED = 10, 20  # steps
CONTEXT = 2**30  # bytes that CUDA and its libraries take in each process, generously
USABLE = 0.9  # of the free memory
CYCLES = 2e9  # of a GPU in a second, about


@dataclass(frozen=True)
class Footprint:
    """What one run takes of a GPU.

    Attributes:
        memory: bytes, at its peak, with what CUDA takes in its process.
        free: bytes of the GPU that were free for it and for others.
        busy: the share of a step's time in which the GPU works, in (0, 1].
    """

    memory: int
    free: int
    busy: float


def runs_per_gpu(found: Footprint, cores: int) -> int:
    """How many such runs a GPU is given, at least 1.

    Args:
        found: what one takes.
        cores: CPU cores for the runs on one GPU; each run keeps one busy.
    """
    by_memory = int(USABLE * found.free / found.memory)
    return max(1, min(by_memory, round(1 / found.busy), cores))


def footprint(settings: Settings, data: Dataset, accelerator: Accelerator) -> Footprint:
    """Measures a run on its GPU by some steps and an evaluation, of which nothing is kept."""
    device = accelerator.device
    gc.collect()
    torch.cuda.empty_cache()  # of a run before it, in the same process
    free = torch.cuda.mem_get_info(device)[0] + CONTEXT  # this process has its own already
    torch.cuda.reset_peak_memory_stats(device)
    run = Training(settings, data, accelerator)
    run.model.train()
    for _ in range(WARM_UP):
        take_step(run)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(MEASURED):
        take_step(run)
    torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - start) / MEASURED

    # While the GPU sleeps, a whole step is queued; then it runs without waiting for the host.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES * (2 * seconds + 0.01)))
    begin.record()
    take_step(run)
    end.record()
    end.synchronize()
    busy = begin.elapsed_time(end) / 1000 / seconds

    evaluate(run.method.plain_model(), data, run.settings, accelerator)
    memory = torch.cuda.max_memory_reserved(device) + CONTEXT
    return Footprint(memory, free, max(0.01, min(1.0, busy)))


def how_many(n_jobs: object, per_gpu: object, gpus: int, cores: int) -> int | None:
    """How many runs of a sweep are done at once, as far as the settings say; None: measure.

    Args:
        n_jobs: the launcher's setting: a number, -1 for one a core, or None.
        per_gpu: the launcher's `runs_per_gpu`: a number or "auto".
        gpus: of this machine.
        cores: of this machine.

    Raises:
        ConfigError: a setting is none of these.
    """
    for name, value, other in (
        ("n_jobs", n_jobs, (None, -1)),
        ("runs_per_gpu", per_gpu, ("auto",)),
    ):
        if value not in other and (not isinstance(value, int) or value is True or value < 1):
            allowed = "null, -1" if None in other else "auto"
            raise ConfigError(
                f"hydra.launcher.{name}={value}: must be {allowed} or a whole number of at least 1"
            )
    if isinstance(n_jobs, int):
        return cores if n_jobs == -1 else n_jobs
    if not gpus:
        return cores
    return gpus * per_gpu if isinstance(per_gpu, int) else None
