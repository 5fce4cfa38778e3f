"""Tables 1 and 2: what each method reached, and which grid it was given."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import pandas as pd

from pnorm_decay import selection
from pnorm_decay.figures.loading import Experiment, average_seeds, by_p, is_finished
from pnorm_decay.figures.style import method_label

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)


def table1(experiment: Experiment) -> pd.DataFrame:
    """The best accuracy of every method and p, and the best at given sparsities.

    Each accuracy is the mean over the seeds of one setting of lambda_p and lr: the best setting
    of all, or of those whose sparsity reaches the bound, as ``selection.best`` selects it: by the
    first seed, on the data that it is reported on, as in the paper.

    Returns:
        One row a method and p: ``method, p, runs, seeds`` (finished ones), ``best_accuracy``,
        ``best_accuracy_std``, ``best_seeds``, ``best_lambda_p``, ``best_lr``, ``best_sparsity``,
        and for each ``s`` of ``SPARSITIES`` ``accuracy_at_<s>`` and ``accuracy_at_<s>_std``;
        accuracies in percent, NaN where no setting reaches ``s`` or there is one seed.
    """
    rows = []
    for (method, p), runs in _by_method_and_p(experiment.finished):
        settings = average_seeds(runs)
        best = _first_row(selection.best(settings))
        row = {
            "method": method,
            "p": p,
            "runs": len(runs),
            "seeds": runs["seed"].nunique(),
            "best_accuracy": best["val_accuracy"],
            "best_accuracy_std": best["val_accuracy_std"],
            "best_seeds": best["seeds"],
            "best_lambda_p": best["lambda_p"],
            "best_lr": best["lr"],
            "best_sparsity": best["sparsity"],
        }
        for bound in SPARSITIES:
            top = _first_row(selection.best(settings, at_least=bound))
            row[f"accuracy_at_{bound:g}"] = top.get("val_accuracy", math.nan)
            row[f"accuracy_at_{bound:g}_std"] = top.get("val_accuracy_std", math.nan)
        rows.append(row)
    return pd.DataFrame(rows)


def _first_row(rows: pd.DataFrame) -> dict[Hashable, Any]:
    return rows.iloc[0].to_dict() if len(rows) else {}


def table2(experiment: Experiment) -> pd.DataFrame:
    """The grid that every method and p was run on.

    Returns:
        One row a method and p: ``method, p``, the values run of ``lambda_p``, ``lr``, ``seeds``
        and ``steps`` (each as text, separated by commas), ``runs`` (diverged ones included),
        ``diverged``, ``data``.
    """
    rows = [
        {
            "method": method,
            "p": p,
            "lambda_p": _values(runs["lambda_p"]),
            "lr": _values(runs["lr"]),
            "seeds": _values(runs["seed"]),
            "steps": _values(runs["steps"]),
            "runs": len(runs),
            "diverged": int((~is_finished(runs)).sum()),
            "data": " and ".join(sorted(runs["data"].dropna().unique())),
        }
        for (method, p), runs in _by_method_and_p(experiment.runs)
    ]
    return pd.DataFrame(rows)


def table1_markdown(experiment: Experiment) -> str:
    """Table 1 for readers: means with the standard deviation over seeds where there are several."""
    table = table1(experiment)
    shown = pd.DataFrame(
        {
            "method": table["method"].map(method_label),
            "p": table["p"].map(number),
            "runs": table["runs"].astype(str),
            "seeds": table["seeds"].astype(str),
            "best accuracy, %": with_spread(table, "best_accuracy"),
            "its λₚ": table["best_lambda_p"].map(number),
            "its lr": table["best_lr"].map(number),
            "its sparsity": table["best_sparsity"].map("{:.4f}".format),
        }
    )
    for bound in SPARSITIES:
        shown[f"at sparsity ≥ {bound:g}"] = with_spread(table, f"accuracy_at_{bound:g}")
    title = (
        "Table 1. Best validation accuracy, and the best at a sparsity of at least s, in percent"
    )
    return page(title, experiment, shown)


def table2_markdown(experiment: Experiment) -> str:
    """Table 2 for readers."""
    table = table2(experiment)
    shown = table.assign(method=table["method"].map(method_label), p=table["p"].map(number)).astype(
        str
    )
    shown = shown.rename(columns={"lambda_p": "λₚ"})
    return page("Table 2. The grid of every method and p", experiment, shown)


def _by_method_and_p(runs: pd.DataFrame) -> list[tuple[tuple[str, float], pd.DataFrame]]:
    """The runs of each method and p: pWD by rising p, then AdamW, then the others by name."""
    order = {"pwd": 0, "adamw": 1}
    methods = sorted(runs["method"].unique(), key=lambda name: (order.get(name, 2), name))
    groups = []
    for method in methods:
        of_method = runs[runs["method"] == method]
        groups += [((method, p), members) for p, members in by_p(of_method)]
        without_p = of_method[of_method["p"].isna()]
        if len(without_p):
            groups.append(((method, math.nan), without_p))
    return groups


def _values(column: pd.Series) -> str:
    return ", ".join(number(value) for value in sorted(column.dropna().unique()))


def number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:g}"


def with_spread(table: pd.DataFrame, name: str) -> list[str]:
    return [
        "" if pd.isna(mean) else f"{mean:.2f}" if pd.isna(std) else f"{mean:.2f} ± {std:.2f}"
        for mean, std in zip(table[name], table[f"{name}_std"], strict=True)
    ]


def page(title: str, experiment: Experiment, shown: pd.DataFrame) -> str:
    """A Markdown page: the title, the table, and the note that belongs to its runs."""
    lines = [
        f"**{title}.**",
        "",
        _line(list(shown.columns)),
        _line(["---"] * len(shown.columns)),
        *(_line(list(row)) for row in shown.itertuples(index=False)),
        "",
        experiment.note,
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
