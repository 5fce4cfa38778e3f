"""Figure 1: one weight under three ways of applying the p norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pnorm_decay.figures.style import WIDTH, finish, styled
from pnorm_decay.records import RecordError, read_numbers

COLUMNS = ["method", "step", "w", "loss", "p", "lr", "every"]

# Smaller weights are drawn here; an exact zero, which has no logarithm, too.
FLOOR = 1e-16

# A weight beyond this has blown up, as it does for a learning rate above 2; its line ends.
CEILING = 1e6

_LINES = {
    "coupled": ("norm in the gradient", ":", "#d95f02"),
    "periodic": ("s refreshed every {every} steps", "--", "#1f6fb8"),
    "pwd": ("s refreshed every step (pWD)", "-", "#0a1f5c"),
}


def read(path: Path) -> pd.DataFrame:
    """Reads what ``experiments/toy.py`` wrote.

    Raises:
        RecordError: the file cannot be read, lacks a column, or is empty.
    """
    curves = read_numbers(path, texts=["method"])
    missing = [name for name in COLUMNS if name not in curves.columns]
    if missing:
        raise RecordError(f"{path} lacks the column {', '.join(missing)}")
    if curves.empty:
        raise RecordError(f"{path} holds no steps")
    return curves


@styled
def toy_figure(curves: pd.DataFrame) -> Figure:
    """Draws Figure 1 of the paper.

    Left: the weight against the step. Right: its size on a logarithmic axis, where a weight that
    was thrown across zero and one that fell to zero cannot be confused.

    Args:
        curves: the columns of ``COLUMNS``, one row a method and step.
    """
    fig = Figure(figsize=(WIDTH, 2.9))
    left, right = fig.subplots(1, 2)
    left.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=1)
    for method, (label, dash, color) in _LINES.items():
        curve = curves[(curves["method"] == method) & (curves["w"].abs() < CEILING)]
        if curve.empty:
            continue
        every = curve["every"].iloc[0]
        text = label.format(every=f"{every:.0f}")
        width = 1.1 if method == "coupled" else 1.5
        left.plot(curve["step"], curve["w"], dash, color=color, linewidth=width, label=text)
        size = np.maximum(curve["w"].abs(), FLOOR)
        right.semilogy(curve["step"], size, dash, color=color, linewidth=width)
    left.set(xlabel="step", ylabel="weight w")
    right.set(xlabel="step", ylabel="|w|", ylim=(FLOOR, None))
    fig.legend(loc="outside upper center", ncols=3, handlelength=2.6)
    p, lr = curves["p"].iloc[0], curves["lr"].iloc[0]
    start = curves["w"].iloc[0]
    finish(
        fig,
        f"Gradient descent on $L=(w-1)^2/2+|w|^p/p$ with p = {p:g}, learning rate {lr:g}, "
        f"from w = {start:g}, in float64. Right: values below {FLOOR:.0e}, exact zeros among them, "
        "are drawn at the lower edge.",
    )
    return fig
