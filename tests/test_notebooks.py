"""The notebooks run from top to bottom; that they are kept without output is `make lint`'s."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_draws(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources).execute()
    widgets = notebook.metadata.get("widgets", {}).values()
    states = [model["state"] for page in widgets for model in page["state"].values()]
    plain = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    interactive = [output for state in states for output in state.get("outputs", [])]
    assert not [output for output in plain + interactive if output["output_type"] == "error"]
    assert len(pictures(plain)) >= 2
    if path.stem == "1_why_it_works":  # Figure 1 follows sliders
        assert len(pictures(interactive)) == 1


def pictures(outputs):
    return [output for output in outputs if "image/png" in output.get("data", {})]
