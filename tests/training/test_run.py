"""What follows from a run's settings and data."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from conftest import REPOSITORY
from pnorm_decay.training.run import Run
from pnorm_decay.training.settings import Settings


@dataclass
class Archive:
    """A data set as far as a run's id asks for it."""

    label: str
    identity: str


@pytest.fixture(scope="module")
def settings():
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        cfg = compose("train", ["experiment_name=demo/x", "sweep_name=none"])
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return Settings.from_config(cfg)


def test_two_incomplete_archives_of_one_label_are_two_runs(settings):
    label = "CIFAR-10, 80 of 60,000 images"
    first, second = (Run(settings, Archive(label, f"{label}, sha256 {n}")) for n in "ab")
    assert first.id != second.id
    assert first.folder != second.folder
    assert first.columns["data"] == second.columns["data"] == label


def test_the_recorded_config_gives_the_same_settings(settings):
    recorded = json.loads(json.dumps(settings.config))
    assert Settings.from_config(recorded) == settings
    assert Settings.from_config(recorded).config == recorded


def test_a_recorded_config_with_an_older_name_is_understood(settings):
    older = settings.config
    older["pruning"]["_target_"] = "pnorm_decay.baselines.Pruning"
    assert Settings.from_config(older) == settings


def test_a_run_does_without_what_takes_long_to_import():
    code = """
import sys
import pnorm_decay.training.launcher
from pnorm_decay.data import Digits
Digits()._load()
print(sorted({"pandas", "sklearn", "matplotlib", "wandb"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
