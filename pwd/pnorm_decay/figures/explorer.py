"""All recorded runs in one HTML file, to choose from, look at and repeat; it needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from pnorm_decay.figures.loading import Experiment, nines
from pnorm_decay.figures.style import method_label

TEMPLATE = Path(__file__).with_name("explorer.html")

# The choices of experiments/train.py that make a method, beside its numbers.
CHOICES = {
    "adamw": "optimizer=adamw",
    "coupled": "optimizer=coupled",
    "dwf": "optimizer=adamw pruning=dwf",
    "exact": "optimizer=exact",
    "exact_target": "optimizer=exact decay_schedule=target_sparsity",
    "l1": "optimizer=l1",
    "magnitude": "optimizer=adamw pruning=magnitude",
    "magnitude_global": "optimizer=adamw pruning=magnitude_global",
    "oto": "optimizer=adamw pruning=oto",
    "proximal": "optimizer=proximal",
    "pwd": "optimizer=pwd",
    "pwd_target": "optimizer=pwd decay_schedule=target_sparsity",
    "rewa": "optimizer=adamw pruning=rewa",
    "sgd": "optimizer=sgd",
    "sgd_pwd": "optimizer=sgd_pwd",
    "spred": "optimizer=adamw pruning=spred",
}
WITH_P = {"coupled", "exact", "exact_target", "proximal", "pwd", "pwd_target", "sgd_pwd"}
# What the page tells of a point: Vega-Lite's fields with their types, and d3's formats.
TOLD = {
    "method:N": "",
    "p:Q": ".4~g",
    "lambda_p:Q": ".4~g",
    "lr:Q": ".4~g",
    "target:Q": ".4~g",
    "seed:Q": "d",
    "sparsity:Q": ".5f",
    "accuracy:Q": ".2f",
    "run:N": "",
}


def command(experiment: str, row: Mapping[Any, Any]) -> str | None:
    """The command that repeats a recorded run.

    Args:
        experiment: its scale and name, such as ``cpu/nanogpt_shakespeare``.
        row: with the columns of ``records.COLUMNS``.

    Returns:
        One line for a shell; None for a method that this version does not know.
    """
    method = row["method"]
    if method not in CHOICES:
        return None
    overrides = row.get("overrides")
    apart = [] if pd.isna(overrides) else str(overrides).split()
    chosen = {word.partition("=")[0] for word in apart}  # another optimizer, for instance
    choices = [word for word in CHOICES[method].split() if word.partition("=")[0] not in chosen]
    words = [f"python experiments/train.py experiment={experiment}", *choices]
    if method in WITH_P:
        words.append(f"optimizer.p={float(row['p'])!r}")
    if not pd.isna(row["lambda_p"]):
        decay = "lambda_p" if method in {*WITH_P, "l1"} else "weight_decay"
        words.append(f"optimizer.{decay}={float(row['lambda_p'])!r}")
    words.append(f"optimizer.lr={float(row['lr'])!r}")
    if not pd.isna(row["target_sparsity"]):
        group = "decay_schedule" if method.endswith("_target") else "pruning"
        words.append(f"{group}.sparsity={float(row['target_sparsity'])!r}")
    words.append(f"seed={row['seed']}")
    # `precision: auto` stands for bf16 in a run's id; the demo experiments name fp32 themselves.
    precision = str(row.get("device", "")).rpartition(", ")[2]
    if precision in ("fp32", "fp16") and not experiment.startswith("demo/"):
        words.append(f"trainer.precision={precision}")
    # A group may lack the key of a value; its choice has no dot.
    words += [f"++{word}" if "." in word.partition("=")[0] else word for word in apart]
    return " ".join(words)


def rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """What the page knows of each run: plain values, None where there is none."""
    found = []
    for experiment in experiments:
        name = f"{experiment.scale}/{experiment.name}"
        finished = experiment.finished.assign(nines=lambda runs: nines(runs["sparsity"]))
        for run in finished.to_dict("records"):
            row = {
                "experiment": name,
                "method": method_label(run["method"]),
                "p": round(run["p"], 4),
                "lambda_p": run["lambda_p"],
                "lr": run["lr"],
                "seed": run["seed"],
                "target": run["target_sparsity"],
                "sparsity": run["sparsity"],
                "nines": run["nines"],
                "accuracy": run["val_accuracy"],
                "loss": run["val_loss"],
                "seconds": run["seconds"],
                "run": run["run_id"],
                "command": command(name, run),
            }
            found.append({k: None if pd.isna(value) else value for k, value in row.items()})
    return found


def charts() -> dict[str, Any]:
    """Accuracy over sparsity beside the plane of lambda_p and lr, as a Vega-Lite specification.

    The runs come later, as the data set ``runs``. What is brushed on the left is coloured on the
    right.
    """
    alt.data_transformers.disable_max_rows()
    brush = alt.selection_interval(name="brush")
    legend = alt.selection_point(name="legend", fields=["method"], bind="legend")
    hover = [alt.Tooltip(field, format=form) for field, form in TOLD.items()]
    runs = alt.Chart(alt.NamedData(name="runs")).mark_point(filled=True, size=45, cursor="pointer")
    sparsities = {0: "0", 0.30103: "0.5", 0.69897: "0.8", 1: "0.9", 1.30103: "0.95", 2: "0.99"}
    sparsities |= {3: "0.999", 4: "0.9999", 5: "1"}
    labels = json.dumps({f"{place:.2f}": label for place, label in sparsities.items()})
    left = (
        runs.encode(
            x=alt.X("nines:Q")
            .title("sparsity")
            .axis(values=list(sparsities), labelExpr=f"({labels})[format(datum.value, '.2f')]"),
            y=alt.Y("accuracy:Q").title("validation accuracy (%)").scale(zero=False),
            color=alt.Color("method:N").scale(scheme="tableau20").title("method (click)"),
            shape=alt.Shape("p:N").title("p"),
            opacity=alt.when(legend).then(alt.value(0.85)).otherwise(alt.value(0.06)),
            tooltip=hover,
        )
        .properties(width=520, height=380)
        .add_params(brush, legend)
    )
    right = (
        runs.transform_filter("datum.lambda_p > 0")
        .encode(
            x=alt.X("lr:Q").scale(type="log").axis(tickCount=4).title("learning rate"),
            y=alt.Y("lambda_p:Q").scale(type="log").axis(tickCount=6).title("lambda_p"),
            color=alt.when(brush).then("method:N").otherwise(alt.value("#dddddd")),
            shape="p:N",
            size=alt.Size("sparsity:Q").scale(range=[20, 160]).title("sparsity"),
            opacity=alt.when(legend).then(alt.value(0.85)).otherwise(alt.value(0.06)),
            tooltip=hover,
        )
        .properties(width=330, height=380)
    )
    return alt.hconcat(left, right).to_dict()


def page(experiments: Sequence[Experiment]) -> str:
    """The whole HTML file, with the libraries that draw it.

    Args:
        experiments: recorded runs; at least one.
    """
    found = rows(experiments)
    # "</script>" inside a string would end the script.
    data, spec = (json.dumps(part).replace("</", "<\\/") for part in (found, charts()))
    counts = ", ".join(f"{e.scale}/{e.name}: {e.data}, {len(e.finished)} runs" for e in experiments)
    text = TEMPLATE.read_text()
    parts = {
        "@COUNTS@": escape(counts),
        "@LIBRARIES@": vl_convert.javascript_bundle(),  # type: ignore[call-arg]
        "@RUNS@": data,
        "@SPEC@": spec,
    }
    for mark, part in parts.items():
        text = text.replace(mark, part, 1)
    return text
