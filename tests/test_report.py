"""What the report says of the recorded runs is what the CSV files hold."""

from __future__ import annotations

import re
from fractions import Fraction

import pandas as pd
import pytest

from conftest import REPOSITORY
from pnorm_decay.figures.loading import average_seeds, load

REPORT = (REPOSITORY / "docs" / "report.md").read_text()
RECORDED = sorted((REPOSITORY / "results" / "cpu").glob("*.csv"))
ROW = re.compile(r"^\|.*\| (?P<sparsity>[01][\d.]*) \| (?P<accuracy>\d\d\.\d\d( ± \d\.\d\d)?) \|$")


def in_words(setting: pd.Series) -> str:
    spread = "" if setting["seeds"] == 1 else f" ± {setting['val_accuracy_std']:.2f}"
    return f"{setting['val_accuracy']:.2f}{spread}"


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_every_row_of_its_tables_is_a_recorded_setting(path):
    experiment = load(path)
    title = "ResNet18 on CIFAR-10" if experiment.is_image else "nanoGPT on Tiny Shakespeare"
    (section,) = re.findall(rf"^## {title}, cpu scale\n(.*?)^## ", REPORT, re.DOTALL | re.MULTILINE)
    settings = average_seeds(experiment.finished)
    words = settings.apply(in_words, axis="columns")
    rows = [match for line in section.splitlines() if (match := ROW.match(line))]
    assert len(rows) > 10
    for row in rows:
        decimals = len(row["sparsity"].partition(".")[2])
        rounded = settings["sparsity"].map(f"{{:.{decimals}f}}".format)
        recorded = (words == row["accuracy"]) & (rounded == row["sparsity"])
        assert recorded.any(), row[0]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_it_counts_the_recorded_runs(path):
    (state,) = re.findall(r"\*\*State\.\*\*(.*?)\n\n", REPORT, re.DOTALL)
    assert f"{len(load(path).runs)} runs" in " ".join(state.split())


def test_its_table_of_image_targets_has_the_recorded_runs():
    methods = {"pWD": "pwd_target", "exact step": "exact_target"}
    methods |= {"IMP, all layers": "magnitude_global", "IMP, each layer": "magnitude"}
    runs = load(REPOSITORY / "results" / "cpu" / "resnet18_cifar10.csv").finished
    (table,) = re.findall(r"^\| method \| lr \| 0\.8 .*?\n\n", REPORT, re.DOTALL | re.MULTILINE)
    head, _, *rows = (
        [cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line
    )
    assert len(rows) == 12
    for name, lr, *cells in rows:
        kind, _, p = name.partition(", p = ")
        alike = runs[(runs["method"] == methods[kind]) & (runs["lr"] == float(lr))]
        if p:
            alike = alike[(alike["p"] - float(Fraction(p))).abs() < 1e-3]
        for target, cell in zip(head[2:], cells, strict=True):
            found = alike.loc[alike["target_sparsity"] == float(target), "val_accuracy"]
            spread = f" ± {found.std():.2f}" if len(found) > 1 else ""
            assert cell == f"{found.mean():.2f}{spread}", (name, lr, target)
