"""How every figure looks, and how it is written: fonts, colours, the sparsity axis, the note."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from numpy.typing import NDArray

from pnorm_decay.figures.loading import MOST_NINES, nines
from pnorm_decay.files import atomic_write

WIDTH = 7.2  # inches: the text width of a two-column paper
NOTE_POINTS = 6.0

# DejaVu Sans comes with matplotlib, so that a figure has the same bytes on every machine.
RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "figure.dpi": 180,
    "figure.facecolor": "white",
}

styled = mpl.rc_context(RC)  # a decorator for functions that draw

# One hue on each side of p = 1, where the method changes its nature, with the strongest colour
# furthest from it. Blue and brown are told apart with every common colour blindness.
_BELOW_ONE = LinearSegmentedColormap.from_list("below one", ["#0a1f5c", "#1f6fb8", "#86cdf2"])
_ABOVE_ONE = LinearSegmentedColormap.from_list("above one", ["#efb93a", "#b5651d", "#5f2a08"])
_AT_ONE = "#4d4d4d"

ADAMW_COLOR = "#d62728"
ADAMW_LINE: Any = {"color": ADAMW_COLOR, "linestyle": "--", "linewidth": 1.2}


@dataclass(frozen=True)
class PointStyle:
    """How a value of p, or a method other than pWD and AdamW, appears in Figures 2 and 3.

    Attributes:
        label: its name in a legend.
        tick: its name on an axis.
        p: the norm, or None for another method, which gets no line.
        line: whether another method's points are joined all the same: runs to target sparsities.
    """

    label: str
    tick: str
    color: str
    marker: str
    size: float
    p: float | None = None
    line: bool = False

    def artist(self, size: float | None = None) -> dict[str, Any]:
        """Keyword arguments for ``Axes.plot`` and ``Line2D``."""
        edge = self.color if self.marker == "x" else "white" if self.p is not None else "black"
        return {
            "color": self.color,
            "linestyle": "none" if self.p is None and not self.line else "-",
            "marker": self.marker,
            "markersize": size or self.size,
            "markeredgecolor": edge,
            "markeredgewidth": 1.4 if self.marker == "x" else 0.5,
        }


_KNOWN_METHODS = {
    "magnitude": PointStyle("IMP", "IMP", "#1a9850", "x", 5.5),
    "magnitude_global": PointStyle("IMP, all layers together", "IMP all", "#a6d96a", "x", 5.5),
    "oto": PointStyle("OTO", "OTO", "#d500f9", "*", 9.0),
    "pwd_target": PointStyle("pWD to a target", "target", "#111111", "8", 5.0, line=True),
    "exact_target": PointStyle("exact to a target", "exact target", "#e8630a", "H", 5.0, line=True),
}
# How readers know the others; a method that is not listed keeps its own name.
_LABELS = {
    "pwd": "pWD",
    "adamw": "AdamW",
    "sgd": "SGD",
    "l1": "L1 proximal",
    "proximal": "Lp proximal",
    "coupled": "Lp in the loss",
    "dwf": "DWF",
    "rewa": "ReWA",
}
_OTHER_COLORS = ("#8e44ad", "#009e8e", "#e0559b", "#7a8500", "#5c6bc0", "#8b0000", "#a1887f")
_OTHER_MARKERS = ("^", "P", "X", "h", ">", "p", "<", "d")


def p_style(p: float) -> PointStyle:
    """A norm's style, the same in every figure: blue circles below 1, brown squares above."""
    if p == 1:
        return PointStyle("p = 1", "1", _AT_ONE, "D", 5.0, p)
    color = to_hex(_BELOW_ONE(p) if p < 1 else _ABOVE_ONE(min(p, 2.0) - 1.0))
    return PointStyle(f"p = {p:g}", f"{p:g}", color, "o" if p < 1 else "s", 5.5, p)


def method_styles(methods: Iterable[str]) -> dict[str, PointStyle]:
    """A style for each method that is neither pWD nor AdamW, by name.

    One that the paper does not have gets a marker and a colour of its own.
    """
    names = sorted(set(methods) - {"pwd", "adamw"})
    unknown = [name for name in names if name not in _KNOWN_METHODS]
    looks = zip(cycle(_OTHER_COLORS), cycle(_OTHER_MARKERS), strict=False)
    new = {
        name: PointStyle(method_label(name), method_label(name), color, marker, 5.5)
        for name, (color, marker) in zip(unknown, looks, strict=False)
    }
    return {name: _KNOWN_METHODS.get(name) or new[name] for name in names}


def method_label(method: str) -> str:
    """A method's name for readers: ``magnitude`` is IMP; one that is not known is left as it is."""
    if method in _KNOWN_METHODS:
        return _KNOWN_METHODS[method].label
    return _LABELS.get(method, method)


def accuracy_floor(accuracy: NDArray[np.float64], share: float) -> float:
    """The lowest accuracy that is told apart from others, in percent.

    Collapsed runs, those below a share of the best accuracy, would squash the differences that
    matter, so they do not count.
    """
    return float(accuracy[accuracy >= share * accuracy.max()].min())


def frontier_axes(
    ax: Axes, accuracy: NDArray[np.float64], points: pd.DataFrame, share: float
) -> float:
    """Sets up a panel of accuracy (percent) over sparsity.

    Args:
        ax: the panel.
        accuracy: every accuracy that it is to hold, in percent.
        points: what is drawn, with ``val_accuracy`` and ``sparsity``.
        share: see ``accuracy_floor``.

    Returns:
        The lowest accuracy that lies on it, in percent.
    """
    floor, best = accuracy_floor(accuracy, share), float(accuracy.max())
    margin = max(0.08 * (best - floor), 0.2)
    inside = points.loc[points["val_accuracy"] >= floor, "sparsity"]
    nines_axis(ax, "x", highest=inside.max() if len(inside) else 0.0)
    ax.set_ylim(floor - margin, best + margin)
    ax.set(xlabel="sparsity", ylabel="validation accuracy (%)")
    ax.grid(True)
    return floor


def draw_adamw(ax: Axes, accuracy: float) -> None:
    """Draws AdamW's best accuracy as a dashed line with its value."""
    ax.axhline(accuracy, label="AdamW", zorder=2.5, **ADAMW_LINE)
    ax.annotate(
        f"{accuracy:.1f}%",
        (1, accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        fontsize=6.5,
        color=ADAMW_COLOR,
    )


def nines_axis(ax: Axes, which: Literal["x", "y"], highest: float) -> None:
    """Puts a fraction in [0, 1] on an axis that gives 0-0.9 and 0.9-0.99 the same room.

    Args:
        ax: the panel.
        which: its axis.
        highest: the largest fraction shown.
    """
    axis = ax.xaxis if which == "x" else ax.yaxis
    limits = (
        1 - 10.0**0.06,
        1 - 10.0 ** -(min(max(float(nines(highest)), 1.0), MOST_NINES) + 0.12),
    )
    set_scale = ax.set_xscale if which == "x" else ax.set_yscale
    set_scale("function", functions=(nines, lambda y: 1 - 10.0 ** -np.asarray(y)))
    ax.set(**{f"{which}lim": limits})
    decades = np.arange(1, int(MOST_NINES))
    minor = [0.1 * k for k in range(1, 9)]
    minor += [1 - k * 10.0 ** -(n + 1) for n in decades for k in range(2, 10)]
    major = [0.0, 0.5, *(1 - 10.0**-decades)]
    if nines(highest) < 2.4:  # else their labels would overlap
        major += [0.8, 0.95]
    axis.set_major_locator(FixedLocator(major))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))
    axis.set_minor_locator(FixedLocator(minor))
    axis.set_minor_formatter(NullFormatter())


def finish(fig: Figure, note: str) -> None:
    """Writes a note in small type at the bottom, keeps the panels clear of it, and lays them out.

    The layout is then fixed: it takes as long as the drawing, and need not be found again for each
    format that a figure is written in.
    """
    characters = 160
    text = fig.text(0.01, 0.01, note, fontsize=NOTE_POINTS, color="#555555", va="bottom")
    text.set_text(textwrap.fill(note, characters))
    while text.get_window_extent().x1 > 0.99 * fig.bbox.width and characters > 20:
        characters -= 5
        text.set_text(textwrap.fill(note, characters))
    top = text.get_window_extent().y1 / fig.bbox.height + 0.01
    if fig.axes:
        layout = ConstrainedLayoutEngine(rect=(0, top, 1, 1 - top))
        fig.set_layout_engine(layout)
        layout.execute(fig)
        fig.set_layout_engine("none")


@styled
def save(fig: Figure, path: Path) -> None:
    """Writes a figure as its suffix says, PNG or PDF: atomically, and the same bytes each time."""
    # Dates and versions in the file would make a redrawn figure differ from a committed one.
    metadata = (
        {"Software": None}
        if path.suffix == ".png"
        else {"CreationDate": None, "Creator": None, "Producer": None}
    )
    with atomic_write(path) as file:
        fig.savefig(file, format=path.suffix[1:], metadata=metadata)
