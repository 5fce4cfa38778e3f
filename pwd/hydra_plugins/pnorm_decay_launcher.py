"""Hydra's way to ``pnorm_decay.training.launcher``: it looks for launchers in this folder alone."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class BesideLauncher(Launcher):
    """Does the runs of a sweep beside each other, in processes of their own.

    Args:
        n_jobs: how many at a time; -1: one a core; None: `runs_per_gpu` on each GPU or, without
            one, one a core.
        runs_per_gpu: how many share a GPU, or "auto": a short measurement tells.
    """

    def __init__(self, n_jobs: int | None = None, runs_per_gpu: int | str = "auto") -> None:
        self.n_jobs = n_jobs
        self.runs_per_gpu = runs_per_gpu

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Called by Hydra, which imports this module for single runs too."""
        from pnorm_decay.training.launcher import Sweep, launch

        total = initial_job_idx + len(job_overrides)
        sweep = Sweep(self.hydra_context, self.task_function, self.config, total)
        return launch(sweep, job_overrides, initial_job_idx, self.n_jobs, self.runs_per_gpu)
