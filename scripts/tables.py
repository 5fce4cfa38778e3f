"""Writes Tables 1, 2 and 3 from recorded runs alone, into results/tables/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from pnorm_decay.figures.loading import SCALES, Experiment, load_all
from pnorm_decay.figures.tables import table1, table1_markdown, table2, table2_markdown
from pnorm_decay.figures.targets import table3, table3_markdown
from pnorm_decay.files import write_text
from pnorm_decay.messages import files_reported, one_line

console = Console(highlight=False, soft_wrap=True, markup=False)


def write_tables(experiment: Experiment, folder: Path) -> None:
    for name, table, markdown in (
        ("table1", table1, table1_markdown),
        ("table2", table2, table2_markdown),
        ("table3", table3, table3_markdown),
    ):
        stem = folder / f"{name}_{experiment.name}"
        page = markdown(experiment)
        if page is None:  # no run was steered to a target
            continue
        text = table(experiment).to_csv(index=False, lineterminator="\n", float_format="%.6g")
        for path, content in (
            (stem.with_suffix(".md"), page),
            (stem.with_suffix(".csv"), text),
        ):
            write_text(path, content)
            console.print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scale",
        action="append",
        choices=SCALES,
        help="only this scale; may be repeated (default: every scale with recorded runs)",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the CSVs are")
    args = parser.parse_args()
    experiments, errors = load_all(args.results, args.scale or SCALES)
    for experiment in experiments:
        write_tables(experiment, args.results / "tables" / experiment.scale)
    for experiment in experiments:
        if experiment.without:
            console.print(experiment.without)
    for error in errors:
        console.print(f"error: {one_line(error)}")
    sys.exit(2 if errors else 0)


if __name__ == "__main__":
    with files_reported(console):
        main()
