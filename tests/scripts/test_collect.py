from __future__ import annotations

import shutil

import pytest

from pnorm_decay import records
from pnorm_decay.records import COLUMNS

COLLECT = "scripts/collect.py"


@pytest.fixture
def places(tmp_path):
    return ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]


def finish(tmp_path, scale, run_id, **values):
    folder = tmp_path / "runs" / scale / "digits" / run_id
    folder.mkdir(parents=True)
    row = dict.fromkeys(COLUMNS) | {"run_id": run_id, "method": "pwd", "status": "finished"}
    row |= values
    records.write_result(folder, {"record": row})
    return folder


def rates(tmp_path, scale):
    frame = records.read(tmp_path / "results" / scale / "digits.csv")
    return dict(zip(frame["run_id"], frame["lr"], strict=True))


def ids(tmp_path, scale):
    return list(records.read(tmp_path / "results" / scale / "digits.csv")["run_id"])


@pytest.mark.parametrize("scale", ["demo", "cpu"])
def test_what_is_recorded_stays_unless_it_is_told_otherwise(run_program, places, tmp_path, scale):
    for run_id in ("first", "second"):
        finish(tmp_path, scale, run_id, lr=1.0)
    assert run_program(COLLECT, *places).code == 0
    shutil.rmtree(tmp_path / "runs" / scale / "digits" / "first")
    shutil.rmtree(tmp_path / "runs" / scale / "digits" / "second")
    for run_id in ("second", "third"):
        finish(tmp_path, scale, run_id, lr=2.0)

    added = run_program(COLLECT, *places)
    assert rates(tmp_path, scale) == {"first": 1.0, "second": 1.0, "third": 2.0}
    assert "1 are recorded already and stay as they were" in added.out
    assert run_program(COLLECT, *places, "--replace").code == 0
    assert rates(tmp_path, scale) == {"first": 1.0, "second": 2.0, "third": 2.0}
    anew = run_program(COLLECT, *places, "--anew")
    assert rates(tmp_path, scale) == {"second": 2.0, "third": 2.0}
    assert "1 recorded runs are not in" in anew.out
    assert run_program(COLLECT, *places, "--anew", "--replace").code == 2


def test_one_scale_alone(run_program, places, tmp_path):
    finish(tmp_path, "demo", "a")
    finish(tmp_path, "cpu", "b")
    assert run_program(COLLECT, *places, "--scale", "cpu").code == 0
    assert ids(tmp_path, "cpu") == ["b"]
    assert not (tmp_path / "results" / "demo").exists()


def test_nothing_to_collect_is_said(run_program, places, tmp_path):
    (tmp_path / "runs").mkdir()
    done = run_program(COLLECT, *places)
    assert done.code == 0
    assert "no finished runs" in done.out


def test_a_scale_that_is_not_there_is_an_error(run_program, places, tmp_path):
    (tmp_path / "runs").mkdir()
    done = run_program("scripts/collect.py", *places, "--scale", "dmo")
    assert done.code == 2
    assert "error: --scale dmo: there is no " in done.out


def test_a_folder_that_is_not_there_is_an_error(run_program):
    done = run_program(COLLECT, "--runs", "nowhere")
    assert done.code == 2
    assert "error: there is no folder nowhere" in done.out


def damage(folder, how):
    path = folder / "result.json"
    if how == "copied":
        shutil.copytree(folder, folder.with_name("a_copy"))
        return "a_copy"
    if how == "list":
        path.write_text(path.read_text().replace('"seed": null', '"seed": [0, 1]'))
    elif how == "text":
        path.write_text(path.read_text().replace('"lr": null', '"lr": "0.5"'))
    else:
        path.write_text(how)
    return str(path)


@pytest.mark.parametrize("how", ["", "{", "[]", '{"record": {}}', "list", "text", "copied"])
def test_broken_results_are_named_and_the_others_recorded(run_program, places, tmp_path, how):
    named = damage(finish(tmp_path, "demo", "a"), how)
    finish(tmp_path, "demo", "b")
    anew = run_program(COLLECT, *places, "--anew")
    assert anew.code == 2
    assert "nothing is written" in anew.out
    assert not (tmp_path / "results").exists()
    done = run_program(COLLECT, *places)
    assert done.code == 2
    assert named in done.out
    assert len([line for line in done.out.splitlines() if line.startswith("error: ")]) == 1
    assert ids(tmp_path, "demo") == (["a", "b"] if how == "copied" else ["b"])


def sparse_run(tmp_path, run_id, p, sparsity, accuracy, **others):
    folder = finish(tmp_path, "cpu", run_id)
    row = {"run_id": run_id, "method": "pwd", "status": "finished", "p": p, "sparsity": sparsity}
    row = dict.fromkeys(COLUMNS) | row | {"val_accuracy": accuracy} | others
    records.write_result(folder, {"record": row})
    (folder / "weights.csv").write_text("step,sparsity/fc\n10,0.5\n")
    return folder


def test_the_weights_of_the_best_sparse_run_of_each_p_are_kept(run_program, places, tmp_path):
    sparse_run(tmp_path, "a", 0.5, 0.5, 99.0)
    sparse_run(tmp_path, "b", 0.5, 0.95, 80.0)
    elsewhere = sparse_run(tmp_path, "c", 0.5, 0.92, 85.0)
    sparse_run(tmp_path, "d", 1.0, 0.92, 90.0)
    sparse_run(tmp_path, "e", 1.0, 0.95, 99.0, overrides="model.width=48")
    sparse_run(tmp_path, "f", 1.0, 0.95, 99.0, method="sgd_pwd")
    kept = tmp_path / "results" / "cpu" / "weights" / "digits.csv"
    expected = "run_id,step,sparsity/fc\nd,10,0.5\nc,10,0.5\n"
    assert run_program(COLLECT, *places).code == 0
    assert kept.read_text() == expected
    shutil.rmtree(elsewhere)  # the next machine does not have it
    assert run_program(COLLECT, *places).code == 0
    assert kept.read_text() == expected


def with_curve(tmp_path, run_id, *accuracies, recorded=None, header="step,val_accuracy"):
    folder = finish(
        tmp_path, "cpu", run_id, val_accuracy=accuracies[-1] if recorded is None else recorded
    )
    lines = [f"{10 * (n + 1)},{accuracy}" for n, accuracy in enumerate(accuracies)]
    (folder / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_learning_curves_are_kept_by_run(run_program, places, tmp_path):
    gone = with_curve(tmp_path, "b", 10.0, 20.5)
    path = tmp_path / "results" / "cpu" / "curves" / "digits.csv.gz"
    assert run_program(COLLECT, *places).code == 0
    shutil.rmtree(gone)  # the next machine does not have it
    with_curve(tmp_path, "c", 10.0, 30.0, recorded=31.0)  # another doing of it is recorded
    with_curve(tmp_path, "a", 40.0, header="lr,val_accuracy")
    (finish(tmp_path, "cpu", "d") / "metrics.csv").write_text("step,val_accuracy\n")
    finish(tmp_path, "cpu", "e", val_accuracy=1.0)
    (tmp_path / "runs" / "cpu" / "digits" / "e" / "metrics.csv").write_text("step\n10\n")
    done = run_program(COLLECT, *places)
    assert "learning curves of 2 of them" in done.out
    assert "2 curves do not end as recorded and are left out: c, e" in done.out
    curves = records.read_curves(path)
    assert list(curves["run_id"]) == ["a", "b", "b"]
    assert list(curves["val_accuracy"]) == [40.0, 10.0, 20.5]
    assert curves["step"].isna().tolist() == [True, False, False]
    content, written = path.read_bytes(), path.stat().st_mtime_ns
    assert run_program(COLLECT, *places).code == 0
    assert path.stat().st_mtime_ns == written
    path.unlink()
    with_curve(tmp_path, "b", 10.0, 20.5)
    assert run_program(COLLECT, *places).code == 0
    assert path.read_bytes() == content  # whatever the time and the order

    shutil.rmtree(tmp_path / "runs" / "cpu" / "digits" / "a")
    assert run_program(COLLECT, *places, "--anew").code == 0
    assert set(records.read_curves(path)["run_id"]) == {"b"}
    path.write_bytes(content[:-9])
    damaged = run_program(COLLECT, *places)
    assert damaged.code == 2
    assert f"error: {path} is cut off or damaged" in damaged.out
