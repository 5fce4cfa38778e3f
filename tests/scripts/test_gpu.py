"""The program for an hour on a GPU, rehearsed on the CPU."""

from __future__ import annotations

import importlib.metadata
import os
import re
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


@pytest.mark.slow
def test_it_is_stopped_in_the_middle_and_goes_on_to_the_end(tmp_path, environment):
    command = [sys.executable, PROGRAM, "--rehearse", "--folder", str(tmp_path), "--workers", "1"]
    out = tmp_path / "out" / "rehearsal"  # beside what may be real
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
    assert f"all {IMAGE_RUNS} are done" in again.stdout
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
    monkeypatch.setitem(module.LIMITS, "training", 0.2)
    one.benchmark("training", FOREVER)
    assert one.state["stages"]["training"]["status"] == "cut off"
    seconds = one.state["stages"]["training"]["seconds"]
    one.benchmark("training", FOREVER)
    assert one.state["stages"]["training"]["seconds"] == seconds


def test_a_stage_that_the_slice_ends_is_gone_on_with(hour):
    one, _ = hour
    one.slice, one.end = 0.2, time.monotonic() + 0.2
    one.benchmark("training", FOREVER)
    assert one.state["stages"]["training"]["status"] == "interrupted"
    one.slice, one.end = 60, time.monotonic() + 60
    one.benchmark("training", ["-c", "pass"])
    assert one.state["stages"]["training"]["status"] == "done"
    one.benchmark("optimizer", ["-c", "raise SystemExit(3)"])
    assert one.state["stages"]["optimizer"]["status"] == "failed with status 3"


def test_a_stage_that_does_not_fit_waits_for_the_next_slice(hour):
    one, _ = hour
    one.slice, one.end = 510, time.monotonic() + 200
    one.benchmark("optimizer", ["-c", "raise SystemExit(3)"])
    assert one.state["stages"]["optimizer"]["status"] == "not begun"


def test_rows_of_a_try_that_came_further_stay(hour):
    one, _ = hour
    output = one.kept / "optimizer.csv"
    write = "import sys; open(sys.argv[-1], 'w').write('model\\n' + 'a\\n' * {})"
    for count in (3, 1):
        one.state["stages"].clear()
        one.benchmark("optimizer", ["-c", f"{write.format(count)}; sys.exit({count % 3})"])
        assert output.read_text() == "model\na\na\na\n"


def test_a_stage_that_fails_does_not_stop_the_others(hour, monkeypatch, capsys):
    one, _ = hour
    monkeypatch.setattr(one, "look_around", lambda: None)
    monkeypatch.setattr(one, "test", lambda: {}["nosuch"])
    monkeypatch.setattr(one, "sweep", lambda: one.say("the next stage"))
    assert one.spend(["tests", "sweeps"]) == 2
    assert "the next stage" in capsys.readouterr().out
    assert "failed: the tests that need CUDA: KeyError" in (one.kept / "report.md").read_text()
    monkeypatch.setattr(one, "test", lambda: None)
    assert one.spend(["tests"]) == 0
    assert "KeyError" not in (one.kept / "report.md").read_text()


def test_what_cannot_be_read_is_set_aside(hour, monkeypatch, capsys):
    one, _ = hour
    monkeypatch.setattr(one, "look_around", lambda: None)
    broken = ("hour.json", "runs.tar.gz", "resnet18_cifar10.csv")
    for name in broken:
        (one.kept / name).write_bytes(b"\x1f\x8b cut off")
    (one.kept / "optimizer.csv").touch()
    broken = (*broken, "optimizer.csv")
    assert one.spend([]) == 0
    said = capsys.readouterr().out
    for name in broken:
        assert f"{name} cannot be read and is now {name}.broken" in said
        assert (one.kept / f"{name}.broken").exists()
    assert "not published now" not in said


def test_a_rehearsal_is_not_taken_for_the_real_thing(load, monkeypatch, tmp_path, hour):
    rehearsed, module = hour
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(module.Hour, "look_around", lambda self: None)
    rehearsed = module.Hour(tmp_path, 60.0, None, rehearsed=True)
    rehearsed.state["stages"]["tests"] = {"status": "done", "seconds": 1.0}
    assert rehearsed.spend([]) == 0
    state = (tmp_path / "gpu" / "hour.json").read_bytes()
    assert not (tmp_path / "out" / "hour.json").exists()
    real = module.Hour(tmp_path / "real", 60.0, None, rehearsed=False)
    assert real.spend([]) == 0  # takes nothing of $OUT/rehearsal
    assert real.state["stages"] == {}
    published = (tmp_path / "out" / "hour.json").read_bytes()
    real = module.Hour(tmp_path, 60.0, None, rehearsed=False)
    with pytest.raises(module.ConfigError, match=r"gpu holds a rehearsal: choose another folder"):
        real.spend([])
    assert (tmp_path / "gpu" / "hour.json").read_bytes() == state
    assert (tmp_path / "out" / "hour.json").read_bytes() == published


def test_a_signal_that_comes_twice_at_once_is_one(hour):
    one, _ = hour
    with subprocess.Popen([sys.executable, *FOREVER], process_group=0) as process:
        one.process = process
        for _ in range(2):
            one.on_signal(signal.SIGTERM, None)
        assert process.poll() is None
        one.asked -= 1  # the second comes later
        one.on_signal(signal.SIGTERM, None)
        assert process.wait() == -signal.SIGKILL


def test_tests_are_done_file_by_file_and_go_on(hour, monkeypatch):
    one, module = hour
    one.rehearsed = False
    monkeypatch.setattr(module, "TESTS", ["test_fails.py", "scripts/test_goes_on.py"])
    asked = []

    def do(program, seconds, *, stop):
        asked.append(program[-1])
        with (one.kept / "log.txt").open("a") as log:
            log.write(
                f"{program[-1]}::test_it {'FAILED' if 'fails' in program[-1] else 'PASSED'} [1%]\n"
            )
        one.stopped = len(asked) == 2
        return None if one.stopped else 1

    monkeypatch.setattr(one, "do", do)
    one.slice, one.end = 400, time.monotonic() + 400
    one.test()
    entry = one.state["stages"]["tests"]
    assert entry["status"] == "interrupted"
    assert entry["files"]["tests/test_fails.py"]["failed"] == ["tests/test_fails.py::test_it"]
    one.stopped = False
    one.test()
    assert asked == ["tests/test_fails.py", *["tests/scripts/test_goes_on.py"] * 2]
    assert entry["status"] == "done"


MARKED = re.compile(r"pytest\.mark\.cuda|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)


def test_all_files_with_tests_for_a_gpu_are_listed(load):
    tests = REPOSITORY / "tests"
    marked = {
        path.relative_to(tests).as_posix()
        for path in tests.rglob("test_*.py")
        if MARKED.search(path.read_text()) and path != Path(__file__)
    }
    assert marked == set(load("gpu_hour").TESTS)
