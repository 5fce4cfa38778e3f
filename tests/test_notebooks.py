"""The notebooks run from top to bottom, and hold what comes out (`make run-notebooks`)."""

from __future__ import annotations

import nbformat
import pytest
import zmq
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget

from conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.fixture
def _no_reply_is_missed(monkeypatch):
    """Mends what made one cell of 20 with a slider wait for its time-out.

    nbclient waits for the kernel's reply on one socket, and passes the slider's output on by the
    same socket, past ZeroMQ's asyncio layer: when the reply comes in just then, nobody is told.
    Asking the socket what there is makes that layer look.
    """
    send = OutputWidget.send

    def send_and_look(self, *arguments, **options):
        send(self, *arguments, **options)
        self.kernel_client.shell_channel.socket.get(zmq.EVENTS)

    monkeypatch.setattr(OutputWidget, "send", send_and_look)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_reply_is_missed")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_draws(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    patience = {"timeout": None, "startup_timeout": 600}  # seconds; a dead kernel is noticed
    NotebookClient(notebook, kernel_name="python3", resources=resources, **patience).execute()
    widgets = notebook.metadata.get("widgets", {}).values()
    states = [model["state"] for page in widgets for model in page["state"].values()]
    plain = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    interactive = [output for state in states for output in state.get("outputs", [])]
    assert not [output for output in plain + interactive if output["output_type"] == "error"]
    assert len(pictures(plain)) >= 2
    kept = nbformat.read(path, as_version=4)
    for cell, before in zip(notebook.cells, kept.cells, strict=True):
        assert "remove-output" in cell.metadata.get("tags", []) or kinds(cell) == kinds(before)
    if path.stem == "1_why_it_works":  # Figure 1 follows sliders
        assert len(pictures(interactive)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_as_it_ran_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "error" not in {kind for cell in cells for kind, *_ in kinds(cell)}
    assert path.stat().st_size < 300_000
    assert str(REPOSITORY) not in path.read_text()


def kinds(cell):
    """What a cell put out, without its values."""
    return {
        (output["output_type"], *sorted(output.get("data", {})))
        for output in cell.get("outputs", [])
    }


def pictures(outputs):
    return [output for output in outputs if "image/png" in output.get("data", {})]
