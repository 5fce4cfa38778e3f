"""Figures 4 and 5: accuracy and sparsity over the lambda_p x lr plane, one panel a p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.tri import Triangulation
from numpy.typing import NDArray

from pnorm_decay import selection
from pnorm_decay.figures.loading import Experiment, average_seeds, by_p
from pnorm_decay.figures.style import WIDTH, accuracy_floor, finish, styled

SPARSITY_LEVELS = (0.01, 0.2, 0.4, 0.8)

# Accuracies below this share of the best one have one colour.
COLLAPSED = 0.9

# In units of a panel's width or height: about the length of a label.
SHORTEST_LABELLED = 0.18

# Viridis without its yellow end, on which the white sparsity lines could not be seen.
_ACCURACY_COLORS = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.0, 0.86, 256)))


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plane:
    """The runs of one panel: ``settings`` averaged over seeds, ``diverged`` without metrics."""

    title: str
    settings: pd.DataFrame
    diverged: pd.DataFrame


def on_planes(experiment: Experiment) -> Experiment:
    """The runs that have a place: pWD's, and AdamW's for p = 2 where pWD was not run at it.

    Runs with lambda_p = 0 have no place on a logarithmic axis and are left out.
    """
    runs = experiment.runs
    placed = runs[(runs["lambda_p"] > 0) & (runs["lr"] > 0)]
    chosen = placed[placed["method"] == "pwd"]
    if not (chosen["p"] == 2).any():
        chosen = pd.concat([chosen, placed[placed["method"] == "adamw"].assign(p=2.0)])
    return Experiment(experiment.scale, experiment.name, chosen)


def planes(experiment: Experiment) -> list[Plane]:
    """One plane a p, by rising p, of the runs of ``on_planes``."""
    found = []
    for p, members in by_p(experiment.runs):
        split = Experiment(experiment.scale, experiment.name, members)
        by_adamw = " (AdamW)" if (members["method"] == "adamw").all() else ""
        title = f"p = {p:g}{by_adamw}"
        # Where a place was run at several lengths, the longest counts.
        settings = average_seeds(split.finished).sort_values("steps")
        settings = settings.drop_duplicates(["lambda_p", "lr"], keep="last")
        found.append(Plane(title, settings, split.diverged))
    return found


@styled
def contour_figure(experiment: Experiment) -> Figure:
    """Draws Figure 4 (images) or 5 (text) of the paper.

    Colour is validation accuracy, one scale for all panels, whose lower end is open where runs
    collapsed; white lines are sparsities; dots are runs, grey crosses runs that diverged or failed.
    Between runs the colour is interpolated in log lambda_p and log lr, and never beyond them. Runs
    beside the grid, and a panel's whose runs do not span an area, are coloured dots.
    """
    shown = on_planes(experiment)
    panels = planes(shown)
    n_columns = 4 if len(panels) in (4, 7, 8) or len(panels) > 9 else min(max(len(panels), 1), 3)
    n_rows = -(-max(len(panels), 1) // n_columns)
    fig = Figure(figsize=(WIDTH * min(0.25 + 0.25 * n_columns, 1), 0.75 + 2.0 * n_rows))
    axes = fig.subplots(n_rows, n_columns, squeeze=False)
    norm = _color_scale(panels)
    for ax, plane in zip(axes.flat, panels, strict=False):
        _draw_plane(ax, plane, norm)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for i, ax in enumerate(axes.flat[: len(panels)]):
        if i % n_columns == 0:
            ax.set_ylabel("learning rate")
        if i + n_columns >= len(panels):  # nothing below it
            ax.set_xlabel(r"$\lambda_p$")
    if panels:
        colors = ScalarMappable(norm, _ACCURACY_COLORS)
        drawn = list(axes.flat[: len(panels)])
        bar = fig.colorbar(colors, ax=drawn, pad=0.015, aspect=12 * n_rows)
        bar.set_label("validation accuracy (%)")
    else:
        fig.text(0.5, 0.6, "no pWD run to show", ha="center")
    finish(fig, f"{shown.note} {_key(experiment, panels)}")
    return fig


def _key(experiment: Experiment, panels: list[Plane]) -> str:
    levels = ", ".join(f"{level:g}" for level in SPARSITY_LEVELS)
    text = f"White lines: sparsity {levels}. Dots: runs. Colour between runs is interpolated."
    if any(len(plane.diverged) for plane in panels):
        text += " Grey crosses: runs that diverged or failed."
    runs = experiment.runs
    unplaced = int(((runs["method"] == "pwd") & (runs["lambda_p"] == 0)).sum())
    if unplaced:
        text += f" Not shown: {unplaced} run{'' if unplaced == 1 else 's'} at $\\lambda_p$ = 0."
    return text


def _color_scale(panels: list[Plane]) -> BoundaryNorm:
    """About ten steps of colour for all panels, open below where runs collapsed."""
    values = [plane.settings["val_accuracy"].to_numpy(float) for plane in panels]
    accuracy = np.concatenate([*values, np.empty(0)])
    if not len(accuracy):
        return BoundaryNorm([0, 100], _ACCURACY_COLORS.N)
    locator = MaxNLocator(nbins=12, steps=[1, 2, 2.5, 5, 10])
    best = float(accuracy.max())
    # At least one per cent, lest runs that are alike should look different.
    lowest = min(accuracy_floor(accuracy, COLLAPSED), max(best - 1, 0.0))
    steps = np.array(locator.tick_values(lowest, max(best, 1.0)))
    extend: Literal["min", "neither"] = "min" if accuracy.min() < steps[0] else "neither"
    return BoundaryNorm(steps, _ACCURACY_COLORS.N, extend=extend)


def _draw_plane(ax: Axes, plane: Plane, norm: BoundaryNorm) -> None:
    x, y = _place(plane.settings)
    crossed_x, crossed_y = _place(plane.diverged)
    accuracy = plane.settings["val_accuracy"].to_numpy(dtype=float)
    chosen = selection.best(plane.settings)["val_accuracy"]
    best = f"best {chosen.iloc[0]:.1f}%" if len(chosen) else "all diverged"
    ax.set_title(f"{plane.title}, {best}", pad=4)
    ax.spines[["top", "right"]].set_visible(True)
    _log_axis(ax, "x", np.append(x, crossed_x))
    _log_axis(ax, "y", np.append(y, crossed_y))
    look: dict[str, Any] = {"norm": norm, "cmap": _ACCURACY_COLORS}
    grid = _in_the_grid(x, y)
    if _spans_an_area(x[grid], y[grid]):
        _fill(ax, x[grid], y[grid], accuracy[grid],
              levels=norm.boundaries, extend=norm.extend, **look)  # fmt: skip
        ax.plot(x[grid], y[grid], "o", color="black", markersize=1.6, markeredgewidth=0,
                label="runs")  # fmt: skip
        sparsity = plane.settings["sparsity"].to_numpy(dtype=float)
        _draw_sparsity(ax, x[grid], y[grid], sparsity[grid])
    else:
        grid[:] = False
    ax.scatter(x[~grid], y[~grid], c=accuracy[~grid], s=28, edgecolors="black", linewidths=0.4,
               label="runs", **look)  # fmt: skip
    crosses = ax.plot(crossed_x, crossed_y, "x", color="#707070", markersize=4.5, label="diverged")
    crosses[0].set_path_effects([withStroke(linewidth=2.2, foreground="white")])


def _place(runs: pd.DataFrame) -> tuple[Array, Array]:
    """Where runs lie on the plane: log10 of lambda_p and of lr."""
    return np.log10(runs["lambda_p"].to_numpy(float)), np.log10(runs["lr"].to_numpy(float))


def _in_the_grid(x: Array, y: Array) -> NDArray[np.bool_]:
    """Which points lie in columns and rows that are at least half full.

    The others lie beside the grid: triangles out to them would be long, and their contours wrong.
    """
    inside = np.full(len(x), True)
    while True:
        in_column = ((x[:, None] == x) & inside).sum(axis=1)
        in_row = ((y[:, None] == y) & inside).sum(axis=1)
        columns, rows = len(np.unique(x[inside])), len(np.unique(y[inside]))
        full = inside & (2 * in_column >= rows) & (2 * in_row >= columns)
        if (full == inside).all():
            return inside
        inside = full


def _spans_an_area(x: Array, y: Array) -> bool:
    """Whether the points have three among them that do not lie on a line."""
    if len(x) < 3:
        return False
    centred = np.column_stack([x - x.mean(), y - y.mean()])
    return int(np.linalg.matrix_rank(centred, tol=1e-6)) == 2


def _draw_sparsity(ax: Axes, x: Array, y: Array, sparsity: Array) -> None:
    levels = [s for s in SPARSITY_LEVELS if sparsity.min() < s < sparsity.max()]
    if not levels:
        return
    lines = _lines(ax, x, y, sparsity, levels=levels, colors="white", linewidths=1.0)
    places = _label_places(ax, lines)
    labels = ax.clabel(lines, fmt="%g", fontsize=6.5, inline_spacing=2, manual=places)
    # White alone would be lost on the lightest colours.
    lines.set_path_effects([withStroke(linewidth=1.8, foreground="#00000066")])
    for label in labels:
        label.set_path_effects([withStroke(linewidth=1.4, foreground="#000000aa")])


def _label_places(ax: Axes, lines: ContourSet) -> list[tuple[float, float]]:
    """A place on each level's longest line, away from the panel's edge and from other labels.

    A line shorter than its label goes without one.
    """
    taken: list[Array] = []
    to_panel = ax.transData + ax.transAxes.inverted()
    for segments in lines.allsegs:
        in_panel = [to_panel.transform(segment) for segment in segments if len(segment) > 1]
        line = max(in_panel, key=_length, default=None)
        if line is None or _length(line) < SHORTEST_LABELLED:
            continue
        candidates = _along(line)
        room = [_room(point, taken) for point in candidates]
        taken.append(candidates[int(np.argmax(room))])
    from_panel = to_panel.inverted()
    return [tuple(from_panel.transform(point)) for point in taken]


def _length(line: Array) -> float:
    return float(np.hypot(*np.diff(line, axis=0).T).sum())


def _along(line: Array) -> Array:
    """Nine points at even distances along a line."""
    lengths = np.append(0.0, np.hypot(*np.diff(line, axis=0).T).cumsum())
    at = np.linspace(0.1, 0.9, 9) * lengths[-1]
    return np.column_stack([np.interp(at, lengths, line[:, i]) for i in (0, 1)])


def _room(point: Array, taken: list[Array]) -> float:
    """The distance to the nearest label, or twice that to the panel's edge if that is less."""
    to_edge = 2 * float(min(point.min(), (1 - point).min()))
    return min([to_edge, *(float(np.hypot(*(point - other))) for other in taken)])


def _fill(ax: Axes, x: Array, y: Array, z: Array, **style: Any) -> ContourSet:
    """Filled contours between scattered points."""
    areas: ContourSet
    if (grid := _grid(x, y, z)) is not None:
        areas = ax.contourf(*grid, **style)
    else:
        areas = ax.tricontourf(_triangulation(x, y), z, **style)
    # Without an edge of its own colour, hairlines show between areas; snapped to pixels, areas do
    # not meet.
    areas.set(edgecolor="face", linewidth=0.4, antialiased=True, snap=False)
    return areas


def _lines(ax: Axes, x: Array, y: Array, z: Array, **style: Any) -> ContourSet:
    """Contour lines between scattered points."""
    if (grid := _grid(x, y, z)) is not None:
        return ax.contour(*grid, **style)
    return ax.tricontour(_triangulation(x, y), z, **style)


def _grid(x: Array, y: Array, z: Array) -> tuple[Array, Array, Array] | None:
    """The points as columns, rows and a matrix; None unless every cell is there."""
    columns, rows = np.unique(x), np.unique(y)
    if len(z) != len(columns) * len(rows):
        return None
    grid = np.empty((len(rows), len(columns)))
    grid[np.searchsorted(rows, y), np.searchsorted(columns, x)] = z
    return columns, rows, grid


def _triangulation(x: Array, y: Array) -> Triangulation:
    """Triangles between the points, which end at their convex hull.

    They are chosen with both axes at one scale, so that a narrow range of one makes no slivers.
    """
    triangles = Triangulation((x - x.min()) / np.ptp(x), (y - y.min()) / np.ptp(y)).triangles
    return Triangulation(x, y, triangles)


def _log_axis(ax: Axes, which: Literal["x", "y"], exponents: Array) -> None:
    """Labels an axis that holds log10 of a value with the value.

    Contours are interpolated in the logarithm, so the axis is linear in it and its ticks are ours:
    powers of ten where two of them are in range, else up to three of the values run.
    """
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = float(exponents.min()), float(exponents.max())
    margin = 0.07 * (high - low) or 0.2
    ax.set(**{f"{which}lim": (low - margin, high + margin)})
    decades = np.arange(np.ceil(low - margin), np.floor(high + margin) + 1)
    if len(decades) >= 2:
        between = np.arange(np.floor(low), np.ceil(high) + 1)[:, None] + np.log10(np.arange(2, 10))
        axis.set_minor_locator(FixedLocator(between.ravel().tolist()))
        axis.set_ticks(decades, [f"$10^{{{k:.0f}}}$" for k in decades])
    else:
        values = np.unique(exponents.round(9))
        values = values[:: -(-len(values) // 3)]
        axis.set_ticks(values, [f"{10**value:.3g}" for value in values])
