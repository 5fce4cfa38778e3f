from __future__ import annotations

import math

import pytest

from figures.made_up import experiment, run
from pnorm_decay.figures.tables import table1, table1_markdown, table2, table2_markdown


@pytest.fixture
def two_norms():
    """p = 0.5 at three settings, one of them with two seeds; p = 1.5 dense; AdamW; IMP."""
    rows = [
        run(lambda_p=1e-4, accuracy=95, sparsity=0.2),
        run(lambda_p=1e-3, seed=1, accuracy=91, sparsity=0.89),
        run(lambda_p=1e-3, seed=0, accuracy=93, sparsity=0.93),
        run(lambda_p=1e-2, accuracy=80, sparsity=0.99),
        run(lambda_p=1e-1, accuracy=None),
        run(p=1.5, lr=1e-2, accuracy=96, sparsity=0.0),
        run("magnitude", p=2, accuracy=94, sparsity=0.8),
        run("adamw", p=2, lambda_p=0.1, accuracy=94.5, sparsity=0.0),
    ]
    return experiment(rows)


def test_table1_by_hand(two_norms):
    table = table1(two_norms).set_index(["method", "p"])
    assert list(table.index) == [("pwd", 0.5), ("pwd", 1.5), ("adamw", 2.0), ("magnitude", 2.0)]
    row = table.loc["pwd", 0.5]
    assert (row["runs"], row["seeds"]) == (4, 2)
    best = ["best_accuracy", "best_lambda_p", "best_lr", "best_sparsity", "best_seeds"]
    assert row[best].tolist() == [95, 1e-4, 1e-3, 0.2, 1]
    assert math.isnan(row["best_accuracy_std"])
    reached = {s: row[f"accuracy_at_{s:g}"] for s in (0.5, 0.8, 0.9, 0.95, 0.99)}
    assert reached == {0.5: 92, 0.8: 92, 0.9: 92, 0.95: 80, 0.99: 80}  # means 92 at 0.91
    assert row["accuracy_at_0.9_std"] == pytest.approx(2**0.5)
    assert math.isnan(row["accuracy_at_0.99_std"])
    assert math.isnan(table.loc["pwd", 1.5]["accuracy_at_0.5"])
    assert table.loc["magnitude", 2.0]["accuracy_at_0.8"] == 94
    assert math.isnan(table.loc["magnitude", 2.0]["accuracy_at_0.9"])


def test_of_two_equally_accurate_settings_the_sparser_is_the_best():
    rows = [run(lr=lr, accuracy=90, sparsity=s) for lr, s in [(1e-3, 0.3), (1e-2, 0.4)]]
    assert table1(experiment(rows))["best_sparsity"].tolist() == [0.4]


def test_table2_by_hand(two_norms):
    table = table2(two_norms).set_index(["method", "p"])
    row = table.loc["pwd", 0.5]
    assert row["lambda_p"] == "0.0001, 0.001, 0.01, 0.1"
    assert row[["lr", "seeds", "steps"]].tolist() == ["0.001", "0, 1", "100"]
    assert (row["runs"], row["diverged"], row["data"]) == (5, 1, "made-up digits")
    assert table["runs"].sum() == len(two_norms.runs)


def cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table1_markdown(two_norms):
    text = table1_markdown(two_norms)
    header, rule, first, *rest = cells(text)
    assert set(rule) == {"---"}
    assert {len(row) for row in [header, rule, first, *rest]} == {13}
    assert first[:8] == ["pWD", "0.5", "4", "2", "95.00", "0.0001", "0.001", "0.2000"]
    assert first[8:] == ["92.00 ± 1.41", "92.00 ± 1.41", "92.00 ± 1.41", "80.00", "80.00"]
    assert [row[0] for row in rest] == ["pWD", "AdamW", "IMP"]
    assert rest[0][8:] == [""] * 5
    assert two_norms.note in text


def test_table2_markdown(two_norms):
    text = table2_markdown(two_norms)
    assert cells(text)[2][:4] == ["pWD", "0.5", "0.0001, 0.001, 0.01, 0.1", "0.001"]
    assert two_norms.note in text


def test_a_method_without_p_or_lambda_has_blank_cells():
    lone = experiment([run("novel|x", p=None, lambda_p=None, accuracy=70)])
    assert "| novel\\|x |  | 1 |" in table1_markdown(lone)
    assert "| novel\\|x |  |  | 0.001 |" in table2_markdown(lone)


def test_a_method_whose_runs_all_diverged_is_in_table2_alone():
    lone = experiment([run(), run("l1", accuracy=None)])
    assert table1(lone)["method"].tolist() == ["pwd"]
    assert table2(lone).set_index("method")["diverged"].to_dict() == {"pwd": 0, "l1": 1}


def test_a_target_that_is_met_to_one_weight_counts_as_met():
    table = table1(experiment([run("magnitude", sparsity=0.899999, accuracy=70.0)]))
    assert table["accuracy_at_0.9"].tolist() == [70.0]
    assert math.isnan(table["accuracy_at_0.95"].item())
