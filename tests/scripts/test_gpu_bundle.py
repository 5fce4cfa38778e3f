"""The folder that is carried to a GPU machine without a network."""

from __future__ import annotations

import ensurepip
import os
import platform
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY

GPU_EXTRA = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]["gpu"]


def make_wheel(folder: Path, name: str) -> None:
    """A wheel of one module."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "ANSWER = 42\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def packed(load, tmp_path):
    """A bundle whose program says what it was given, of one package that is missing here."""
    pips = list((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not pips:
        pytest.skip("this Python brings no wheel of pip")
    module = load("gpu_bundle")
    folder, wheels = tmp_path / "bundle", tmp_path / "wheels"
    (folder / "code" / "scripts").mkdir(parents=True)
    (folder / "data" / "PNORM_CIFAR10").mkdir(parents=True)
    (folder / "data" / "PNORM_CIFAR10" / "images.tar.xz").touch()
    wheels.mkdir()
    make_wheel(wheels, "pnorm_probe")
    module.pack(wheels, folder / "wheels.tar.xz")
    (folder / "requirements.txt").write_text("pnorm_probe\ntorch\n")
    here = f"{sys.version_info.major}.{sys.version_info.minor} {platform.machine()}"
    (folder / "made_for.txt").write_text(here)
    shutil.copy(pips[0], folder)
    shutil.copy(REPOSITORY / "scripts" / "gpu_start.py", folder / "start.py")
    (folder / "code" / "scripts" / "gpu.py").write_text(
        "import os, sys, pnorm_probe\n"
        "print(pnorm_probe.ANSWER, os.environ['PNORM_CIFAR10'], *sys.argv[1:])\n"
    )
    return folder


@pytest.mark.slow
def test_it_brings_what_is_missing_and_starts_the_hour(packed):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PNORM_"))}
    command = [sys.executable, str(packed / "start.py"), "--minutes", "9"]
    first = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    images = packed / "data" / "PNORM_CIFAR10" / "images.tar.xz"
    assert first.stdout.split() == ["42", str(images), "--minutes", "9"]
    assert "taken from the wheels: pnorm_probe==1.0\n" in first.stderr
    again = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert again.stdout == first.stdout
    assert again.stderr == ""


def start(packed):
    return subprocess.run(
        [sys.executable, str(packed / "start.py")], capture_output=True, text=True
    )


def test_a_package_that_the_folder_lacks_ends_it(packed):
    (packed / "requirements.txt").write_text("pnorm_no_such_package\n")
    done = start(packed)
    assert done.returncode == 2
    assert "pnorm_no_such_package" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_for_another_python_says_so(packed):
    (packed / "made_for.txt").write_text("3.99 riscv64\n")
    done = start(packed)
    assert done.returncode == 1
    assert "was packed for Python 3.99 on riscv64, and this is Python 3." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_code_goes_along_with_its_commit(load, monkeypatch, tmp_path):
    module = load("gpu_bundle")
    monkeypatch.setattr(module, "git_commit", lambda: "0123456789+")
    module.copy_code(tmp_path)
    assert (tmp_path / "commit.txt").read_text() == "0123456789+\n"
    for name in ("scripts/gpu.py", "configs/hydra/sweeper/hour.yaml", "pwd/pnorm_decay/decay.py"):
        assert (tmp_path / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert not (tmp_path / "results").exists()


def test_missing_data_are_named(monkeypatch, run_program, tmp_path):
    monkeypatch.setenv("PNORM_CIFAR10", str(tmp_path / "nosuch.tar.xz"))
    done = run_program("scripts/gpu_bundle.py", "--folder", str(tmp_path / "bundle"))
    assert done.code == 2
    assert "nosuch.tar.xz: set PNORM_CIFAR10 or do `make data`" in done.out
    assert not (tmp_path / "bundle").exists()


def test_a_folder_of_something_else_is_left_alone(monkeypatch, run_program, tmp_path):
    for variable in ("PNORM_CIFAR10", "PNORM_SHAKESPEARE"):
        (tmp_path / variable).touch()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    done = run_program("scripts/gpu_bundle.py", "--folder", str(tmp_path))
    assert done.code == 2
    assert "holds something else" in done.out
    assert (tmp_path / "PNORM_CIFAR10").exists()
