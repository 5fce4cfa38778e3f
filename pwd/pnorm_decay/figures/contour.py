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
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from pnorm_decay import selection
from pnorm_decay.figures.loading import Experiment, average_seeds, by_p
from pnorm_decay.figures.style import WIDTH, finish, styled

SPARSITY_LEVELS = (0.01, 0.2, 0.4, 0.8, 0.9, 0.99)

# Where a colour ends, in percentage points below the best accuracy: fine where networks are of use,
# coarse where they are not, so that neither is one field.
DROPS = (0, 1, 2, 3, 5, 10, 20, 40)

# Of a cell whose run has no neighbour, in decades.
LONE_CELL = 0.5

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

    A cell is a run, or the mean of its seeds: its colour is validation accuracy, one scale and the
    same axes for all panels. White lines are sparsities, interpolated in log lambda_p and log lr
    between neighbouring runs and nowhere else; dots are runs, grey crosses runs that diverged or
    failed. A run beside the grid is a coloured circle.
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
    _share_axes(list(axes.flat[: len(panels)]), panels, n_columns)
    for ax, plane in zip(axes.flat, panels, strict=False):
        _draw_sparsity(ax, plane)
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
        bar = fig.colorbar(colors, ax=drawn, pad=0.015, aspect=12 * n_rows, ticks=norm.boundaries)
        bar.set_label("validation accuracy (%)")
    else:
        fig.text(0.5, 0.6, "no pWD run to show", ha="center")
    finish(fig, f"{shown.note} {_key(experiment, panels)}")
    return fig


def _key(experiment: Experiment, panels: list[Plane]) -> str:
    levels = ", ".join(f"{level:g}" for level in SPARSITY_LEVELS)
    text = f"A cell has the colour of the run at its dot. White lines: sparsity {levels}, "
    text += "interpolated between runs."
    if any(not _in_the_grid(*_place(plane.settings)).all() for plane in panels):
        text += " Circles: runs beside the grid."
    if any(len(plane.diverged) for plane in panels):
        text += " Grey crosses: runs that diverged or failed."
    runs = experiment.runs
    unplaced = int(((runs["method"] == "pwd") & (runs["lambda_p"] == 0)).sum())
    if unplaced:
        text += f" Not shown: {unplaced} run{'' if unplaced == 1 else 's'} at $\\lambda_p$ = 0."
    return text


def _color_scale(panels: list[Plane]) -> BoundaryNorm:
    """The steps of colour of all panels: whole percents, ``DROPS`` below the best accuracy."""
    values = [plane.settings["val_accuracy"].to_numpy(float) for plane in panels]
    accuracy = np.concatenate([*values, np.empty(0)])
    if not len(accuracy):
        return BoundaryNorm([0, 100], _ACCURACY_COLORS.N)
    top, lowest = min(np.floor(accuracy.max()) + 1, 100.0), accuracy.min()
    steps = [top, top - DROPS[1]]
    for drop in DROPS[2:]:
        if steps[-1] > lowest and top - drop >= 0:
            steps.append(top - drop)
    extend: Literal["min", "neither"] = "min" if lowest < steps[-1] else "neither"
    return BoundaryNorm(steps[::-1], _ACCURACY_COLORS.N, extend=extend)


def _draw_plane(ax: Axes, plane: Plane, norm: BoundaryNorm) -> None:
    x, y = _place(plane.settings)
    crossed_x, crossed_y = _place(plane.diverged)
    accuracy = plane.settings["val_accuracy"].to_numpy(dtype=float)
    chosen = selection.best(plane.settings)["val_accuracy"]
    best = f"best {chosen.iloc[0]:.1f}%" if len(chosen) else "all diverged"
    ax.set_title(f"{plane.title}, {best}", pad=4)
    ax.spines[["top", "right"]].set_visible(True)
    look: dict[str, Any] = {"norm": norm, "cmap": _ACCURACY_COLORS}
    grid = _in_the_grid(x, y)
    if grid.any():
        columns, rows, cells = _cells(x[grid], y[grid], accuracy[grid])
        # Without an edge of its own colour, hairlines show between cells.
        ax.pcolormesh(_edges(columns), _edges(rows), cells,
                      edgecolor="face", linewidth=0.3, **look)  # fmt: skip
        ax.plot(x[grid], y[grid], "o", color="black", markersize=1.6, markeredgewidth=0,
                label="runs")  # fmt: skip
    ax.scatter(x[~grid], y[~grid], c=accuracy[~grid], s=24, edgecolors="black", linewidths=0.6,
               label="runs", zorder=3, **look)  # fmt: skip
    crosses = ax.plot(crossed_x, crossed_y, "x", color="#707070", markersize=4.5, label="diverged")
    crosses[0].set_path_effects([withStroke(linewidth=2.2, foreground="white")])


def _place(runs: pd.DataFrame) -> tuple[Array, Array]:
    """Where runs lie on the plane: log10 of lambda_p and of lr."""
    return np.log10(runs["lambda_p"].to_numpy(float)), np.log10(runs["lr"].to_numpy(float))


def _in_the_grid(x: Array, y: Array) -> NDArray[np.bool_]:
    """Which points lie in a column and a row of several, or of half of all.

    The others lie beside the grid: a column of their own would make narrow cells of their
    neighbours, and holes beside them.
    """
    inside = np.full(len(x), True)
    while True:
        in_column = ((x[:, None] == x) & inside).sum(axis=1)
        in_row = ((y[:, None] == y) & inside).sum(axis=1)
        columns, rows = len(np.unique(x[inside])), len(np.unique(y[inside]))
        enough = inside & (in_column >= min(2, rows / 2)) & (in_row >= min(2, columns / 2))
        if (enough == inside).all():
            return inside
        inside = enough


def _cells(x: Array, y: Array, z: Array) -> tuple[Array, Array, np.ma.MaskedArray[Any, Any]]:
    """Points as columns, rows and a matrix of shape (rows, columns), masked where there is none."""
    columns, rows = np.unique(x), np.unique(y)
    cells = np.full((len(rows), len(columns)), np.nan)
    cells[np.searchsorted(rows, y), np.searchsorted(columns, x)] = z
    return columns, rows, np.ma.masked_invalid(cells)


def _edges(centres: Array) -> Array:
    """Where cells end: halfway between their rising centres, and as far beyond the outer ones."""
    if len(centres) == 1:
        return centres[0] + LONE_CELL / 2 * np.array([-1.0, 1.0])
    between = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - between[0]], between, [2 * centres[-1] - between[-1]]])


def _draw_sparsity(ax: Axes, plane: Plane) -> None:
    x, y = _place(plane.settings)
    grid = _in_the_grid(x, y)
    columns, rows, sparsity = _cells(
        x[grid], y[grid], plane.settings["sparsity"].to_numpy(float)[grid]
    )
    if min(sparsity.shape) < 2:
        return
    levels = [s for s in SPARSITY_LEVELS if sparsity.min() < s < sparsity.max()]
    if not levels:
        return
    lines = ax.contour(columns, rows, sparsity, levels=levels, colors="white", linewidths=1.0)
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


def _share_axes(drawn: list[Axes], panels: list[Plane], n_columns: int) -> None:
    """Gives all panels the same axes, wide enough for every cell, and labels the outer ones."""
    for which, number in (("x", 0), ("y", 1)):
        exponents, ends = [], []
        for plane in panels:
            places = _place(plane.settings)
            own, crossed = places[number], _place(plane.diverged)[number]
            exponents += [own, crossed]
            grid = _in_the_grid(*places)
            ends += [own, crossed, _edges(np.unique(own[grid])) if grid.any() else own]
        for i, ax in enumerate(drawn):
            outer = i % n_columns == 0 if which == "y" else i + n_columns >= len(drawn)
            _log_axis(ax, which, np.concatenate(exponents), np.concatenate(ends), outer)  # type: ignore[arg-type]


def _log_axis(
    ax: Axes, which: Literal["x", "y"], exponents: Array, ends: Array, labelled: bool
) -> None:
    """Labels an axis that holds log10 of a value with the value.

    Sparsity is interpolated in the logarithm, so the axis is linear in it and its ticks are ours:
    powers of ten where two of them are in range, else up to three of the values run.
    """
    axis = ax.xaxis if which == "x" else ax.yaxis
    margin = 0.04 * float(np.ptp(ends)) or 0.2
    low, high = float(ends.min()) - margin, float(ends.max()) + margin
    ax.set(**{f"{which}lim": (low, high)})
    decades = np.arange(np.ceil(low), np.floor(high) + 1)
    if len(decades) >= 2:
        between = np.arange(np.floor(low), np.ceil(high) + 1)[:, None] + np.log10(np.arange(2, 10))
        axis.set_minor_locator(FixedLocator(between.ravel().tolist()))
        axis.set_ticks(decades, [f"$10^{{{k:.0f}}}$" for k in decades])
    else:
        values = np.unique(exponents.round(9))
        values = values[:: -(-len(values) // 3)]
        axis.set_ticks(values, [f"{10**value:.3g}" for value in values])
    ax.tick_params(axis=which, labelleft=labelled, labelbottom=labelled)
