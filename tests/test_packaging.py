"""The environment is described once: pyproject.toml, requirements.lock, environment.yml agree."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pnorm_decay
from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = (
    "numpy",
    "safetensors",
    "zstandard",
    "omegaconf",
    "hydra",
    "pandas",
    "matplotlib",
    "pydantic",
)
LOCK = (REPOSITORY / "requirements.lock").read_text()


def locked() -> dict[str, list[str]]:
    """Name -> the versions that the lock pins, one a Python version."""
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK, re.MULTILINE):
        pins.setdefault(name.lower().replace("_", "-"), []).append(version)
    return pins


def test_conda_users_get_the_same_environment():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    (python,) = [line for line in conda if line.startswith("python=")]
    version = python.removeprefix("python=")
    assert f"{version}.0" in SpecifierSet(PROJECT["requires-python"])


def test_the_lock_satisfies_every_requirement():
    extras = PROJECT["optional-dependencies"]
    parts = (extras[part] for part in ("experiments", "dev", "docs"))
    wanted = [*PROJECT["dependencies"], *chain.from_iterable(parts)]
    pins = locked()
    for requirement in map(Requirement, wanted):
        versions = pins[requirement.name.lower()]
        assert all(version in requirement.specifier for version in versions), requirement


def test_the_lock_pins_the_pair_that_results_were_made_with():
    assert locked()["torch"] == ["2.14.1"]
    assert locked()["torchvision"] == ["0.29.1"]
    assert "://" not in LOCK
    assert "index" not in LOCK


def test_the_version_is_written_once():
    assert "version" in PROJECT["dynamic"]
    assert importlib.metadata.version("pnorm-decay") == pnorm_decay.__version__
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == pnorm_decay.__version__


def test_the_changelog_tells_of_the_version():
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    heading = re.search(r"^## (.+)$", changes, re.MULTILINE)
    assert re.fullmatch(rf"{pnorm_decay.__version__}, \d{{4}}-\d\d-\d\d", heading[1])


def test_a_wheel_holds_every_file_of_the_package_and_leaves_nothing_behind(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "pwd", source / "pwd", ignore=unwanted)
    files = {path.relative_to(source / "pwd").as_posix() for path in source.glob("pwd/**/*.*")}
    # As `python -m build` does: the source archive, and the wheel from it.
    uv = [Path(sys.executable).with_name("uv"), "build", "--offline", "--no-build-isolation"]
    command = [*uv, "--python", sys.executable, "--out-dir", wheels, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = wheels.glob(f"pnorm_decay-{pnorm_decay.__version__}-py3-none-any.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files
    kinds = {"py.typed", "optim/backends/fused.c", "deploy/sparse.c", "figures/explorer.html"}
    assert {f"pnorm_decay/{name}" for name in kinds} <= held
    assert not (source / "build").exists()


def test_what_users_import_needs_torch_alone():
    hidden = dict.fromkeys(EXTRAS)
    program = f"import sys; sys.modules.update({hidden}); import pnorm_decay.baselines as b, "
    program += "pnorm_decay.deploy as d; b.compact, d.sparse_inference, b.OTO"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_sparse_files_name_what_they_need(monkeypatch):
    monkeypatch.delitem(sys.modules, "pnorm_decay.deploy.sparse_files", raising=False)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError, match=r"save_sparse needs zstandard: pip install 'pno"):
        from pnorm_decay.deploy import save_sparse  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'nosuch'"):
        from pnorm_decay.deploy import nosuch  # noqa: F401


def test_the_folder_pwd_is_no_package():
    assert not (REPOSITORY / "pwd" / "__init__.py").exists()
    standard = importlib.import_module("pwd")
    assert not hasattr(standard, "pnorm_decay")
    assert getattr(standard, "__file__", None) is None


def test_the_optimizer_needs_torch_alone():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


@pytest.mark.parametrize(
    "target", ["setup", "data", "reproduce-figures", "dashboard", "docs", "test"]
)
def test_make_help_names_every_target(target):
    assert re.search(rf"^{target}:.*## \w", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
