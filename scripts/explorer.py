"""Writes results/explorer.html: all recorded runs in one page that needs no network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from pnorm_decay.figures.explorer import page
from pnorm_decay.figures.loading import SCALES, load_all
from pnorm_decay.files import write_text
from pnorm_decay.messages import files_reported, one_line

console = Console(highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the CSVs are")
    parser.add_argument("--output", type=Path, help="default: explorer.html among the results")
    args = parser.parse_args()
    experiments, errors = load_all(args.results, SCALES)
    if experiments:
        path = args.output or args.results / "explorer.html"
        write_text(path, page(experiments))
        console.print(f"wrote {path}: open it in a browser")
    for error in errors:
        console.print(f"error: {one_line(error)}")
    sys.exit(2 if errors else 0)


if __name__ == "__main__":
    with files_reported(console):
        main()
