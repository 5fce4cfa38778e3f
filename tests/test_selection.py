from __future__ import annotations

import pandas as pd

from figures.made_up import frame, run
from pnorm_decay import selection


def settings(*pairs):
    columns = ["val_accuracy_first", "sparsity_first"]
    return pd.DataFrame(pairs, columns=columns).assign(val_accuracy=0.0)


def test_best_is_the_most_accurate_of_those_that_are_sparse_enough():
    of = settings((90.0, 0.1), (80.0, 0.89995), (80.0, 0.95), (70.0, 0.99))
    assert selection.best(of).index.tolist() == [0]
    assert selection.best(of, at_least=0.9).index.tolist() == [2]  # of two alike the sparser
    assert selection.best(of.drop(2), at_least=0.9).index.tolist() == [1]  # 0.9 to rounding
    assert selection.best(of, at_least=0.995).empty


def test_worth_repeating():
    rows = [
        run("adamw", lr=1e-3, accuracy=94.0, sparsity=0.0, run_id="adamw"),
        run("adamw", lr=1e-2, accuracy=93.0, sparsity=0.0),
        run("adamw", lr=1e-2, accuracy=99.0, sparsity=0.0, seed=1),
        run(p=0.5, accuracy=93.0, sparsity=0.2, run_id="best of 0.5"),
        run(p=0.5, accuracy=91.0, sparsity=0.82, run_id="0.5 at 0.8"),
        run(p=0.5, accuracy=90.0, sparsity=0.92, run_id="0.5 at 0.9"),
        run(p=0.5, accuracy=89.0, sparsity=0.93),
        run(p=0.5, accuracy=70.0, sparsity=0.999, run_id="0.5 at 0.99"),
        run(p=0.5, accuracy=None),
        run(p=1.5, accuracy=95.0, sparsity=0.0, run_id="best of 1.5"),
        run("magnitude", accuracy=92.0, sparsity=0.5, run_id="best of magnitude"),
        run("magnitude", accuracy=80.0, sparsity=0.899999, run_id="magnitude at 0.9"),
        run("l1", accuracy=92.0, sparsity=0.1, run_id="best of l1"),
        run("l1", accuracy=82.0, sparsity=0.95, run_id="l1 at 0.8 and 0.9"),
    ]
    named = {row["run_id"] for row in rows if not row["run_id"].startswith("run")}
    assert selection.worth_repeating(frame(rows)) == named


def test_worth_repeating_at_targets():
    def told(method, target, accuracy, run_id="other", **others):
        where = {"target_sparsity": target, "sparsity": 0.7}
        return run(method, accuracy=accuracy, run_id=run_id, **where, **others)

    rows = [
        told("pwd_target", 0.5, 93.0, "pwd at 0.5"),
        told("pwd_target", 0.9, 91.0, "pwd at 0.9"),
        told("pwd_target", 0.9, 90.0, lr=1e-2),
        told("pwd_target", 0.9, 99.0, seed=1),
        told("pwd_target", 0.99, None),  # diverged, the only one there
        told("magnitude", 0.9, 80.0),
        told("magnitude_global", 0.9, 81.0, "IMP at 0.9"),
    ]
    chosen = selection.worth_repeating(frame(rows[:5]))
    assert chosen == {"pwd at 0.5", "pwd at 0.9"}
    assert selection.best_at_target(frame(rows[5:]))["run_id"].tolist() == ["IMP at 0.9"]
    assert "IMP at 0.9" in selection.worth_repeating(frame(rows))


def test_each_kind_of_run_is_repeated_at_its_own_best():
    wide = run("adamw", accuracy=99.0, run_id="wide") | {"overrides": "model.n_embd=48"}
    rows = [run("adamw", accuracy=90.0, run_id="narrow"), wide]
    assert selection.worth_repeating(frame(rows)) == {"narrow", "wide"}
