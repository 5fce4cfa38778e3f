from __future__ import annotations

import pandas as pd
import pytest

from figures.made_up import experiment, run
from pnorm_decay.figures.weights import weights_figure
from pnorm_decay.records import RecordError, read_weights


def history(run_id):
    columns = {"run_id": [run_id] * 2, "step": [10, 20], "sparsity/a.weight": [0.1, 0.9]}
    return pd.DataFrame(
        columns | {"log10/-20": [1, 9], "log10/-19.75": [0, 0], "log10/-19.5": [9, 1]}
    )


def test_a_layer_a_row_and_a_column_an_evaluation():
    row = run(sparsity=0.95, accuracy=88.0)
    fig = weights_figure(experiment([row]), history(row["run_id"]))
    left, middle, right = fig.axes[:3]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a"]
    assert middle.collections[0].get_array().ravel().tolist() == [0.9]
    assert left.collections[0].get_array().ravel().tolist() == [0.1, 0.9]
    assert right.get_ylim() == (-20, -19.25)
    note = " ".join(fig.texts[-1].get_text().split())
    assert "accuracy 88.00 % at sparsity 0.9500" in note


def test_a_column_for_the_end_of_each_run_by_rising_p():
    rows = [run(p=0.8), run(p=0.5)]
    histories = [history(row["run_id"]) for row in rows]
    histories[1]["sparsity/a.weight"] = [0.2, 0.7]
    fig = weights_figure(experiment(rows), pd.concat(histories, ignore_index=True))
    left, middle = fig.axes[:2]
    assert left.collections[0].get_array().ravel().tolist() == [0.1, 0.9]  # the first run's
    assert middle.collections[0].get_array().ravel().tolist() == [0.7, 0.9]
    assert [label.get_text() for label in middle.get_xticklabels()] == ["0.5", "0.8"]


def test_a_run_that_is_not_recorded_is_refused():
    with pytest.raises(RecordError, match="no run nobody"):
        weights_figure(experiment([run()]), history("nobody"))


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"cannot read .*x\.csv"):
        read_weights(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecordError, match="lacks the column run_id"):
        read_weights(tmp_path / "x.csv")
