"""`scripts/dashboard.py`: the workspace names what runs log; no server is asked for anything."""

from __future__ import annotations

import json
import re

import pytest

from conftest import SHORT, read_wandb

PROGRAM = "scripts/dashboard.py"
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # in wandb_workspaces


def named(value):
    """Every text in a JSON value."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in named(part)]
    if isinstance(value, list):
        return [text for part in value for text in named(part)]
    return [value] if isinstance(value, str) else []


def test_the_workspace_names_what_a_run_has_logged(run_program, tmp_path):
    done = run_program("experiments/train.py", *SHORT, f"runs_dir={tmp_path}")
    assert done.code == 0, done.err
    logged = read_wandb(tmp_path)
    done = run_program(PROGRAM, "--json", "--entity", "someone", "--project", "sparse")
    view = json.loads(done.out)
    assert (done.code, view["entity"], view["project"]) == (0, "someone", "sparse")
    texts = named(view)
    settings = {m[1] for text in texts if (m := re.fullmatch(r"config[:.](\w+)(\.value)?", text))}
    results = {text.removeprefix("summary:") for text in texts if text.startswith("summary:")}
    assert {"method", "p", "lambda_p", "lr", "seed"} <= settings <= set(logged["config"])
    assert {"sparsity", "val_accuracy"} <= results <= set(logged["summary"])

    plots = [
        panel
        for section in view["spec"]["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    ]
    kinds = {panel["viewType"] for panel in plots}
    assert kinds == {"Scatter Plot", "Parallel Coordinates Plot", "Run History Line Plot"}
    lines = [panel["config"] for panel in plots if panel["viewType"] == "Run History Line Plot"]
    curves = {metric for line in lines for metric in line.get("metrics", [])}
    assert {"val/accuracy", "weights/sparsity"} <= curves <= logged["keys"]
    (layers,) = (line["metricRegex"] for line in lines if "metricRegex" in line)
    assert {key for key in logged["keys"] if re.search(layers, key)} == {
        key for key in logged["keys"] if key.startswith("weights/sparsity/")
    }
    assert any(re.search(layers, key) for key in logged["keys"])
    assert {line["groupBy"] for line in lines if "groupBy" in line} == {"method.value", "group"}


def test_without_an_account_it_says_so_in_one_line(run_program, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where W&B would look for one
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    done = run_program(PROGRAM)
    assert done.code == 2
    assert done.out.startswith("error: ")
    assert "wandb login" in done.out
    assert len(done.out.splitlines()) == 1
