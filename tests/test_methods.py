"""The accuracies in the tables of "Which method when" are those of recorded runs."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "methods.md").read_text()
TEXT, IMAGES = re.findall(r"^\| lambda_p \| p = .*\n(?:\|.*\n)+", PAGE, flags=re.MULTILINE)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


@pytest.mark.parametrize(
    ("table", "experiment"),
    [(TEXT, "nanogpt_shakespeare"), (IMAGES, "resnet18_cifar10")],
    ids=["nanogpt_shakespeare", "resnet18_cifar10"],
)
def test_its_tables_hold_recorded_runs(table, experiment):
    rows = pd.read_csv(REPOSITORY / "results" / "cpu" / f"{experiment}.csv")
    rows = rows[(rows["method"] == "pwd") & (rows["seed"] == 0) & (rows["lr"] == 1e-2)]
    runs = {(run.p, run.lambda_p): run for run in rows.itertuples()}
    header, _, *lines = table.splitlines()
    for line in lines:
        lambda_p, *values = cells(line)
        for p, value in zip(cells(header)[1:], values, strict=True):
            if value:
                run = runs[float(p.removeprefix("p = ")), float(lambda_p)]
                assert value == f"{run.sparsity:.3f}, {run.val_accuracy:.1f} %"
