"""Which of the recorded runs are the best, and which of them are worth repeating."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# A target of 0.9 is met to one weight, which may leave 0.899999.
ROUNDING = 1e-4

# Where the best runs are repeated with other seeds, besides the best of all.
REPEATED_AT = (0.8, 0.9, 0.99)

# Methods that are told their sparsity, and as what they compete at a target.
TOLD = {
    "pwd_target": "pWD to a target",
    "exact_target": "exact step to a target",
    "magnitude": "IMP",
    "magnitude_global": "IMP",
}


def best(settings: pd.DataFrame, at_least: float = 0.0) -> pd.DataFrame:
    """The most accurate of some settings, the sparser one if two are alike.

    It is the first seed that decides, so that the seeds repeated at the chosen setting have no part
    in the choice, and that the choice does not change with them.

    Args:
        settings: with the columns ``val_accuracy_first`` and ``sparsity_first``.
        at_least: only settings whose sparsity reaches this, to 1e-4.

    Returns:
        One row; none where no setting is sparse enough.
    """
    sparse = settings[settings["sparsity_first"] >= at_least - ROUNDING]
    order = ["val_accuracy_first", "sparsity_first"]
    return sparse.sort_values(order, ascending=False, kind="stable").head(1)


def best_at_target(rows: pd.DataFrame) -> pd.DataFrame:
    """The most accurate run of seed 0; none if there is none."""
    first = rows[rows["seed"] == 0]
    return first.sort_values("val_accuracy", ascending=False, kind="stable").head(1)


def worth_repeating(rows: pd.DataFrame) -> set[str]:
    """The runs of seed 0 whose settings other seeds are to repeat.

    These are the best of every method, and the best at each sparsity of ``REPEATED_AT``; of pWD
    those of every p. Of the methods that are told their sparsity, they are the best at each target;
    both kinds of magnitude pruning count as one method there.

    Args:
        rows: recorded runs of one experiment, see ``records.COLUMNS``.

    Returns:
        Their run ids.
    """
    done = rows[(rows["status"] == "finished") & (rows["seed"] == 0)]
    done = done.assign(val_accuracy_first=done["val_accuracy"], sparsity_first=done["sparsity"])
    group = done["method"].mask(done["method"] == "pwd", "pwd " + done["p"].astype(str))
    chosen: set[str] = set()
    changed = done["overrides"].fillna("").rename("changed")
    told = done[done["method"].isin(TOLD)]
    for _, runs in told.groupby([told["method"].map(TOLD), "target_sparsity", changed[told.index]]):
        chosen.update(best_at_target(runs)["run_id"])
    for _, runs in done.groupby([group, changed]):
        for bound in (0.0, *REPEATED_AT):
            chosen.update(best(runs, bound)["run_id"])
    return chosen
