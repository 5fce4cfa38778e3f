"""W&B's page for the experiments' runs: a saved workspace, made by code."""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.reports.v2 import Config, LinePlot, ParallelCoordinatesPlot, ScatterPlot
from wandb_workspaces.reports.v2 import ParallelCoordinatesPlotColumn as Column
from wandb_workspaces.reports.v2 import SummaryMetric as Summary

from pnorm_decay.training.tracking import CURVES, LAYER_PREFIX

NAME = "Accuracy and sparsity"
MOST_RUNS = 500  # in one panel; a demo sweep has about 100

# What the workspace shows; a test holds them to what a run logs.
SETTINGS = ("method", "p", "lambda_p", "lr", "target_sparsity", "seed", "experiment", "scale")
RESULTS = ("val_accuracy", "best_val_accuracy", "sparsity", "seconds", "status")


def build(entity: str, project: str) -> workspaces.Workspace:
    """The workspace, not saved yet.

    Its panels are the frontier, parallel coordinates, learning curves by method and by setting,
    and the sparsity of the layers.

    Args:
        entity: a W&B user or team.
        project: its project.
    """
    columns = [*(f"config:{name}" for name in SETTINGS), *(f"summary:{name}" for name in RESULTS)]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            _section("Accuracy and sparsity", [_frontier(), _coordinates()]),
            _section("Learning curves, averaged over the runs of a method", _by(Config("method"))),
            _section("Learning curves, averaged over the seeds of a setting", _by("Group")),
            _section("Sparsity of the layers", [_layers()]),
        ],
        settings=workspaces.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=workspaces.RunsetSettings(pinned_columns=columns),
    )


def as_json(workspace: workspaces.Workspace) -> str:
    """The workspace as a W&B server is given it."""
    return workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)


def _section(name: str, shown: list[Any]) -> workspaces.Section:
    layout = workspaces.SectionLayoutSettings(columns=2, rows=2)
    return workspaces.Section(name=name, panels=shown, is_open=True, layout_settings=layout)


def _frontier() -> ScatterPlot:
    return ScatterPlot(
        title="Validation accuracy (%) over sparsity",
        x=Summary("sparsity"),
        y=Summary("val_accuracy"),
        layout=panels.Layout(w=12, h=10),
    )


def _coordinates() -> ParallelCoordinatesPlot:
    return ParallelCoordinatesPlot(
        title="Settings, sparsity and validation accuracy (%)",
        columns=[
            Column(Config("p"), display_name="p"),
            Column(Config("lambda_p"), display_name="lambda_p", log=True),
            Column(Config("lr"), display_name="learning rate", log=True),
            Column(Summary("sparsity"), display_name="sparsity"),
            Column(Summary("val_accuracy"), display_name="accuracy"),
        ],
        layout=panels.Layout(w=12, h=10),
    )


def _by(group: Config | str) -> list[LinePlot]:
    """Learning curves: of each group of runs the mean, and an area from minimum to maximum."""
    titles = {
        "val_accuracy": "Validation accuracy (%)",
        "sparsity": "Sparsity",
        "train_loss": "Training loss (nats)",
        "val_loss": "Validation loss (nats)",
    }
    return [
        LinePlot(
            title=title,
            x="Step",
            y=[CURVES[name]],
            groupby=group,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=MOST_RUNS,
        )
        for name, title in titles.items()
    ]


def _layers() -> LinePlot:
    """The sparsity of every layer, whatever the layers of the model are called."""
    return LinePlot(
        title="Sparsity of every layer of the runs selected",
        x="Step",
        metric_regex=f"^{LAYER_PREFIX}.*",
        range_y=(0, 1),
        layout=panels.Layout(w=24, h=12),
    )
