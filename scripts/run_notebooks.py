"""Runs the notebooks from top to bottom and keeps their outputs in the files, small.

    python scripts/run_notebooks.py
    python scripts/run_notebooks.py notebooks/1_why_it_works.ipynb

Pictures are reduced to 64 colours, a quarter of their size. What differs between two runs of one
notebook (times, versions, the state of sliders) is not kept.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from pnorm_decay.files import write_text
from pnorm_decay.training.progress import console

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
COLOURS = 64


def smaller(picture: str) -> str:
    """A PNG file in base64 with a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def run(path: Path) -> None:
    """Runs one notebook in place; raises nbclient's CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook,
        timeout=600,
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if "remove-output" in cell.metadata.get("tags", []):
            cell.outputs = []  # sliders, which need a running notebook
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
    write_text(path, nbformat.writes(notebook) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb"))
    )
    for path in parser.parse_args().notebooks:
        run(path)
        console.print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
