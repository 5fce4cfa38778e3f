"""Adds finished runs to results/<scale>/<name>.csv, one row a run.

What is recorded stays as it is, unless --replace or --anew says otherwise. A folder whose record
cannot be read is named and left out; with --anew nothing is written then. Of each experiment it
also keeps how the weights of some runs evolved, results/<scale>/weights/: for each p those of the
most accurate pWD run of sparsity 0.9 or more. The learning curves of all recorded runs go into
results/<scale>/curves/<name>.csv.gz.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd
from rich.console import Console

from pnorm_decay import records
from pnorm_decay.files import write_changed
from pnorm_decay.messages import one_line
from pnorm_decay.training.tracking import METRICS_FILE, WEIGHTS_FILE

SPARSE = 0.9

console = Console(highlight=False, soft_wrap=True)


def collect(
    runs: Path, results: Path, scale: str | None, *, replace: bool = False, anew: bool = False
) -> tuple[list[Path], list[records.RecordError]]:
    """Writes the finished runs below ``runs`` into results files.

    Args:
        runs: the folder of run folders.
        results: where the results files are.
        scale: only this scale; None: all.
        replace: whether these runs' rows take the place of those that are recorded already;
            otherwise only runs are added that are not recorded, or recorded as failed.
        anew: whether the files then hold these runs alone.

    Returns:
        The files written, and what is wrong with the records that are left out. With ``anew``,
        which would lose the rows of these, nothing is written where there are any.

    Raises:
        RecordError: there is no such folder, or a results file is broken; nothing is written.
    """
    if not runs.is_dir():
        raise records.RecordError(f"there is no folder {runs}; --runs says where the runs are")
    broken: list[records.RecordError] = []
    rows = defaultdict(list)
    for run_scale, name, result in records.recorded_runs(runs, broken):
        if scale in (None, run_scale):
            rows[run_scale, name].append(result["record"])
    if broken and anew:
        return [], broken
    paths = {key: results / key[0] / f"{key[1]}.csv" for key in rows}
    # All are read before anything is written.
    recorded = {key: records.read(path) for key, path in paths.items() if os.path.lexists(path)}
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
        of_experiment, folder = runs / run_scale / name, results / run_scale
        try:
            keep_weights(of_experiment, frame, folder / "weights")
            count = keep_curves(of_experiment, frame, folder / "curves" / f"{name}.csv.gz")
        except records.RecordError as error:  # the rows are written; what goes with them is not
            broken.append(error)
        else:
            console.print(f"  learning curves of {count} of them are recorded")
    return written, broken


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
        write_changed(path, pd.concat(kept).to_csv(index=False, lineterminator="\n"))


def keep_curves(runs: Path, frame: pd.DataFrame, path: Path) -> int:
    """Adds the learning curves of recorded runs to a file; of how many it then has them.

    A curve that does not end in the recorded accuracy is of another doing of the run, on another
    machine for instance, and is left out.

    Args:
        runs: the folder of the experiment's run folders.
        frame: all recorded runs of the experiment.
        path: the file.
    """
    curves, others = {}, []
    for run_id, accuracy in zip(frame["run_id"], frame["val_accuracy"], strict=True):
        of_run = runs / run_id / METRICS_FILE
        if of_run.exists():
            curve = records.read_table(of_run)
            ends = curve["val_accuracy"].tail(1).tolist() if "val_accuracy" in curve else []
            if math.isnan(accuracy) or ends == [repr(accuracy)]:
                curves[run_id] = curve
            else:
                others.append(run_id)
    if others:
        named = ", ".join(others[:3]) + ", …" * (len(others) > 3)
        console.print(f"  {len(others)} curves do not end as recorded and are left out: {named}")
    return records.write_curves(path, curves, frame["run_id"]) if curves or path.exists() else 0


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
        written, broken = collect(
            arguments.runs,
            arguments.results,
            arguments.scale,
            replace=arguments.replace,
            anew=arguments.anew,
        )
    except (records.RecordError, OSError) as error:
        console.print(f"error: {one_line(error)}", markup=False)
        sys.exit(2)
    for unreadable in broken:
        console.print(f"error: {one_line(unreadable)}", markup=False)
    if broken:
        if arguments.anew:
            console.print("nothing is written: --anew would lose the rows of these runs")
        sys.exit(2)
    if not written:
        folders = [folder / str(arguments.scale) for folder in (arguments.runs, arguments.results)]
        if arguments.scale and not any(folder.is_dir() for folder in folders):
            console.print(
                f"error: --scale {arguments.scale}: there is no {folders[0]} or {folders[1]}"
            )
            sys.exit(2)
        of_scale = f" of scale {arguments.scale}" if arguments.scale else ""
        console.print(f"no finished runs{of_scale} below {arguments.runs}/")


if __name__ == "__main__":
    main()
