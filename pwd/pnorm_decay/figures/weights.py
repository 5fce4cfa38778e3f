"""Where the zeros of sparse runs are, and how the weights of one of them got there."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pnorm_decay.figures.loading import Experiment
from pnorm_decay.figures.style import WIDTH, finish, styled
from pnorm_decay.records import RecordError


@styled
def weights_figure(experiment: Experiment, weights: pd.DataFrame) -> Figure:
    """Draws the sparsity of every layer and the histogram of log10|w| during one run.

    That run is the first of ``weights``. Between them stands the sparsity of every layer at the end
    of each run, a column a run, by rising p.

    Args:
        experiment: the experiment of the runs.
        weights: what ``records.read_weights`` gave.

    Raises:
        RecordError: a run is not among the experiment's.
    """
    runs = experiment.runs.set_index("run_id")
    ids = weights["run_id"].drop_duplicates().tolist()
    for run_id in ids:
        if run_id not in runs.index:
            raise RecordError(f"{experiment.name} has no run {run_id}, whose weights are recorded")
    run, history = runs.loc[ids[0]], weights[weights["run_id"] == ids[0]]
    layers = weights.filter(regex="^sparsity/").rename(columns=lambda name: name[9:])
    final = layers.groupby(weights["run_id"]).last()
    norms = runs.loc[ids, "p"].sort_values()

    fig = Figure(figsize=(WIDTH, max(2.8, 0.6 + 0.14 * layers.shape[1])))
    ratios = (1, 0.1 + 0.11 * len(ids), 0.9)
    left, middle, right = fig.subplots(1, 3, width_ratios=ratios)
    names = [name.removesuffix(".weight") for name in layers.columns]
    image = _draw_layers(left, _edges(history["step"]), layers.loc[history.index])
    left.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=5.5)
    left.set(xlabel="step", title="sparsity of each layer")
    _draw_layers(middle, np.arange(len(ids) + 1.0), final.loc[norms.index])
    middle.set_yticks([])
    middle.set_xticks(np.arange(len(ids)) + 0.5, [f"{p:g}" for p in norms])
    middle.set(xlabel="p", title="at the end")
    fig.colorbar(image, ax=[left, middle], label="sparsity")
    _draw_histogram(fig, right, history["step"], history.filter(regex="^log10/"))
    finish(
        fig,
        f"{experiment.name}, {experiment.scale} scale. Data: {experiment.data}. Of each p the most "
        "accurate recorded pWD run of sparsity 0.9 or more. Left and right the most accurate of "
        f"these: p = {run['p']:g}, $\\lambda_p$ = {run['lambda_p']:g}, lr = {run['lr']:g}, seed "
        f"{run['seed']}; accuracy {run['val_accuracy']:.2f} % at sparsity {run['sparsity']:.4f}. "
        "Lowest row on the right: zeros, and what is smaller than that.",
    )
    return fig


def _draw_layers(ax: Axes, edges: np.ndarray, sparsities: pd.DataFrame) -> QuadMesh:
    """Layers from input to output, downwards; a column a row of ``sparsities``."""
    rows = np.arange(sparsities.shape[1] + 1)
    image = ax.pcolormesh(edges, rows, sparsities.to_numpy().T, vmin=0, vmax=1, cmap="viridis")
    ax.invert_yaxis()
    return image


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
