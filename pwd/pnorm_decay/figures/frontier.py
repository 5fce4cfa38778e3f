"""Figures 2 and 3: accuracy against sparsity, and accuracy at fixed sparsities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pnorm_decay import selection
from pnorm_decay.figures.loading import Experiment, average_seeds, best_adamw, by_p
from pnorm_decay.figures.pareto import pareto_front
from pnorm_decay.figures.style import (
    ADAMW_LINE,
    WIDTH,
    PointStyle,
    draw_adamw,
    finish,
    frontier_axes,
    p_style,
    styled,
)
from pnorm_decay.figures.targets import REFERENCE

# The lowest accuracy shown, as a share of the best.
COLLAPSED = 0.8

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)

# What is drawn beside pWD with a constant lambda_p: a style, and the methods in the records.
RIVALS = (
    (PointStyle("pWD to a target", "target", "#111111", "8", 4.5, line=True), ["pwd_target"]),
    (PointStyle("exact to a target", "exact", "#e8630a", "H", 4.5, line=True), ["exact_target"]),
    (
        PointStyle(REFERENCE, REFERENCE, "#1a9850", "X", 4.5, line=True),
        ["magnitude", "magnitude_global"],
    ),
)
CONSTANT = PointStyle("pWD, constant lambda_p, best p", "pWD", "#1f6fb8", "o", 4.5)


@styled
def frontier_figure(experiment: Experiment) -> Figure:
    """Draws Figure 2 (images) or 3 (text) of the paper.

    Left: pWD with a constant lambda_p, a pale point a setting and a thin line along the Pareto
    front of each p; a strong line each for the runs that were steered to a target and for magnitude
    pruning, through the setting that seed 0 chooses at each target; AdamW's best accuracy as a
    dashed line. Right: the accuracy of each of them at a sparsity of at least s, as
    ``selection.best`` chooses it by seed 0. Points are means over seeds, bars standard deviations.
    """
    settings = average_seeds(experiment.finished)
    grid = settings[settings["method"] == "pwd"]
    rivals = {
        style: _best_at_targets(settings[settings["method"].isin(methods)])
        for style, methods in RIVALS
        if settings["method"].isin(methods).any()
    }
    adamw = best_adamw(settings)
    fig = Figure(figsize=(WIDTH, 3.7))
    left, right = fig.subplots(1, 2, width_ratios=(1.35, 1))
    hidden = _draw_frontier(left, grid, rivals, adamw)
    _draw_at_sparsities(right, grid, rivals, adamw, bottom=left.get_ylim()[0])
    _draw_legend(fig, grid, adamw is not None)
    left_out = f"{hidden} settings lie below the left axis. " if hidden else ""
    bars = "Bars: standard deviation over seeds. " if (settings["seeds"] > 1).any() else ""
    finish(
        fig,
        f"{experiment.note} Thin lines: Pareto front of pWD with a constant lambda_p, for each p; "
        f"pale: all its settings. {bars}{left_out}Right: the best setting that is at least as "
        "sparse (of runs to a target and IMP: by the target); a triangle: below the axis.",
    )
    return fig


def _best_at_targets(settings: pd.DataFrame) -> pd.DataFrame:
    """The setting at each target that the first seed chooses, by rising target."""
    order = settings.sort_values("val_accuracy_first", ascending=False, kind="stable")
    return order.drop_duplicates("target_sparsity").sort_values("target_sparsity")


def _draw_frontier(
    ax: Axes, grid: pd.DataFrame, rivals: Mapping[PointStyle, pd.DataFrame], adamw: float | None
) -> int:
    """Fills the left panel; returns how many settings lie below it."""
    shown = pd.concat([grid, *rivals.values()])
    accuracy = np.append(shown["val_accuracy"].to_numpy(), [] if adamw is None else adamw)
    if len(accuracy) == 0:
        accuracy = np.array([0.0])
    floor = frontier_axes(ax, accuracy, shown, COLLAPSED)
    for p, points in by_p(grid[grid["val_accuracy"] >= floor]):
        style = p_style(p)
        ax.plot(
            points["sparsity"],
            points["val_accuracy"],
            style.marker,
            color=style.color,
            markersize=2.5,
            alpha=0.3,
            markeredgewidth=0,
        )
        front = points.iloc[pareto_front(points["sparsity"], points["val_accuracy"])]
        ax.plot(
            front["sparsity"],
            front["val_accuracy"],
            label=style.label,
            zorder=3,
            **style.artist(3.5) | {"linewidth": 0.9},
        )
    lines = {style: own[own["val_accuracy"] >= floor] for style, own in rivals.items()}
    for style, points in lines.items():
        _draw_means(ax, points["sparsity"], points, style, linestyle="-")
    _draw_names(ax, {style: points for style, points in lines.items() if len(points)})
    if adamw is not None:
        draw_adamw(ax, adamw)
    return int((shown["val_accuracy"] < floor).sum())


def _draw_names(ax: Axes, lines: Mapping[PointStyle, pd.DataFrame]) -> None:
    """Names the lines: IMP below its end, the others above the highest line's falling end."""
    above = [style for style in lines if style.label != REFERENCE]
    ends = pd.concat([lines[style].tail(3) for style in above]) if above else pd.DataFrame()
    for style, points in lines.items():
        if style.label == REFERENCE:
            point, shift, aligned = points.iloc[-1], (-7.0, -3.0), ("right", "top")
        else:
            place = 8.5 * above.index(style)
            point = ends.iloc[int(ends["val_accuracy"].to_numpy().argmax())]
            shift, aligned = (7.0, 3.0 + place), ("left", "bottom")
        ax.annotate(
            style.label,
            (point["sparsity"], point["val_accuracy"]),
            xytext=shift,
            textcoords="offset points",
            ha=aligned[0],
            va=aligned[1],
            fontsize=7,
            color=style.color,
        )


def _draw_means(
    ax: Axes, x: pd.Series | list[float], points: pd.DataFrame, style: PointStyle, linestyle: str
) -> None:
    ax.errorbar(
        x,
        points["val_accuracy"],
        yerr=points["val_accuracy_std"].fillna(0.0),
        label=style.label,
        color=style.color,
        linestyle=linestyle,
        linewidth=1.6,
        marker=style.marker,
        markersize=style.size,
        markeredgewidth=0.4,
        markeredgecolor="white",
        elinewidth=0.9,
        capsize=1.5,
        zorder=4,
    )


def _draw_at_sparsities(
    ax: Axes,
    grid: pd.DataFrame,
    rivals: Mapping[PointStyle, pd.DataFrame],
    adamw: float | None,
    bottom: float,
) -> None:
    """Fills the right panel: a column a sparsity, in it the best of each."""
    # What is told its sparsity stands at its target, which pWD meets to a hundredth of the density.
    told = {
        style: settings.assign(sparsity_first=settings["target_sparsity"])
        for style, settings in rivals.items()
    }
    contenders = ({CONSTANT: grid} if len(grid) else {}) | told
    ax.set_ylim(bottom, None)
    top = bottom
    for place, (style, settings) in enumerate(contenders.items()):
        best = [(x, selection.best(settings, at_least=s)) for x, s in enumerate(SPARSITIES)]
        offset = 0.7 * ((place + 0.5) / len(contenders) - 0.5)
        reached = [(x + offset, row) for x, row in best if len(row)]
        if not reached:
            continue
        points = pd.concat([row for _, row in reached])
        x = pd.Series([x for x, _ in reached], index=points.index)
        inside = points["val_accuracy"] >= bottom
        top = max(top, (points["val_accuracy"] + points["val_accuracy_std"].fillna(0)).max())
        _draw_means(ax, x[inside], points[inside], style, linestyle="none")
        below = np.full(int((~inside).sum()), 0.02)
        ax.plot(
            x[~inside],
            below,
            "v",
            transform=ax.get_xaxis_transform(),
            color=style.color,
            markersize=4,
            markeredgewidth=0,
        )
    if adamw is not None:
        ax.axhline(adamw, zorder=2.5, **ADAMW_LINE)
        top = max(top, adamw)
    ax.set_ylim(bottom, top + 0.04 * (top - bottom) + 0.1)
    ax.grid(True, axis="y")
    ax.set_xlim(-0.5, len(SPARSITIES) - 0.5)
    ax.set_xticks(range(len(SPARSITIES)), [f"{s:g}" for s in SPARSITIES])
    ax.set(xlabel="sparsity of at least", ylabel="accuracy of the best setting (%)")
    if contenders:
        ax.legend(loc="lower left", fontsize=6.5, handlelength=1.2)


def _draw_legend(fig: Figure, grid: pd.DataFrame, has_adamw: bool) -> None:
    handles = [
        Line2D([], [], label=style.label, **style.artist(4))
        for style in (p_style(p) for p, _ in by_p(grid))
    ]
    if has_adamw:
        handles.append(Line2D([], [], label="best AdamW", **ADAMW_LINE))
    if handles:
        fig.legend(
            handles=handles,
            loc="outside upper center",
            ncols=8,
            handlelength=1.8,
            columnspacing=1.4,
        )
