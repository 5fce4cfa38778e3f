"""Recorded runs as the figures and tables want them: by experiment, and averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pnorm_decay import records, selection

SCALES = ("demo", "cpu", "wide", "paper")

# What makes two runs repetitions of each other when only their seeds differ.
SETTING = ["method", "p", "lambda_p", "lr", "target_sparsity", "steps"]

# Sparsities of 1 - 1e-5 and above share one place on the `nines` scale, which would be infinite.
MOST_NINES = 5.0


@dataclass(frozen=True)
class Experiment:
    """All recorded runs of one experiment at one scale.

    Attributes:
        scale: ``demo``, ``cpu``, ``wide`` or ``paper``.
        name: the experiment's, such as ``resnet18_cifar10``.
        runs: one row a run, with the columns of ``pnorm_decay.records.COLUMNS``; only runs that
            can be compared with each other, see ``records.are_comparable``.
        left_out: the other recorded runs of the experiment.
    """

    scale: str
    name: str
    runs: pd.DataFrame
    left_out: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def is_image(self) -> bool:
        return self.name.startswith("resnet")

    @property
    def is_text(self) -> bool:
        return self.name.startswith("nanogpt")

    @property
    def diverged(self) -> pd.DataFrame:
        """The runs that ended without metrics; among them those that failed."""
        return self.runs[~is_finished(self.runs)]

    @property
    def finished(self) -> pd.DataFrame:
        """The runs that have an accuracy and a sparsity."""
        return self.runs[is_finished(self.runs)]

    @property
    def without(self) -> str:
        """Which recorded runs are left out, in a line; "" for none."""
        if self.left_out.empty:
            return ""
        changes = self.left_out["overrides"].fillna("as it stands").value_counts(sort=False)
        each = ", ".join(f"{change} ({_count(n, 'run')})" for change, n in changes.items())
        return f"{self.scale}/{self.name} without {_count(len(self.left_out), 'run')}: {each}"

    @property
    def data(self) -> str:
        """The data set in words; several, if runs differ, joined by ' and '."""
        return " and ".join(sorted(self.runs["data"].dropna().unique()))

    @property
    def note(self) -> str:
        """What a reader must know of these runs to judge a figure of them, in a few sentences."""
        setting = "" if self.scale == "paper" else ", not the paper's setting"
        changed = self.runs["overrides"].dropna().unique()
        setting += f" (with {changed[0]})" if len(changed) and changed[0] else ""
        failed = int((self.runs["status"] == "failed").sum())
        counts = {"diverged": len(self.diverged) - failed, "failed": failed}
        ended = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
        ended = f" ({ended})" if ended else ""
        precision = self.runs["device"].str.extract(r", (bf16|fp32)$")[0].value_counts()
        trained = ", ".join(f"{count} in {name}" for name, count in precision.items())
        trained = f" ({trained})" if len(precision) > 1 else ""
        last = "epoch" if self.is_image else "evaluation"
        seeds = self.runs["seed"].nunique()
        by_seed = ", by its first seed" if seeds > 1 else ""
        return (
            f"{self.name}, {self.scale} scale{setting}. Data: {self.data}. "
            f"{_count(len(self.runs), 'run')}{ended}{trained}, "
            f"{_count(seeds, 'seed')}. "
            f"Accuracy is that of the last {last}; "
            f"the best run is selected on the same validation data{by_seed}."
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_finished(runs: pd.DataFrame) -> pd.Series:
    """Which runs have an accuracy and a sparsity; the others diverged."""
    has_metrics = runs[["val_accuracy", "sparsity"]].notna().all(axis="columns")
    return (runs["status"] == "finished") & has_metrics


def load(path: Path) -> Experiment:
    """Reads ``results/<scale>/<name>.csv``.

    Raises:
        records.RecordError: the file cannot be read, lacks a column, or holds no finished run.
    """
    rows = records.read(path)
    alike = records.are_comparable(rows)
    runs = (rows[alike].reset_index(drop=True), rows[~alike])
    experiment = Experiment(path.parent.name, path.stem, *runs)
    if experiment.finished.empty:
        raise records.RecordError(f"{path} holds no finished run")
    return experiment


def load_all(
    results: Path, scales: Sequence[str]
) -> tuple[list[Experiment], list[records.RecordError]]:
    """Reads every results file of some scales, in the order of the scales and then of the names.

    Returns:
        The experiments that could be read, and what was wrong with the others or, where there is no
        file at all, with the folder.
    """
    experiments, errors = [], []
    paths = [path for scale in scales for path in sorted((results / scale).glob("*.csv"))]
    for path in paths:
        try:
            experiments.append(load(path))
        except records.RecordError as error:
            errors.append(error)
    if not paths:
        places = ", ".join(f"{results / scale}/" for scale in scales)
        errors.append(records.RecordError(f"no recorded runs (*.csv) in {places}"))
    return experiments, errors


def nines(fraction: ArrayLike) -> NDArray[np.float64]:
    """``-log10(1 - fraction)``: 0.9 is 1, 0.99 is 2, 0.999 is 3; at most ``MOST_NINES``."""
    return -np.log10(np.maximum(1 - np.asarray(fraction, dtype=float), 10.0**-MOST_NINES))


def by_p(rows: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    """The rows of each p, by rising p; rows without a p are left out."""
    norms = np.unique(rows["p"].dropna().to_numpy(dtype=float)).tolist()
    return [(p, rows[rows["p"] == p]) for p in norms]


def average_seeds(runs: pd.DataFrame, values: Sequence[str] = ()) -> pd.DataFrame:
    """One row a setting: the mean and standard deviation over its seeds.

    Args:
        runs: finished runs, one row each.
        values: columns to average besides ``val_accuracy`` and ``sparsity``.

    Returns:
        The columns of ``SETTING``; of each value the mean under its name, the sample standard
        deviation under ``<name>_std`` (NaN for one seed) and what the first seed gave under
        ``<name>_first``, for ``selection.best`` to select by; and ``seeds``, their number.
    """
    values = ["val_accuracy", "sparsity", *values]
    # Two runs of one seed differ in something that no column tells: never average them.
    twice = runs.duplicated([*SETTING, "seed"], keep=False)
    setting = runs.groupby(SETTING, dropna=False).ngroup()
    apart = setting.isin(setting[twice])
    own = runs.groupby(SETTING, dropna=False).cumcount().where(apart, 0)
    groups = runs.assign(own=own).sort_values("seed").groupby([*SETTING, "own"], dropna=False)
    means, spreads = groups[values].mean(), groups[values].std().add_suffix("_std")
    first, seeds = groups[values].first().add_suffix("_first"), groups.size().rename("seeds")
    averaged = pd.concat([means, spreads, first, seeds], axis="columns")
    return averaged.reset_index().drop(columns="own")


def best_adamw(settings: pd.DataFrame) -> float | None:
    """The mean accuracy of AdamW's best setting, or None where it was not run.

    Args:
        settings: of ``average_seeds``.
    """
    best = selection.best(settings[settings["method"] == "adamw"])
    return None if best.empty else float(best["val_accuracy"].iloc[0])
