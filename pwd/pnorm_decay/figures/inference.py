"""What zeros are worth: bytes, and characters and images a second, against sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from pnorm_decay.figures.style import WIDTH, finish, nines_axis, styled
from pnorm_decay.records import RecordError

TYPES: dict[str, Any] = {
    "case": str,
    "threads": int,
    "network": str,
    "form": str,
    "sparsity": float,
    "per_second": float,
    "ratio": float,
    "multiply_adds_left": float,
    "machine": str,
}
FILE_TYPES: dict[str, Any] = {"network": str, "sparsity": float, "format": str, "bytes": float}
RANDOM = "random zeros"
FILES_OF = f"ResNet18, {RANDOM}"
_FORMATS = {
    "torch.save": ":",
    "safetensors + zstd": "--",
    "save_sparse": "-",
    "save_sparse bf16": "-.",
}
_COLORS = ("#0a1f5c", "#1f6fb8", "#b5651d", "#d62728", "#4d4d4d")


def read(path: Path, types: dict[str, Any] = TYPES) -> pd.DataFrame:
    """Reads what ``scripts/bench_inference.py`` wrote, or with FILE_TYPES ``bench_files.py``.

    Raises:
        RecordError: the file cannot be read, lacks a column, or is empty.
    """
    try:
        rows = pd.read_csv(path)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise RecordError(f"cannot read {path}: {error}") from None
    missing = [name for name in types if name not in rows.columns]
    if missing:
        raise RecordError(f"{path} lacks the column {', '.join(missing)}")
    if rows.empty:
        raise RecordError(f"{path} holds no measurements")
    try:
        return rows.astype(types)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path} has a value of the wrong type: {error}") from None


@styled
def inference_figure(rows: pd.DataFrame, files: pd.DataFrame) -> Figure:
    """Draws file size and speed against sparsity, with the fewest threads that were measured.

    Left: the file of a ResNet18 with random zeros. Middle: characters or images a second of each
    case. Right: how many times that is the speed of the fastest dense form, dashed at 1. Lines
    are random zeros, crosses trained networks.

    Args:
        rows: the columns of ``TYPES``, one row a case, number of threads, network and form.
        files: the columns of ``FILE_TYPES``, one row a network and format.
    """
    rows = rows[rows["threads"] == rows["threads"].min()]
    sparse = rows[rows["form"] == "sparse"]
    fig = Figure(figsize=(WIDTH, 2.9))
    sizes, *axes = fig.subplots(1, 3)
    _draw_files(sizes, files[files["network"] == FILES_OF])
    for ax, column in zip(axes, ("per_second", "ratio"), strict=True):
        _draw(ax, sparse, column)
    for case, color in _colors(sparse).items():
        dense = rows[(rows["case"] == case) & (rows["network"] == RANDOM) & (rows["sparsity"] == 0)]
        if len(dense):
            axes[0].axhline(dense["per_second"].max(), color=color, linestyle=":", linewidth=0.9)
    axes[0].set_ylabel("images or characters a second")
    axes[1].axhline(1, color="#bbbbbb", linestyle="--", linewidth=0.8, zorder=1)
    axes[1].set_ylabel("times the fastest dense form")
    fig.legend(handles=axes[0].get_legend_handles_labels()[0], loc="outside upper center", ncols=5)
    threads = int(rows["threads"].iloc[0])
    finish(
        fig,
        "Left: the file of a ResNet18 (width 64) with random zeros. Middle and right: "
        f"{threads} thread{'s' * (threads > 1)} of {rows['machine'].iloc[0]}; lines: random zeros; "
        "crosses: trained networks; dotted: the fastest of torch's dense forms (fp32, bf16, "
        "channels_last, torch.compile). Text by nanoGPT, images of 32 x 32 pixels by ResNet18.",
    )
    return fig


def _colors(rows: pd.DataFrame) -> dict[str, str]:
    return dict(zip(dict.fromkeys(rows["case"]), _COLORS, strict=False))


def _axes_of(ax: Axes, sparsities: pd.Series) -> None:
    nines_axis(ax, "x", highest=sparsities.max())
    ax.set_xlabel("sparsity")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(True)


def _draw_files(ax: Axes, files: pd.DataFrame) -> None:
    _axes_of(ax, files["sparsity"])
    for name, line in _FORMATS.items():
        of_format = files[files["format"] == name].sort_values("sparsity")
        ax.plot(of_format["sparsity"], of_format["bytes"] / 1e6, line, color="black", label=name)
    ax.set_ylim(bottom=files["bytes"].min() / 1e6 / 6)  # room for the legend
    ax.legend(loc="lower left", handlelength=1.8)
    ax.set_ylabel("megabytes")


def _draw(ax: Axes, sparse: pd.DataFrame, column: str) -> None:
    _axes_of(ax, sparse["sparsity"])
    for case, color in _colors(sparse).items():
        of_case = sparse[sparse["case"] == case]
        line = of_case[of_case["network"] == RANDOM].sort_values("sparsity")
        ax.plot(line["sparsity"], line[column], "o-", color=color, markersize=3.5, label=case)
        trained = of_case[of_case["network"] != RANDOM]
        ax.plot(trained["sparsity"], trained[column], "x", color=color, markersize=4)
