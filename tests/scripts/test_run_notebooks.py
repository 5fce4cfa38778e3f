"""`scripts/run_notebooks.py` runs notebooks in place and keeps small outputs."""

from __future__ import annotations

import base64
import io

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

PROGRAM = "scripts/run_notebooks.py"
PICTURE = """\
import numpy as np
from PIL import Image
colours = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
display(Image.fromarray(colours.astype("uint8")))"""


def write(path, *cells):
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    notebook.cells[-1].metadata["tags"] = ["remove-output"]
    nbformat.write(notebook, path)


def test_outputs_are_kept_small_and_without_what_differs(run_program, tmp_path):
    path = tmp_path / "short.ipynb"
    write(path, PICTURE, "print('kept')", "print('left out')")
    assert run_program(PROGRAM, str(path)).code == 0
    picture, kept, left_out = nbformat.read(path, as_version=4).cells
    data = base64.b64decode(picture.outputs[0]["data"]["image/png"])
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert kept.outputs[0]["text"] == "kept\n"
    assert (left_out.execution_count, left_out.outputs) == (3, [])
    first = path.read_bytes()
    run_program(PROGRAM, str(path))
    assert path.read_bytes() == first


def test_a_failing_cell_leaves_the_file_as_it_was(run_program, tmp_path):
    path = tmp_path / "wrong.ipynb"
    write(path, "print('here')", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run_program(PROGRAM, str(path))
    assert path.read_bytes() == before
