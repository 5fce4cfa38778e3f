"""The program for an hour on a GPU, rehearsed on the CPU."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from PIL import Image

from conftest import REPOSITORY
from pnorm_decay import records
from pnorm_decay.data.cifar10 import CLASSES
from pnorm_decay.training.identity import hyperparameters
from pnorm_decay.training.settings import Settings

PROGRAM = str(REPOSITORY / "scripts" / "gpu.py")
LIST = OmegaConf.load(REPOSITORY / "configs" / "hydra" / "sweeper" / "hour.yaml").runs
IMAGE_RUNS = sum("resnet18" in line for line in LIST)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables of a machine with 40 images in place of CIFAR-10, and without the text."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OUT": str(tmp_path / "out"),
        "PNORM_CIFAR10": str(tmp_path / "images"),
        "PNORM_SHAKESPEARE": str(tmp_path / "no such text"),
    }


def test_without_a_gpu_one_line_says_what_it_needs(environment):
    done = subprocess.run(
        [sys.executable, PROGRAM, "--minutes", "9"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "would spend 9 minutes" in line
    assert "needs a CUDA GPU" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes 0: must be positive"),
        (["--minutes", "nan"], "--minutes nan: must be positive"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--stages", "nosuch"], "invalid choice"),
    ],
)
def test_bad_arguments_are_named(load, monkeypatch, capsys, arguments, message):
    gpu = load("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as end:
        gpu.parsed()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named_with_the_way_to_bring_them(load, monkeypatch, capsys):
    gpu = load("gpu")
    assert gpu.missing_packages() == []
    there = importlib.metadata.distribution

    def distribution(name):
        if name in ("hydra-core", "pydantic"):
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("missing here")
    assert "hydra-core, pydantic" in said
    assert "make gpu-bundle" in said
    assert "--no-index --find-links wheels hydra-core pydantic" in said


BLOCKED = ("matplotlib", "sklearn", "scipy", "torchvision", "wandb", "zstandard", "altair")


def test_the_hour_needs_no_package_that_a_gpu_machine_may_lack():
    code = f"""
import sys
sys.path[:0] = {[str(REPOSITORY / "pwd"), str(REPOSITORY / "scripts")]!r}
sys.modules.update(dict.fromkeys({BLOCKED!r}))
import gpu_hour, bench_optimizer, bench_training, pnorm_decay.training.launcher
import pnorm_decay.training.errors, pnorm_decay.baselines, pnorm_decay.data
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_run_of_the_list_is_one_of_the_paper():
    names = set()
    for line in LIST:
        with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
            cfg = compose("train", [*line.split(), "logger=none"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        settings = Settings.from_config(cfg)
        told = hyperparameters(settings)
        names.add((settings.experiment_name, told["method"], told["p"], told["target_sparsity"]))
        assert settings.experiment_name.startswith("paper/")
        assert settings.trainer.epochs == 100 or settings.trainer.steps == 5000
    for experiment in ("paper/resnet18_cifar10", "paper/nanogpt_shakespeare"):
        asked = {("adamw", 2.0, None), ("pwd", 1.5, None)}
        asked |= {("pwd_target", 0.8, target) for target in (0.95, 0.99, 0.995)}
        asked |= {("magnitude", 2.0, target) for target in (0.95, 0.99)}
        assert {(experiment, *what) for what in asked} <= names
    assert names >= {("paper/resnet18_cifar10", "pwd", 0.8, None)}


def test_it_is_stopped_in_the_middle_and_goes_on_to_the_end(tmp_path, environment):
    command = [sys.executable, PROGRAM, "--rehearse", "--folder", str(tmp_path), "--workers", "1"]
    out = tmp_path / "out"
    rows = out / "resnet18_cifar10.csv"
    stopped = subprocess.Popen(
        [*command, "--stages", "hour"], env=environment, stdout=subprocess.PIPE, text=True
    )
    while not rows.exists() and stopped.poll() is None:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate()
    assert stopped.returncode == 130, said
    assert "the same command goes on" in said
    first = records.read(rows).set_index("run_id")
    assert 1 <= len(first) < IMAGE_RUNS
    assert f"({IMAGE_RUNS - len(first)} of {IMAGE_RUNS} runs)" in (out / "report.md").read_text()

    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    every = records.read(rows).set_index("run_id")
    assert (every.loc[first.index, "finished_at"] == first["finished_at"]).all()
    assert len(every) == IMAGE_RUNS + 2  # and the two runs of a sweep
    assert set(every["status"]) == {"finished"}
    files = {path.name for path in out.iterdir()}
    assert len(files) <= 8
    assert files >= {"report.md", "hour.json", "log.txt", "optimizer.csv", "training.csv"}
    report = (out / "report.md").read_text()
    assert "not done" not in report
    assert "its runs are left out: " in report  # the text's
    assert "| AdamW fused, capturable |" in report
    assert sorted(path.name for path in (tmp_path / "gpu").iterdir()) == sorted(files)

    # On a fresh machine, with what came back: nothing is done again.
    elsewhere = {**environment, "OUT": ""}
    (tmp_path / "fresh").mkdir()
    out.rename(tmp_path / "fresh" / "gpu")
    command[command.index(str(tmp_path))] = str(tmp_path / "fresh")
    again = subprocess.run(
        [*command, "--stages", "hour"], env=elsewhere, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already complete" in again.stdout
    brought = records.read(tmp_path / "fresh" / "results" / "paper" / rows.name)
    assert brought.set_index("run_id")["finished_at"].equals(every["finished_at"])
    with tarfile.open(tmp_path / "fresh" / "gpu" / "runs.tar.gz") as archive:
        assert len(archive.getnames()) == 3 * len(every)


@pytest.fixture
def hour(load, monkeypatch, tmp_path):
    """An hour with a minute left, and its module."""
    monkeypatch.delenv("OUT", raising=False)
    module = load("gpu_hour")
    hour = module.Hour(tmp_path, 60.0, None, rehearsed=True)
    hour.kept.mkdir()
    return hour, module


FOREVER = ["-c", "import time\nwhile True: time.sleep(0.01)"]


def test_a_stage_ends_at_its_limit_and_is_not_begun_again(hour, monkeypatch):
    one, module = hour
    monkeypatch.setitem(module.LIMITS, "tests", 0.2)
    one.stage("tests", FOREVER, signal.SIGTERM)
    assert one.state["stages"]["tests"]["status"] == "cut off"
    seconds = one.state["stages"]["tests"]["seconds"]
    one.stage("tests", FOREVER, signal.SIGTERM)
    assert one.state["stages"]["tests"]["seconds"] == seconds


def test_a_stage_that_the_slice_ends_is_gone_on_with(hour):
    one, _ = hour
    one.end = time.monotonic() + 0.2
    one.stage("tests", FOREVER, signal.SIGTERM)
    assert one.state["stages"]["tests"]["status"] == "interrupted"
    one.end = time.monotonic() + 60
    one.stage("tests", ["-c", "pass"], signal.SIGTERM)
    assert one.state["stages"]["tests"]["status"] == "done"
    one.stage("optimizer", ["-c", "raise SystemExit(3)"], signal.SIGTERM)
    assert one.state["stages"]["optimizer"]["status"] == "failed with status 3"


def test_a_long_log_is_cut(hour, monkeypatch):
    one, module = hour
    monkeypatch.setattr(module, "LARGEST", 1000)
    (one.kept / "log.txt").write_text("begin" + "x" * 2000 + "end")
    one.publish()
    log = (one.kept / "log.txt").read_text()
    assert len(log) == 500
    assert log.endswith("end")


def test_what_pytest_says_is_counted(load):
    report = load("gpu_report")
    log = (
        "tests/a.py::test_one PASSED      [ 33%]\n"
        "tests/a.py::test_two[cuda 0] FAILED   [ 66%]\n"
        "tests/b.py::test_three SKIPPED (no second GPU)\n"
        "FAILED tests/a.py::test_two[cuda 0] - assert 0\n"
        "ERROR tests/c.py - ModuleNotFoundError: No module named 'matplotlib'\n"
    )
    found = report.test_results(log)
    assert found["note"] == "1 failed, 1 files that could not be imported, 1 passed, 1 skipped"
    assert found["failed"] == ["tests/a.py::test_two[cuda 0]"]
