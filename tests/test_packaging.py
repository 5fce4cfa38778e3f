"""The environment is described once: pyproject.toml, requirements.lock, environment.yml agree."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from itertools import chain

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pnorm_decay
from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
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


def test_the_folder_pwd_is_no_package():
    assert not (REPOSITORY / "pwd" / "__init__.py").exists()
    standard = importlib.import_module("pwd")
    assert not hasattr(standard, "pnorm_decay")
    assert getattr(standard, "__file__", None) is None


def test_the_optimizer_needs_torch_alone():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


def test_all_but_experiments_and_files_works_with_torch_alone():
    others = (
        "hydra",
        "omegaconf",
        "pydantic",
        "pandas",
        "rich",
        "wandb",
        "safetensors",
        "zstandard",
    )
    program = f"""
import sys
sys.modules |= dict.fromkeys({others})  # an import of them fails
import torch
import pnorm_decay.optim, pnorm_decay.sparsity, pnorm_decay.baselines
from pnorm_decay.deploy import compact, sparse_inference
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
torch.nn.init.zeros_(model[0].weight)
assert compact(model, torch.ones(2, 4)).compaction.parameters[1] < 58
try:
    from pnorm_decay.deploy import save_sparse
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "needs zstandard: pip install 'pnorm-decay[deploy]'" in done.stdout


@pytest.mark.parametrize(
    "target", ["setup", "data", "reproduce-figures", "dashboard", "docs", "test"]
)
def test_make_help_names_every_target(target):
    assert re.search(rf"^{target}:.*## \w", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
