"""Table 3: every method at an asked sparsity, after the same number of tries.

A setting is chosen by seed 0 and reported by the other seeds, which have no part in the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtrit  # importing scipy.stats takes half a second more

from pnorm_decay import selection
from pnorm_decay.figures.loading import Experiment
from pnorm_decay.figures.tables import number, page, with_spread

CONTENDERS = list(dict.fromkeys(selection.TOLD.values()))
STEERED = ["pwd_target", "exact_target"]
REFERENCE = "IMP"  # whose accuracy the others' is compared with
TRIES = (1, 2, 4)
CONFIDENCE = 0.95
SETTING = ["method", "p", "lambda_p", "lr", "steps"]


def table3(experiment: Experiment) -> pd.DataFrame:
    """The accuracy of each contender at each target that pWD was steered to.

    Returns:
        One row a target and contender with a run: ``target, contender, settings`` (tried with seed
        0), ``best_of_<k>``: the seed-0 accuracy of the best of k of them, averaged over all
        choices of k (NaN with fewer); of the setting that seed 0 chooses, ``method, p, lr`` and,
        over the other seeds, ``seeds`` (their number), the means ``accuracy``, ``recalibrated``
        (batch-norm statistics estimated anew) and ``sparsity``, the standard deviations
        ``accuracy_std`` and ``recalibrated_std``; ``difference`` of the accuracy to that of
        ``REFERENCE`` by seed, with ``difference_low`` and ``difference_high``, the bounds of
        Student's interval of 95 % (NaN below two seeds). Accuracies are in percent.
    """
    rows = []
    for target, contenders in _contests(experiment.finished):
        reported = {name: _reported(runs) for name, runs in contenders.items()}
        reference = reported.get(REFERENCE)
        for name, runs in contenders.items():
            first = runs[runs["seed"] == 0]
            row: dict[str, Any] = {"target": target, "contender": name, "settings": len(first)}
            row |= {f"best_of_{k}": best_of(first["val_accuracy"], k) for k in TRIES}
            others = reported[name]
            for column in ("method", "p", "lr"):
                row[column] = others[column].iloc[0] if len(others) else None
            row["seeds"] = len(others)
            for column, values in (
                ("accuracy", others["val_accuracy"]),
                ("recalibrated", others["val_accuracy_recalibrated"]),
            ):
                row |= {column: values.mean(), f"{column}_std": values.std()}
            row["sparsity"] = others["sparsity"].mean()
            if reference is not None and name != REFERENCE:
                row |= _paired(others, reference)
            rows.append(row)
    return pd.DataFrame(rows)


def _contests(finished: pd.DataFrame) -> Iterator[tuple[float, dict[str, pd.DataFrame]]]:
    """The runs of each contender at each target that one of them was steered to."""
    contender = finished["method"].map(selection.TOLD)
    for target in sorted(
        finished.loc[finished["method"].isin(STEERED), "target_sparsity"].unique()
    ):
        at_target = finished["target_sparsity"] == target
        runs = {name: finished[at_target & (contender == name)] for name in CONTENDERS}
        yield target, {name: own for name, own in runs.items() if (own["seed"] == 0).any()}


def _reported(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with other seeds of the setting that seed 0 chooses."""
    chosen = selection.best_at_target(runs)[SETTING]
    same = runs.merge(chosen, on=SETTING)
    return same[same["seed"] != 0].sort_values("seed")


def best_of(accuracy: ArrayLike, k: int) -> float:
    """The best of k tries, averaged over all ways to choose k of the tries made.

    This is the unbiased estimate of what k random tries give (Dodge et al. 2019, "Show Your Work",
    without replacement).

    Args:
        accuracy: shape (n,), one value a try.
        k: at least 1.

    Returns:
        The mean; NaN if fewer than k tries were made.
    """
    tries = np.asarray(accuracy, dtype=float)
    best = [max(chosen) for chosen in combinations(tries.tolist(), k)]
    return float(np.mean(best)) if best else float("nan")


def table3_markdown(experiment: Experiment) -> str | None:
    """Table 3 for readers, or None where no run was steered to a target."""
    table = table3(experiment)
    if table.empty:
        return None
    difference = table.reindex(columns=["difference", "difference_low", "difference_high"])
    shown = pd.DataFrame(
        {
            "target": table["target"].map(number),
            "method": table["contender"],
            "settings tried": table["settings"].astype(str),
            **{
                f"best of {k}": table[f"best_of_{k}"].map("{:.2f}".format).replace("nan", "")
                for k in TRIES
            },
            "chosen p": table["p"].map(number),
            "chosen lr": table["lr"].map(number),
            "other seeds": table["seeds"].astype(str),
            "accuracy": with_spread(table, "accuracy"),
            "recalibrated": with_spread(table, "recalibrated"),
            f"ahead of {REFERENCE}, 95 % interval": [
                ""
                if pd.isna(mean)
                else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})".replace(" (+nan to +nan)", "")
                for mean, low, high in difference.itertuples(index=False)
            ],
        }
    )
    if table["recalibrated"].isna().all():
        del shown["recalibrated"]
    title = (
        "Table 3. Accuracy in percent at an asked sparsity. Seed 0 chooses the setting among those "
        "tried, the other seeds give the accuracy. Best of k: of seed 0, over all choices of k"
    )
    return page(title, experiment, shown)


def _paired(runs: pd.DataFrame, reference: pd.DataFrame) -> dict[str, float]:
    """The difference by seed, and the interval that holds its mean with 95 % confidence."""
    pairs = runs.merge(reference, on="seed", suffixes=("", "_reference"))
    difference = (pairs["val_accuracy"] - pairs["val_accuracy_reference"]).to_numpy(dtype=float)
    if len(difference) == 0:
        return {}
    mean, n = float(difference.mean()), len(difference)
    low = high = float("nan")
    if n > 1:
        half = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * difference.std(ddof=1) / n**0.5
        low, high = mean - half, mean + half
    return {"difference": mean, "difference_low": low, "difference_high": high}
