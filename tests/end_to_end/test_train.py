"""`experiments/train.py` from the command line: runs, sweeps, resuming, bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import REPOSITORY, SHORT, read_wandb
from pnorm_decay import records
from pnorm_decay.data import Digits
from pnorm_decay.models import ResNet18
from pnorm_decay.training import run
from pnorm_decay.training.progress import TOTAL

TRAIN = "experiments/train.py"
DIGITS = "experiment=demo/resnet_digits"


@pytest.fixture
def places(tmp_path):
    return [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]


def results(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs").glob("*/*/*/result.json"))


def test_one_run_leaves_a_complete_folder_and_is_not_done_again(run_program, places, tmp_path):
    arguments = [DIGITS, *SHORT, *places, "optimizer.p=0.5", "optimizer.lambda_p=0.03"]
    done = run_program(TRAIN, *arguments)
    assert done.code == 0, done.err
    assert "validation accuracy" in done.err  # the summary table
    (path,) = results(tmp_path)
    result = json.loads(path.read_text())
    record = result["record"]
    assert path.parts[-4:-2] == ("demo", "resnet_digits")
    assert record["run_id"] == path.parent.name
    assert record.keys() == records.COLUMNS.keys()
    assert (record["method"], record["p"], record["lambda_p"]) == ("pwd", 0.5, 0.03)
    assert record["status"] == "finished"
    assert record["steps"] == 6
    assert 0 <= record["val_accuracy"] <= record["best_val_accuracy"] <= 100
    assert 0 <= record["zero_fraction"] <= record["sparsity"] <= 1
    assert result["config"]["optimizer"]["p"] == 0.5
    with (path.parent / "metrics.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["step"] for row in history] == ["3", "6"]
    assert float(history[-1]["val_accuracy"]) == record["val_accuracy"]
    model = torch.load(path.parent / "model.pt", weights_only=True)
    decayed = [tensor for tensor in model.values() if tensor.ndim >= 2]
    assert sum(tensor.numel() for tensor in decayed) == record["params_decayed"]
    assert_is_found_in_wandb(read_wandb(tmp_path / "runs"), record)

    written = path.stat().st_mtime_ns
    again = run_program(TRAIN, *arguments)
    assert again.code == 0
    assert "already complete" in again.err
    assert path.stat().st_mtime_ns == written
    assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 1


def assert_is_found_in_wandb(run, record):
    """By its settings, beside other seeds of the same setting, with the record as its summary."""
    settings = ("method", "p", "lambda_p", "lr", "seed", "target_sparsity", "data", "overrides")
    config, summary = run["config"], run["summary"]
    assert {name: config[name] for name in settings} == {name: record[name] for name in settings}
    assert (config["scale"], config["experiment"]) == ("demo", "resnet_digits")
    assert config["model/width"] == 4
    assert not {"grid", "sweeps", "runs_dir"} & config.keys()
    assert run["name"].startswith("pwd p=0.5 lambda_p=0.03 lr=0.001 seed=0 model.width=4 ")
    assert run["group"] == "demo/resnet_digits " + run["name"].replace("seed=0 ", "")
    assert (run["job_type"], run["tags"]) == ("pwd", ["demo", "resnet_digits", "pwd"])
    layers = {name for name in summary if name.startswith("weights/sparsity/")}
    assert len(layers) == 21
    results = {k: v for k, v in record.items() if k not in config and k != "run_id"}
    assert {k: v for k, v in summary.items() if k not in layers} | {"reason": None} == results
    curves = {"train/loss", "train/lr", "val/accuracy", "val/loss", "weights/sparsity"}
    assert curves | layers <= run["keys"]


def test_the_same_run_gives_the_same_metrics(run_program, tmp_path):
    for folder in ("a", "b"):
        done = run_program(
            TRAIN, DIGITS, *SHORT, f"runs_dir={tmp_path / folder / 'runs'}", "logger=none"
        )
        assert done.code == 0, done.err
    first, second = (json.loads(results(tmp_path / name)[0].read_text()) for name in "ab")
    timing = {"seconds", "finished_at"}
    for key in records.COLUMNS.keys() - timing:
        assert first["record"][key] == second["record"][key], key


def test_the_commit_of_a_record_is_that_of_its_beginning(run_program, places, monkeypatch):
    setup, known = Digits.setup, []

    def look(self, device):
        known.append(run.git_commit.cache_info().currsize)
        setup(self, device)

    monkeypatch.setattr(Digits, "setup", look)
    run.git_commit.cache_clear()
    assert run_program(TRAIN, DIGITS, *SHORT, *places, "logger=none").code == 0
    assert known == [1]


def test_a_text_run(run_program, places, tmp_path):
    done = run_program(
        TRAIN,
        "experiment=demo/nanogpt_pydoc",
        *places,
        "trainer.steps=20",
        "trainer.threads=1",
        "logger=none",
    )
    assert done.code == 0, done.err
    (path,) = results(tmp_path)
    record = json.loads(path.read_text())["record"]
    assert record["data"].startswith("pydoc topics")
    assert record["val_loss"] < 5  # below ln(95): it has learnt something of the frequencies


def test_two_by_two_multirun_on_two_workers_then_records_and_figures(run_program, places, tmp_path):
    sweep = ["-m", DIGITS, *SHORT, *places, "optimizer.p=0.5,1.5", "optimizer.lr=1e-3,1e-2"]
    workers = ["hydra.launcher.n_jobs=2"]
    command = [sys.executable, str(REPOSITORY / TRAIN), *sweep, *workers]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "[4/4, 0:00 left]" in first.stderr
    paths = results(tmp_path)
    assert len(paths) == 4
    written = [path.stat().st_mtime_ns for path in paths]

    second = run_program(TRAIN, *sweep, "hydra/launcher=basic")
    assert second.code == 0, second.err
    assert second.err.count("already complete") == 4
    assert "[3] " in second.err
    assert "left]" not in second.err
    assert [path.stat().st_mtime_ns for path in results(tmp_path)] == written

    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert run_program("scripts/collect.py", *folders).code == 0
    assert run_program("scripts/plot.py", *folders[2:]).code == 0
    assert run_program("scripts/tables.py", *folders[2:]).code == 0
    frame = records.read(tmp_path / "results" / "demo" / "resnet_digits.csv")
    assert sorted(zip(frame["p"], frame["lr"], strict=True)) == [
        (0.5, 1e-3), (0.5, 1e-2), (1.5, 1e-3), (1.5, 1e-2),
    ]  # fmt: skip
    figures = {path.name for path in (tmp_path / "results" / "figures").rglob("*")}
    assert {"figure2.png", "figure2.pdf", "figure4.png"} <= figures
    assert list((tmp_path / "results" / "tables" / "demo").glob("table1*.md"))


def test_a_failing_run_is_reported_and_does_not_stop_the_others(run_program, places, tmp_path):
    sweep = ["-m", DIGITS, *SHORT, *places, "logger=none", "hydra/launcher=basic"]
    done = run_program(TRAIN, *sweep, "optimizer.p=0,0.8")
    assert done.code == 2
    assert "[1] " in done.err.splitlines()[0]
    assert "p=0.0" in done.err.splitlines()[0] or "p=0" in done.err.splitlines()[0]
    assert "failed" in done.err.splitlines()[0]
    assert len(results(tmp_path)) == 1


def test_a_diverging_run_is_recorded_as_such(run_program, places, tmp_path):
    done = run_program(
        TRAIN, DIGITS, *SHORT, *places, "logger=none", "optimizer=sgd_pwd", "optimizer.lr=1e30"
    )
    assert done.code == 0, done.err
    (path,) = results(tmp_path)
    record = json.loads(path.read_text())["record"]
    assert record["status"] == "diverged"
    assert record["val_accuracy"] is None
    assert "diverged" in done.err


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(run_program, places, tmp_path, monkeypatch):
    arguments = [DIGITS, *SHORT, "logger=none", "trainer.checkpoint_minutes=1e-9"]
    whole = run_program(TRAIN, *arguments, f"runs_dir={tmp_path / 'whole' / 'runs'}")
    assert whole.code == 0, whole.err

    given, stops = [], []
    original = Digits.train_batch

    def cut_off(self, step, *rest):
        given.append(step)
        if step == 4 and not stops:
            stops.append(step)
            raise KeyboardInterrupt
        return original(self, step, *rest)

    monkeypatch.setattr(Digits, "train_batch", cut_off)
    stopped = run_program(TRAIN, *arguments, *places)
    assert stopped.code == 130
    assert results(tmp_path) == []
    given.clear()
    resumed = run_program(TRAIN, *arguments, *places)
    assert resumed.code == 0, resumed.err
    # The example, the steps from the checkpoint on, and the batch norms' new statistics.
    assert given == [0, 4, 5, *range(6)]
    (path,) = results(tmp_path)
    expected = json.loads(results(tmp_path / "whole")[0].read_text())["record"]
    record = json.loads(path.read_text())["record"]
    for key in ("val_accuracy", "best_val_accuracy", "val_loss", "train_loss", "sparsity"):
        assert record[key] == expected[key], key
    assert not (path.parent / "checkpoint.pt").exists()


def test_a_record_is_of_fp32_whatever_the_training(run_program, places, tmp_path, monkeypatch):
    """Under bf16, the last evaluation and the one with new statistics are not autocast."""
    seen = []
    forward = ResNet18.forward

    def watched(self, inputs):
        state = (self.training, torch.is_autocast_enabled("cpu"))
        if not seen or seen[-1] != state:
            seen.append(state)
        return forward(self, inputs)

    monkeypatch.setattr(ResNet18, "forward", watched)
    arguments = [DIGITS, *SHORT, *places, "logger=none", "trainer.precision=bf16"]
    done = run_program(TRAIN, *arguments, "trainer.eval_every=3")
    assert done.code == 0, done.err
    training, during, last, statistics = (True, True), (False, True), (False, False), (True, False)
    assert seen == [training, during, training, last, statistics, last]
    record = json.loads(results(tmp_path)[0].read_text())["record"]
    assert record["val_precision"] == "fp32"
    assert record["device"] == "cpu, bf16"
    assert 0 < record["val_accuracy_recalibrated"] <= 100


def test_a_recorded_run_is_not_done_again(run_program, places, tmp_path):
    arguments = [DIGITS, *SHORT, *places, "logger=none", "skip_recorded=true"]
    assert run_program(TRAIN, *arguments).code == 0
    (path,) = results(tmp_path)
    row = json.loads(path.read_text())["record"]
    records.write(tmp_path / "results" / "demo" / "resnet_digits.csv", pd.DataFrame([row]))
    path.unlink()
    again = run_program(TRAIN, *arguments)
    assert again.code == 0
    assert "already complete" in again.err
    assert results(tmp_path) == []


@pytest.mark.slow
def test_repeat_best_repeats_the_best_recorded_runs_alone(
    run_program, places, tmp_path, monkeypatch
):
    monkeypatch.setenv(TOTAL, "4")  # as our launcher tells its jobs
    arguments = ["-m", DIGITS, *SHORT, *places, "logger=none", "optimizer=adamw"]
    arguments.append("hydra/launcher=basic")
    arguments += ["optimizer.lr=1e-3,1e-2", "skip_recorded=true"]
    repeat = [*arguments, "seed=1,2", "repeat_best=true"]
    nothing_yet = run_program(TRAIN, *repeat)
    assert nothing_yet.code == 2
    assert "no recorded runs" in nothing_yet.err
    assert run_program(TRAIN, *arguments).code == 0
    rows = [json.loads(path.read_text())["record"] for path in results(tmp_path)]
    recorded = pd.DataFrame(rows)
    records.write(tmp_path / "results" / "demo" / "resnet_digits.csv", recorded)
    repeated = run_program(TRAIN, *repeat)
    assert repeated.code == 0, repeated.err
    assert "left]" not in repeated.err  # two of the four jobs were skipped
    rows = [json.loads(path.read_text())["record"] for path in results(tmp_path)]
    best = recorded.loc[recorded["val_accuracy"].idxmax(), "lr"]
    assert sorted((row["lr"], row["seed"]) for row in rows if row["seed"]) == [(best, 1), (best, 2)]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimizer.q=1"], "optimizer.q"),
        (["+optimizer.q=1"], "q"),
        (["optimizer.p=0"], "p"),
        (["optimizer.p=nan"], "nan"),
        (["optimizer.lambda_p=-1"], "lambda_p"),
        (["optimizer.lr=-1"], "lr"),
        (["optimizer=nosuch"], "nosuch"),
        (["experiment=demo/nosuch"], "nosuch"),
        (["trainer.steps=5"], "trainer.epochs=8, trainer.steps=5"),
        (["trainer.batch_size=0"], "trainer.batch_size=0"),
        (["trainer.batch_size=100000"], "100000"),
        (["trainer.precision=fp8"], "trainer.precision=fp8"),
        (["trainer.precision=fp16", "trainer.device=cpu"], "trainer.precision=fp16"),
        (["schedule.final_fraction=2"], "schedule.final_fraction"),
        (["logger.mode=loud"], "logger.mode=loud"),
        (["model.width=0"], "width"),
        (["data.crop_padding=-1"], "crop_padding"),
        (["experiment=demo/nanogpt_pydoc", "trainer.steps=null", "trainer.epochs=1"], "epochs"),
        (["experiment=demo/nanogpt_pydoc", "model.n_head=3"], "n_head"),
        (["experiment=cpu/nanogpt_shakespeare", "data.path=no/such/file"], "no/such/file"),
        (["data=cifar10", "data.path=no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_clear_line_before_training(
    run_program, places, tmp_path, overrides, named
):
    done = run_program(TRAIN, *([] if overrides[0].startswith("experiment") else [DIGITS]),
                       *places, *overrides)  # fmt: skip
    assert done.code == 2
    assert "Traceback" not in done.err
    assert named in done.err
    assert done.err.startswith("error:")
    assert len(done.err.strip().splitlines()) == 1
    assert results(tmp_path) == []


def test_no_cuda_is_said(run_program, places):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run_program(TRAIN, DIGITS, *places, "trainer.device=cuda")
    assert done.code == 2
    assert "no CUDA device" in done.err


def test_help_lists_the_groups(run_program):
    done = run_program(TRAIN, "--help")
    assert done.code == 0
    for group in (
        "data",
        "model",
        "optimizer",
        "pruning",
        "schedule",
        "trainer",
        "logger",
        "sweep",
    ):
        assert f"\n{group}: " in done.out
    assert "experiment/paper: " in done.out


@pytest.mark.parametrize(
    ("experiment", "file", "label"),
    [
        ("cpu/nanogpt_shakespeare", "tinyshakespeare.txt", "Tiny Shakespeare"),
    ],
)
def test_real_data(run_program, places, tmp_path, shared_data, experiment, file, label):
    done = run_program(
        TRAIN, f"experiment={experiment}", *places, f"data.path={shared_data / file}",
        f"data.cache_dir={tmp_path / 'data'}", "logger=none",
        "trainer.steps=3", "trainer.threads=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(results(tmp_path)[0].read_text())["record"]
    assert record["data"] == label
