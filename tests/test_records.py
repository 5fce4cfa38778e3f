from __future__ import annotations

import csv
import os

import pandas as pd
import pytest

from conftest import REPOSITORY
from figures.made_up import frame, run
from pnorm_decay import records
from pnorm_decay.records import COLUMNS, RecordError


def record(run_id: str, **values: object) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS)
    row |= {"run_id": run_id, "method": "pwd", "p": 0.5, "seed": 0, "status": "finished"}
    return row | values


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "demo" / "x.csv"
    written = records.write(path, pd.DataFrame([record("b", val_accuracy=91.25), record("a")]))
    pd.testing.assert_frame_equal(records.read(path), written)
    assert list(written["run_id"]) == ["a", "b"]
    assert written["val_accuracy"].isna().tolist() == [True, False]


def test_a_new_row_replaces_an_old_one_where_that_is_asked_for(tmp_path):
    path = tmp_path / "x.csv"
    records.write(path, pd.DataFrame([record("a", lr=1.0), record("b", lr=2.0)]))
    frame = records.write(path, pd.DataFrame([record("b", lr=4.0)]))
    assert dict(zip(frame["run_id"], frame["lr"], strict=True)) == {"a": 1.0, "b": 2.0}
    frame = records.write(path, pd.DataFrame([record("b", lr=3.0)]), replace=True)
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
    with pytest.raises(RecordError, match=r"wrong\.csv, line 2: lr=much: must be a number"):
        records.read(tmp_path / "wrong.csv")
    (tmp_path / "result.json").write_text('{"record": ')
    with pytest.raises(RecordError, match="not valid JSON"):
        records.read_result(tmp_path)
    with pytest.raises(RecordError, match="lacks"):
        records.write_result(tmp_path, {"record": {"run_id": "a"}})


def with_line(number, line):
    """A results file of two runs with another line in place of one of its lines."""

    def change(text: str) -> bytes:
        lines = text.splitlines()
        lines[number - 1 : number] = [line]
        return ("\n".join(lines) + "\n").encode()

    return change


def test_a_failed_row_is_replaced_by_whatever_comes(tmp_path):
    path = tmp_path / "x.csv"
    records.write(path, pd.DataFrame([record("a", status="failed"), record("b", status="failed")]))
    again = pd.DataFrame([record("a", status="finished"), record("b", status="failed", lr=1.0)])
    frame = records.write(path, again)
    assert frame["status"].tolist() == ["finished", "failed"]


def test_runs_of_the_same_overrides_are_comparable():
    rows = [run(run_id="a"), run(run_id="b") | {"overrides": "model.n_embd=48"}]
    rows.append(run(run_id="c") | {"overrides": "model.n_embd=48"})
    assert records.are_comparable(frame(rows)).tolist() == [True, False, False]
    others = frame([*rows[1:], run() | {"overrides": "trainer.steps=20"}])
    assert records.are_comparable(others).tolist() == [True, True, False]
    own_diverged = frame([run(accuracy=None), rows[1], run(accuracy=None) | {"overrides": "x=1"}])
    assert records.are_comparable(own_diverged).tolist() == [False, True, False]


def with_value(name, value):
    def change(text: str) -> bytes:
        rows = list(csv.DictReader(text.splitlines()))
        rows[1][name] = value
        return pd.DataFrame(rows).to_csv(index=False).encode()

    return change


def conflict(text: str) -> bytes:
    header, first, second = text.splitlines()
    return "\n".join([header, "<<<<<<< HEAD", first, "=======", second, ">>>>>>> b", ""]).encode()


# What is done to a results file, and what the one line says of it.
BROKEN = {
    "a merge conflict": (conflict, f"line 2: 1 values, but the table has {len(COLUMNS)} columns"),
    "a cut row": (lambda text: text[: text.rindex(",9") + 2].encode(), "line 3: "),
    "a cut last value": (lambda text: text[:-2].encode(), "line 3: it ends within the line"),
    "no run": (with_value("run_id", ""), "line 3: there is no run_id"),
    "no method": (with_value("method", ""), "line 3: there is no method"),
    "no status": (with_value("status", ""), "line 3: there is no status"),
    "another status": (with_value("status", "done"), "line 3: status=done: must be one of finish"),
    "accuracy of inf": (with_value("val_accuracy", "inf"), "line 3: val_accuracy=inf: must be a"),
    "accuracy of 101": (with_value("val_accuracy", "101"), "val_accuracy=101: must be a number f"),
    "loss of nan": (with_value("val_loss", "nan"), "line 3: val_loss=nan: must be a number"),
    "sparsity of -1": (with_value("sparsity", "-1"), "line 3: sparsity=-1: must be a number from"),
    "sparsity of 1.5": (
        with_value("sparsity", "1.5"),
        "sparsity=1.5: must be a number from 0 to 1",
    ),
    "half a seed": (with_value("seed", "0.5"), "line 3: seed=0.5: must be a whole number"),
    "no number": (with_value("lr", "much"), "line 3: lr=much: must be a number"),
    "a run twice": (with_value("run_id", "a"), "line 3: run a is in line 2 too"),
    "an open quote": (with_line(3, '"b'), "line 3: "),
    "a column twice": (with_line(1, "run_id,run_id"), "line 1: two columns have one name"),
    "Latin-1": (lambda text: text.replace("pwd", "pwé").encode("latin-1"), "is not UTF-8 text"),
    "UTF-16": (lambda text: text.encode("utf-16"), "is not UTF-8 text"),
    "nothing": (lambda text: b"", "is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_results_file_is_one_line_and_stays_as_it_is(run_program, tmp_path, name):
    change, message = BROKEN[name]
    path = tmp_path / "results" / "cpu" / "digits.csv"
    rows = [record(run_id, val_accuracy=91.5, val_precision="fp32") for run_id in "ab"]
    rows = [row | {"val_accuracy_recalibrated": 91.25, "overrides": "x=1"} for row in rows]
    records.write(path, pd.DataFrame(rows))
    path.write_bytes(change(path.read_text()))
    before = path.read_bytes()
    for other in ("cpu/digits/c", "cpu/aaa/d"):
        folder = tmp_path / "runs" / other
        records.write_result(folder, {"record": record(folder.name)})
    results = ["--results", str(tmp_path / "results")]
    for program in (["collect.py", "--runs", str(tmp_path / "runs")], ["plot.py"], ["tables.py"]):
        done = run_program(f"scripts/{program[0]}", *program[1:], *results)
        said = (done.out + done.err).splitlines()
        assert done.code == 2
        assert len(said) == 1
        assert said[0].startswith(f"error: {path}")
        assert message in said[0]
    assert path.read_bytes() == before
    assert [file for file in (tmp_path / "results").rglob("*") if file.is_file()] == [path]


def odd(value: bytes) -> bytes:
    """A result with a value, the last of its name, that no run can have."""
    return b'{"record": {"run_id": "a", "method": "m", "status": "finished", ' + value + b"}}"


ODD_RESULTS = {
    "a list": b"[]",
    "nothing in it": b"{}",
    "no record": b'{"record": 1}',
    "an empty record": b'{"record": {}}',
    "half": b'{"record": ',
    "Latin-1": '{"record": {"run_id": "é"}}'.encode("latin-1"),
    "infinite": odd(b'"lr": Infinity'),
    "another run's": odd(b'"run_id": "b"'),
    "a number for a text": odd(b'"run_id": 5'),
    "a text for a number": odd(b'"p": "1"'),
    "true": odd(b'"p": true'),
    "many steps": odd(b'"steps": 9e30'),
    "a method of two lines": odd(b'"method": "m\\nn"'),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", ODD_RESULTS)
def test_an_odd_result_is_one_line(run_program, tmp_path, name):
    path = tmp_path / "runs" / "cpu" / "digits" / "a" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(ODD_RESULTS[name])
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    done = run_program("scripts/collect.py", *places)
    assert done.code == 2
    assert (done.out + done.err).startswith(f"error: {path.parent}")
    assert len((done.out + done.err).splitlines()) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to itself"])
def test_what_never_ends_is_one_line(run_program, tmp_path, kind):
    folder = tmp_path / "runs" / "cpu" / "digits" / "a"
    records.write_result(folder, {"record": record("a")})
    result, table = folder / "result.json", tmp_path / "results" / "cpu" / "digits.csv"
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    table.parent.mkdir(parents=True)
    for path in (table, result):
        path.unlink(missing_ok=True)
        if kind == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if kind == "a device" else path)
        for program in (["collect.py", *places], ["plot.py", *places[2:]]):
            done = run_program(f"scripts/{program[0]}", *program[1:])
            assert done.code == 2
            assert (done.out + done.err).startswith(f"error: cannot read {path}: ")
            assert len((done.out + done.err).splitlines()) == 1
            if path == result:
                break  # which figures do not look at
        if path == table:
            table.unlink()
            table.parent.rmdir()


def test_columns_that_somebody_added_stay(tmp_path):
    path = tmp_path / "x.csv"
    records.write(path, pd.DataFrame([record("a"), record("b")]))
    lines = path.read_text().splitlines()
    noted = [f"{line},{note}" for line, note in zip(lines, ("note", "mine", ""), strict=True)]
    path.write_text("\n".join(noted) + "\n")
    records.write(path, pd.DataFrame([record("a", lr=1.0), record("c")]), replace=True)
    frame = records.read(path)
    assert dict(zip(frame["run_id"], frame["note"].fillna(""), strict=True)) == {
        "a": "mine",
        "b": "",
        "c": "",
    }
    assert frame.loc[frame["run_id"] == "a", "lr"].item() == 1.0


LEAST = {"resnet18_cifar10.csv.gz": 24}  # its older runs were recorded without curves
CURVES = sorted((REPOSITORY / "results").glob("*/curves/*.csv.gz"))


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.name)
def test_committed_curves_end_in_what_is_recorded(path):
    rows = records.read(path.parents[1] / path.name.removesuffix(".gz")).set_index("run_id")
    ends = records.read_curves(path).groupby("run_id").last()
    recorded = rows.loc[ends.index]
    assert len(ends) >= LEAST.get(path.name, 66)
    for column in ("val_accuracy", "sparsity", "zero_fraction"):
        assert list(ends[column]) == list(recorded[column]), column
    assert list(ends["step"]) == list(recorded["steps"])
    assert path.stat().st_size < 5_000_000
