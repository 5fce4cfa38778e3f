from __future__ import annotations

import pandas as pd
import pytest

from figures.made_up import frame, run
from pnorm_decay import records
from pnorm_decay.records import COLUMNS, RecordError


def record(run_id: str, **values: object) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS)
    return row | {"run_id": run_id, "method": "pwd", "p": 0.5, "seed": 0} | values


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "demo" / "x.csv"
    written = records.write(path, pd.DataFrame([record("b", val_accuracy=91.25), record("a")]))
    pd.testing.assert_frame_equal(records.read(path), written)
    assert list(written["run_id"]) == ["a", "b"]
    assert written["val_accuracy"].isna().tolist() == [True, False]


def test_a_new_row_replaces_the_old_one_and_the_others_stay(tmp_path):
    path = tmp_path / "x.csv"
    records.write(path, pd.DataFrame([record("a", lr=1.0), record("b", lr=2.0)]))
    frame = records.write(path, pd.DataFrame([record("b", lr=3.0)]))
    assert dict(zip(frame["run_id"], frame["lr"], strict=True)) == {"a": 1.0, "b": 3.0}
    frame = records.write(path, pd.DataFrame([record("c")]), keep=False)
    assert list(frame["run_id"]) == ["c"]


def test_a_folder_without_result_is_not_complete(tmp_path):
    assert records.read_result(tmp_path) is None
    assert list(records.recorded_runs(tmp_path)) == []


def test_runs_are_found_with_their_scale_and_name(tmp_path):
    folder = tmp_path / "demo" / "digits" / "abc"
    folder.mkdir(parents=True)
    records.write_result(folder, {"record": record("abc")})
    (folder.parent / "cut-off").mkdir()
    ((scale, name, result),) = records.recorded_runs(tmp_path)
    assert (scale, name, result["record"]["run_id"]) == ("demo", "digits", "abc")
    assert [path.name for path in folder.iterdir()] == ["result.json"]


def test_a_failed_run_is_found_until_it_succeeds_and_replaces_no_row(tmp_path):
    folder = tmp_path / "runs" / "demo" / "digits" / "abc"
    records.write_failure(folder, {"record": record("abc", status="failed", reason="X: y")})
    ((_, _, failure),) = records.recorded_runs(tmp_path / "runs")
    assert failure["record"]["reason"] == "X: y"
    assert records.read_result(folder) is None
    failed = pd.DataFrame([failure["record"], record("new", status="failed")])
    path = tmp_path / "x.csv"
    records.write(path, pd.DataFrame([record("abc", status="finished", lr=1.0)]))
    frame = records.write(path, failed)
    assert frame["status"].tolist() == ["finished", "failed"]

    records.write_result(folder, {"record": record("abc", status="finished")})
    ((_, _, result),) = records.recorded_runs(tmp_path / "runs")
    assert result["record"]["status"] == "finished"
    assert [path.name for path in folder.iterdir()] == ["result.json"]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(RecordError, match=r"no\.csv"):
        records.read(tmp_path / "no.csv")
    (tmp_path / "half.csv").write_text("run_id,method\na,pwd\n")
    with pytest.raises(RecordError, match="lacks the column"):
        records.read(tmp_path / "half.csv")
    records.write(tmp_path / "wrong.csv", pd.DataFrame([record("a", lr=1.0)]))
    text = (tmp_path / "wrong.csv").read_text().replace(",1.0,", ",much,")
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(RecordError, match="wrong type"):
        records.read(tmp_path / "wrong.csv")
    (tmp_path / "result.json").write_text('{"record": ')
    with pytest.raises(RecordError, match="not valid JSON"):
        records.read_result(tmp_path)
    with pytest.raises(RecordError, match="lacks"):
        records.write_result(tmp_path, {"record": {"run_id": "a"}})


def settings(*pairs):
    columns = ["val_accuracy_first", "sparsity_first"]
    return pd.DataFrame(pairs, columns=columns).assign(val_accuracy=0.0)


def test_best_is_the_most_accurate_of_those_that_are_sparse_enough():
    of = settings((90.0, 0.1), (80.0, 0.89995), (80.0, 0.95), (70.0, 0.99))
    assert records.best(of).index.tolist() == [0]
    assert records.best(of, at_least=0.9).index.tolist() == [2]  # of two alike the sparser
    assert records.best(of.drop(2), at_least=0.9).index.tolist() == [1]  # 0.9 to rounding
    assert records.best(of, at_least=0.995).empty


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
    assert records.worth_repeating(frame(rows)) == named


def test_worth_repeating_at_targets():
    def told(method, target, accuracy, run_id="other", **others):
        where = {"target_sparsity": target, "sparsity": 0.7}
        return run(method, accuracy=accuracy, run_id=run_id, **where, **others)

    rows = [
        told("pwd_target", 0.5, 93.0, "pwd at 0.5"),
        told("pwd_target", 0.9, 91.0, "pwd at 0.9"),
        told("pwd_target", 0.9, 90.0, lr=1e-2),
        told("pwd_target", 0.9, 99.0, seed=1),
        told("magnitude", 0.9, 80.0),
        told("magnitude_global", 0.9, 81.0, "IMP at 0.9"),
    ]
    chosen = records.worth_repeating(frame(rows[:4]))
    assert chosen == {"pwd at 0.5", "pwd at 0.9"}
    assert records.best_at_target(frame(rows[4:]))["run_id"].tolist() == ["IMP at 0.9"]
    assert "IMP at 0.9" in records.worth_repeating(frame(rows))
