"""Where the zeros of one run are, and how its weights got there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pnorm_decay.figures.loading import Experiment
from pnorm_decay.figures.style import WIDTH, finish, styled
from pnorm_decay.records import RecordError


def read(path: Path) -> pd.DataFrame:
    """Reads what ``scripts/collect.py`` kept of a run's ``weights.csv``.

    Raises:
        RecordError: the file cannot be read or is not of that kind.
    """
    try:
        weights = pd.read_csv(path)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise RecordError(f"cannot read {path}: {error}") from None
    if weights.empty or not {"run_id", "step"} <= set(weights.columns):
        raise RecordError(f"{path} lacks the column run_id or step, or holds no rows")
    return weights


@styled
def weights_figure(experiment: Experiment, weights: pd.DataFrame) -> Figure:
    """Draws the sparsity of every layer and the histogram of log10|w| during one run.

    Args:
        experiment: the experiment of the run.
        weights: what ``read`` gave.

    Raises:
        RecordError: the run is not among the experiment's.
    """
    run_id = weights["run_id"].iloc[0]
    rows = experiment.runs[experiment.runs["run_id"] == run_id]
    if rows.empty:
        raise RecordError(f"{experiment.name} has no run {run_id}, whose weights are recorded")
    run = rows.iloc[0]
    layers = weights.filter(regex="^sparsity/").rename(columns=lambda name: name[9:])
    counts = weights.filter(regex="^log10/")

    fig = Figure(figsize=(WIDTH, max(2.8, 0.6 + 0.14 * layers.shape[1])))
    left, right = fig.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_layers(fig, left, weights["step"], layers)
    _draw_histogram(fig, right, weights["step"], counts)
    finish(
        fig,
        f"{experiment.name}, {experiment.scale} scale. Data: {experiment.data}. One pWD run: "
        f"p = {run['p']:g}, $\\lambda_p$ = {run['lambda_p']:g}, lr = {run['lr']:g}, seed "
        f"{run['seed']}; accuracy {run['val_accuracy']:.2f} % at sparsity {run['sparsity']:.4f}. "
        "It is the most accurate recorded pWD run of sparsity 0.9 or more. Lowest row on the "
        "right: zeros, and what is smaller than that.",
    )
    return fig


def _draw_layers(fig: Figure, ax: Axes, steps: pd.Series, layers: pd.DataFrame) -> None:
    """Layers from input to output, downwards, over the steps."""
    names = [name.removesuffix(".weight") for name in layers.columns]
    image = ax.pcolormesh(_edges(steps), np.arange(len(names) + 1), layers.to_numpy().T,
                          vmin=0, vmax=1, cmap="viridis")  # fmt: skip
    ax.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=5.5)
    ax.invert_yaxis()
    ax.set(xlabel="step", title="sparsity of each layer")
    fig.colorbar(image, ax=[ax], label="sparsity")


def _draw_histogram(fig: Figure, ax: Axes, steps: pd.Series, counts: pd.DataFrame) -> None:
    """log10|w| over the steps; the lowest bin holds the zeros."""
    low = np.array([float(name.partition("/")[2]) for name in counts.columns])
    edges = np.append(low, 2 * low[-1] - low[-2])
    share = counts.to_numpy(float) / counts.to_numpy(float).sum(axis=1, keepdims=True)
    image = ax.pcolormesh(_edges(steps), edges, np.where(share > 0, share, np.nan).T,
                          norm=LogNorm(1e-5, 1), cmap="magma_r")  # fmt: skip
    ax.set(xlabel="step", ylabel=r"$\log_{10}|w|$", title="weights by size")
    fig.colorbar(image, ax=[ax], label="share of the decayed weights")


def _edges(steps: pd.Series) -> np.ndarray:
    """Where the columns of evaluations at these steps begin and end."""
    return np.append(0.0, steps.to_numpy(float))
