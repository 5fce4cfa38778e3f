"""A sweep over a list of runs instead of a grid; Hydra looks for sweepers in this folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser


class ListSweeper(BasicSweeper):
    """Does the runs of a list, in its order.

    Args:
        runs: each a line of overrides, such as "optimizer=adamw seed=1". What the command line
            overrides, it overrides in all of them; a grid there is done for each.
    """

    def __init__(self, runs: Sequence[str]) -> None:
        super().__init__(max_batch_size=None)
        self.runs = runs

    def sweep(self, arguments: list[str]) -> Any:
        """Called by Hydra."""
        assert self.launcher is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: list[list[str]] = []
        for run in self.runs:
            overrides = parser.parse_overrides([*run.split(), *arguments])
            jobs += self.split_arguments(overrides, None)[0]
        self.validate_batch_is_legal(jobs)
        results = self.launcher.launch(jobs, initial_job_idx=0)
        for result in results:
            _ = result.return_value  # raises where the run failed
        return [results]
