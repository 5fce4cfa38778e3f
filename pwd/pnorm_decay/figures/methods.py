"""What stands behind Figures 2 and 3: every setting of every method, and a trade-off for each."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pnorm_decay.figures.loading import Experiment, average_seeds, best_adamw, by_p
from pnorm_decay.figures.pareto import pareto_front
from pnorm_decay.figures.style import (
    ADAMW_LINE,
    WIDTH,
    PointStyle,
    draw_adamw,
    finish,
    frontier_axes,
    method_styles,
    nines_axis,
    p_style,
    styled,
)

# Accuracies below this share of the best one lie below the axis.
COLLAPSED = 0.8

# What is drawn alike: a value of p, or a method other than pWD, with all its settings.
Family = tuple[PointStyle, pd.DataFrame]


def trade_off(accuracy: pd.Series, sparsity: pd.Series, reference: float) -> pd.Series:
    """One number for accuracy and sparsity together; our choice, not the paper's.

    ``F = 2 r s / (r + s)``, the harmonic mean of the sparsity ``s`` and of the accuracy relative to
    AdamW's best, ``r = accuracy / reference``. The harmonic mean follows the smaller of the two, so
    a dense run scores 0 however accurate it is, and a collapsed one scores low however sparse it
    is: 1 would be AdamW's accuracy without a single weight. Near 1, a per cent of accuracy and a
    per cent of sparsity weigh the same.

    Args:
        accuracy: in percent.
        sparsity: in [0, 1].
        reference: the accuracy that counts as 1, in percent; above 0.

    Returns:
        F of each run, 0 where both accuracy and sparsity are 0.
    """
    r = accuracy / reference
    return (2 * r * sparsity / (r + sparsity)).fillna(0.0)


@styled
def methods_figure(experiment: Experiment) -> Figure:
    """Draws every setting of every method: the supplement of Figures 2 and 3.

    Left: a point a setting of (p, lambda_p, lr), averaged over its seeds, with a line along the
    Pareto front of each p; AdamW's best accuracy as a dashed line; other methods by marker. Right:
    for each p and each other method the best ``trade_off`` over all settings (by the first seed),
    before all of them.
    Without an AdamW run, accuracy is relative to the best of all runs, and the note says so.
    """
    runs = experiment.finished
    adamw = best_adamw(average_seeds(runs))
    reference = float(runs["val_accuracy"].max()) if adamw is None else adamw
    score = trade_off(runs["val_accuracy"], runs["sparsity"], reference)
    settings = average_seeds(runs.assign(trade_off=score), values=["trade_off"])
    norms = [(p_style(p), points) for p, points in by_p(settings[settings["method"] == "pwd"])]
    others = [
        (style, settings[settings["method"] == method])
        for method, style in method_styles(settings["method"]).items()
    ]

    fig = Figure(figsize=(WIDTH, 3.9))
    left, right = fig.subplots(1, 2, width_ratios=(1.35, 1))
    n_below = _draw_frontier(left, norms, others, reference)
    if adamw is not None:
        draw_adamw(left, adamw)
    _draw_trade_off(right, norms, others)
    _draw_legend(fig, norms, others, adamw is not None, n_below)
    base = "best of AdamW" if adamw is not None else "best of all runs (no AdamW run is recorded)"
    bars = "Bars: standard deviation over seeds. " if (settings["seeds"] > 1).any() else ""
    finish(
        fig,
        f"{experiment.note} Lines: Pareto front of each p. {bars}"
        f"Trade-off (our choice, not the paper's): F\u00a0=\u00a02rs/(r\u00a0+\u00a0s), "
        f"s = sparsity, r = accuracy / {base}.",
    )
    return fig


def _draw_frontier(ax: Axes, norms: list[Family], others: list[Family], reference: float) -> int:
    """Fills the left panel; returns how many settings lie below its lower limit."""
    shown = pd.concat([points for _, points in norms + others] or [_NO_POINTS])
    accuracy = np.append(shown["val_accuracy"].to_numpy(), reference)
    floor = frontier_axes(ax, accuracy, shown, COLLAPSED)
    n_below = 0
    for style, points in norms + others:
        collapsed = points["val_accuracy"] < floor
        if style.p is not None:
            _draw_front(ax, style, points[~collapsed])
        _draw_points(ax, style, points[~collapsed], faint=style.p is not None)
        _draw_collapsed(ax, style, points.loc[collapsed, "sparsity"])
        n_below += int(collapsed.sum())
    return n_below


_NO_POINTS = pd.DataFrame({"val_accuracy": [], "sparsity": []}, dtype=float)


def _draw_front(ax: Axes, style: PointStyle, points: pd.DataFrame) -> None:
    front = points.iloc[pareto_front(points["sparsity"], points["val_accuracy"])]
    ax.plot(
        front["sparsity"], front["val_accuracy"], label=style.label, zorder=3, **style.artist(4.5)
    )


def _draw_points(ax: Axes, style: PointStyle, points: pd.DataFrame, *, faint: bool) -> None:
    """Draws every setting: faintly where a front leads through the ones that matter."""
    look = style.artist() | ({} if style.line else {"linestyle": "none"})
    points = points.sort_values("sparsity")
    if faint:
        look |= {"markersize": 3, "alpha": 0.35, "markeredgewidth": 0}
    else:
        look |= {"label": style.label, "zorder": 3.5}
    ax.plot(points["sparsity"], points["val_accuracy"], **look)
    repeated = points[points["seeds"] > 1]
    if len(repeated):
        ax.errorbar(
            repeated["sparsity"],
            repeated["val_accuracy"],
            xerr=repeated["sparsity_std"],
            yerr=repeated["val_accuracy_std"],
            fmt="none",
            ecolor=style.color,
            elinewidth=0.8,
            capsize=1.5,
            zorder=2.8,
        )


def _draw_collapsed(ax: Axes, style: PointStyle, sparsity: pd.Series) -> None:
    """Marks runs below the axis by triangles on its lower edge, at their sparsity."""
    ax.plot(
        sparsity.clip(upper=ax.get_xlim()[1]),
        np.full(len(sparsity), 0.015),
        "v",
        transform=ax.get_xaxis_transform(),
        color=style.color,
        markersize=3.5,
        markeredgewidth=0,
        alpha=0.6,
        clip_on=False,
        in_layout=False,
        zorder=4,
    )


def _draw_trade_off(ax: Axes, norms: list[Family], others: list[Family]) -> None:
    """Fills the right panel: a column a p, and after a rule a column a method."""
    families = norms + others
    nines_axis(ax, "y", highest=max((f["trade_off"].max() for _, f in families), default=0.0))
    for x, (style, points) in enumerate(families):
        ax.plot(
            np.full(len(points), x),
            points["trade_off"],
            "_",
            color=style.color,
            markersize=8,
            alpha=0.35,
        )
        best = points.nlargest(1, "trade_off_first")
        spread = best["trade_off_std"].fillna(0.0)
        ax.errorbar([x], best["trade_off"], yerr=spread, capsize=2, zorder=3, **style.artist())
    ax.grid(True, axis="y")
    ax.set_xlim(-0.6, max(len(families), 1) - 0.4)
    ax.set_xticks(range(len(families)), [style.tick for style, _ in families])
    ax.set_ylabel("trade-off F = 2rs / (r + s)")
    ax.set_xlabel("p, or method" if norms and others else "method" if others else "p")
    if norms and others:
        ax.axvline(len(norms) - 0.5, color="#bbbbbb", linewidth=0.6)
    for label in ax.get_xticklabels()[len(norms) :]:
        label.set(rotation=35, ha="right", rotation_mode="anchor")


def _draw_legend(
    fig: Figure, norms: list[Family], others: list[Family], has_adamw: bool, n_below: int
) -> None:
    handles = [
        Line2D([], [], label=style.label, **style.artist(min(style.size, 7)))
        for style, _ in norms + others
    ]
    if has_adamw:
        handles.insert(len(norms), Line2D([], [], label="best AdamW", **ADAMW_LINE))
    if n_below:
        label = f"{n_below} below the axis"
        handles.append(Line2D([], [], color="#999999", marker="v", linestyle="none", label=label))
    n_columns = len(handles) if len(handles) <= 8 else len(norms) if 5 <= len(norms) <= 8 else 7
    # Matplotlib fills columns; the p are to fill the first rows.
    by_row = [handle for column in range(n_columns) for handle in handles[column::n_columns]]
    fig.legend(
        handles=by_row,
        loc="outside upper center",
        ncols=n_columns,
        handlelength=1.8,
        columnspacing=1.4,
    )
