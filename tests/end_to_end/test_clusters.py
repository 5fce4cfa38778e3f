"""The same sweep through the launchers for clusters, on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

SWEEP = [
    "-m",
    "experiment=demo/resnet_digits",
    "model.width=4",
    "trainer.epochs=null",
    "trainer.steps=6",
    "trainer.eval_every=3",
    "trainer.threads=1",
    "logger=none",
    "optimizer.p=0.5,1.5",
]
LAUNCHERS = {
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=600"],
    "ray": [
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ],
}


def accuracies(runs: Path) -> dict[str, float]:
    results = [json.loads(path.read_text()) for path in runs.glob("*/*/*/result.json")]
    return {r["record"]["run_id"]: r["record"]["val_loss"] for r in results}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_on_two_workers_of_a_cluster(launcher, run_program, tmp_path):
    if importlib.util.find_spec(f"hydra_plugins.hydra_{launcher}_launcher") is None:
        pytest.skip(f"needs the extra for {launcher} (make test-ray installs Ray's)")
    program = str(REPOSITORY / "experiments" / "train.py")
    options = [*LAUNCHERS[launcher], f"runs_dir={tmp_path / 'cluster'}"]
    done = subprocess.run(
        [sys.executable, program, *SWEEP, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    options = ["hydra/launcher=basic", f"runs_dir={tmp_path / 'here'}"]
    here = run_program("experiments/train.py", *SWEEP, *options)
    assert here.code == 0, here.err
    assert len(accuracies(tmp_path / "here")) == 2
    assert accuracies(tmp_path / "cluster") == accuracies(tmp_path / "here")
