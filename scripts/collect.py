"""Adds finished runs to results/<scale>/<name>.csv, one row a run.

What is recorded stays as it is, unless --replace or --anew says otherwise. Of each experiment it
also keeps how the weights of some runs evolved, results/<scale>/weights/: for each p those of the
most accurate pWD run of sparsity 0.9 or more.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd
from rich.console import Console

from pnorm_decay import records
from pnorm_decay.files import write_text
from pnorm_decay.training.tracking import WEIGHTS_FILE

SPARSE = 0.9

console = Console(highlight=False, soft_wrap=True)


def collect(
    runs: Path, results: Path, scale: str | None, *, replace: bool = False, anew: bool = False
) -> list[Path]:
    """Writes the finished runs below ``runs`` into results files and returns their paths.

    Args:
        runs: the folder of run folders.
        results: where the results files are.
        scale: only this scale; None: all.
        replace: whether these runs' rows take the place of those that are recorded already;
            otherwise only runs are added that are not recorded, or recorded as failed.
        anew: whether the files then hold these runs alone.

    Raises:
        RecordError: a result or a results file is broken; nothing is written.
    """
    rows = defaultdict(list)
    for run_scale, name, result in records.recorded_runs(runs):
        if scale in (None, run_scale):
            rows[run_scale, name].append(result["record"])
    paths = {key: results / key[0] / f"{key[1]}.csv" for key in rows}
    # All are read before anything is written.
    recorded = {key: records.read(path) for key, path in paths.items() if path.exists()}
    written = []
    for (run_scale, name), these in rows.items():
        path = paths[run_scale, name]
        new = pd.DataFrame(these)
        before = recorded.get((run_scale, name), new[:0])
        frame = records.write(path, new, keep=not anew, replace=replace)
        console.print(f"{path}: {len(frame)} runs, {len(these)} of them from {runs}/")
        known = int(new["run_id"].isin(before["run_id"]).sum())
        if known and not replace and not anew:
            console.print(f"  {known} are recorded already and stay as they were (--replace)")
        gone = int((~before["run_id"].isin(frame["run_id"])).sum())
        if gone:
            console.print(f"  {gone} recorded runs are not in {runs}/ and went (--anew)")
        written.append(path)
        keep_weights(runs / run_scale / name, frame, results / run_scale / "weights")
    return written


def keep_weights(runs: Path, frame: pd.DataFrame, folder: Path) -> None:
    """Copies ``weights.csv`` of each p's best sparse run, the most accurate run first.

    Args:
        runs: the folder of the experiment's run folders; of a run that is not here, what was kept
            earlier stays.
        frame: all recorded runs of the experiment.
        folder: where ``<experiment>.csv`` goes.
    """
    path = folder / f"{runs.name}.csv"
    earlier = records.read_weights(path) if path.exists() else None
    frame = frame[records.are_comparable(frame)]
    sparse = frame[(frame["method"] == "pwd") & (frame["sparsity"] >= SPARSE)]
    ranked = sparse.sort_values("val_accuracy", ascending=False, kind="stable")
    kept = []
    for run_id in ranked.drop_duplicates("p")["run_id"]:
        of_run = runs / run_id / WEIGHTS_FILE
        if of_run.exists():
            history = records.read_table(of_run)
            owner = pd.Series(run_id, index=history.index, name="run_id")
            kept.append(pd.concat([owner, history], axis="columns"))
        elif earlier is not None:
            kept.append(earlier[earlier["run_id"] == run_id])
    if kept:
        write_text(path, pd.concat(kept).to_csv(index=False, lineterminator="\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the CSVs are")
    parser.add_argument("--scale", help="only this scale: demo, cpu or paper")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--replace", action="store_true", help="take these runs' rows for those recorded already"
    )
    how.add_argument(
        "--anew", action="store_true", help="leave nothing else in the files that are written"
    )
    arguments = parser.parse_args()
    try:
        written = collect(
            arguments.runs,
            arguments.results,
            arguments.scale,
            replace=arguments.replace,
            anew=arguments.anew,
        )
    except (records.RecordError, OSError) as error:
        console.print(f"error: {error}", markup=False)
        sys.exit(2)
    if not written:
        of_scale = f" of scale {arguments.scale}" if arguments.scale else ""
        console.print(f"no finished runs{of_scale} below {arguments.runs}/")


if __name__ == "__main__":
    main()
