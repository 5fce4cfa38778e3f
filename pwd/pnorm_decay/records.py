"""A finished run as one row: ``result.json`` in its folder, a line of ``results/*/*.csv``.

A run folder with a ``result.json`` is complete; one without is not. The CSV files are what the
figures and tables are made from, and what is committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pnorm_decay.files import write_text

__all__ = [
    "COLUMNS",
    "RecordError",
    "best",
    "best_at_target",
    "read",
    "read_result",
    "recorded_runs",
    "worth_repeating",
    "write",
    "write_failure",
    "write_result",
]

RESULT_FILE = "result.json"
FAILURE_FILE = "failure.json"

#: Column -> pandas dtype, in the order of the CSV. Accuracies are in percent, sparsity and
#: zero_fraction fractions in [0, 1], losses in nats, seconds of wall-clock time; device with the
#: precision. status: "finished"; "diverged" or "failed", without metrics and with a reason.
#: target_sparsity: what a pruning method or TargetSparsity was asked for (OTO: of the channels).
#: val_precision: of the last evaluation; val_accuracy_recalibrated: with batch-norm statistics
#: estimated anew on 50 training batches, empty without batch norms and in older rows.
COLUMNS = {
    "run_id": "string",
    "method": "string",
    "p": "float64",
    "lambda_p": "float64",
    "lr": "float64",
    "seed": "Int64",
    "steps": "Int64",
    "val_accuracy": "float64",
    "best_val_accuracy": "float64",
    "val_loss": "float64",
    "train_loss": "float64",
    "sparsity": "float64",
    "zero_fraction": "float64",
    "val_accuracy_zeroed": "float64",
    "params_decayed": "Int64",
    "seconds": "float64",
    "device": "string",
    "data": "string",
    "commit": "string",
    "finished_at": "string",
    "status": "string",
    "reason": "string",
    "target_sparsity": "float64",
    "val_precision": "string",
    "val_accuracy_recalibrated": "float64",
}
ADDED = {"val_precision", "val_accuracy_recalibrated"}  # files from before lack them


class RecordError(ValueError):
    """A record or a results file is not what it should be; the message names the file."""


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Marks a run as complete: writes its ``result.json``, last and atomically.

    Args:
        run_dir: the run's folder.
        result: ``config`` (resolved), ``record`` (the row, see ``COLUMNS``), ``provenance``.
    """
    missing = COLUMNS.keys() - result["record"].keys()
    if missing:
        raise RecordError(f"the record of {run_dir} lacks {', '.join(sorted(missing))}")
    write_text(run_dir / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    (run_dir / FAILURE_FILE).unlink(missing_ok=True)


def write_failure(run_dir: Path, failure: Mapping[str, Any]) -> None:
    """Leaves a note on a run that failed: ``config``, ``record`` and ``traceback``."""
    write_text(run_dir / FAILURE_FILE, json.dumps(failure, indent=2) + "\n")


def read_result(run_dir: Path, file: str = RESULT_FILE) -> dict[str, Any] | None:
    """The ``result.json`` of a run folder, or None where the run is not complete."""
    path = run_dir / file
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not valid JSON ({error}); delete it to run again") from None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from None


def recorded_runs(runs: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every run below ``runs`` that ended, failed ones too: (scale, name, result) by path."""
    for run_dir in sorted(path for path in runs.glob("*/*/*") if path.is_dir()):
        result = read_result(run_dir) or read_result(run_dir, FAILURE_FILE)
        if result is not None:
            yield run_dir.parts[-3], run_dir.parts[-2], result


def read(path: Path) -> pd.DataFrame:
    """A results file as a frame with the types of ``COLUMNS``.

    Raises:
        RecordError: the file is missing, is not a CSV, or lacks a column.
    """
    try:
        frame = pd.read_csv(path)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise RecordError(f"cannot read {path}: {error}") from None
    missing = COLUMNS.keys() - set(frame.columns) - ADDED
    if missing:
        raise RecordError(f"{path} lacks the column {', '.join(sorted(missing))}")
    try:
        return frame.reindex(columns=list(COLUMNS)).astype(COLUMNS)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path} has a value of the wrong type: {error}") from None


def write(path: Path, rows: pd.DataFrame, *, keep: bool = True) -> pd.DataFrame:
    """Writes rows to a results file, sorted, one row a run, a new row in the place of an old one.

    Args:
        path: ``results/<scale>/<name>.csv``.
        rows: new rows, with the columns of ``COLUMNS``; a failed one does not replace an old one.
        keep: whether rows already in the file, of other runs, stay.

    Returns:
        What the file now holds.
    """
    frame = rows[list(COLUMNS)].astype(COLUMNS)
    if keep and path.exists():
        old = read(path)
        failed = frame["status"].eq("failed").fillna(False)
        frame = frame[~(failed & frame["run_id"].isin(old["run_id"]))]
        frame = pd.concat([old[~old["run_id"].isin(frame["run_id"])], frame])
    order = ["method", "p", "lambda_p", "lr", "seed", "run_id"]
    frame = frame.sort_values(order, kind="stable", ignore_index=True)
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))
    return frame


# A target of 0.9 is met to one weight, which may leave 0.899999.
ROUNDING = 1e-4

# Where the best runs are repeated with other seeds, besides the best of all.
REPEATED_AT = (0.8, 0.9, 0.99)

# Methods that are told their sparsity, and as what they compete at a target.
TOLD = {
    "pwd_target": "pWD to a target",
    "exact_target": "exact step to a target",
    "magnitude": "IMP",
    "magnitude_global": "IMP",
}


def best(settings: pd.DataFrame, at_least: float = 0.0) -> pd.DataFrame:
    """The most accurate of some settings, the sparser one if two are alike.

    It is the first seed that decides, so that the seeds repeated at the chosen setting have no part
    in the choice, and that the choice does not change with them.

    Args:
        settings: with the columns ``val_accuracy_first`` and ``sparsity_first``.
        at_least: only settings whose sparsity reaches this, to 1e-4.

    Returns:
        One row; none where no setting is sparse enough.
    """
    sparse = settings[settings["sparsity_first"] >= at_least - ROUNDING]
    order = ["val_accuracy_first", "sparsity_first"]
    return sparse.sort_values(order, ascending=False, kind="stable").head(1)


def best_at_target(rows: pd.DataFrame) -> pd.DataFrame:
    """The most accurate run of seed 0; none if there is none."""
    first = rows[rows["seed"] == 0]
    return first.sort_values("val_accuracy", ascending=False, kind="stable").head(1)


def worth_repeating(rows: pd.DataFrame) -> set[str]:
    """The runs of seed 0 whose settings other seeds are to repeat.

    These are the best of every method, and the best at each sparsity of ``REPEATED_AT``; of pWD
    those of every p. Of the methods that are told their sparsity, they are the best at each target;
    both kinds of magnitude pruning count as one method there.

    Args:
        rows: recorded runs of one experiment, see ``COLUMNS``.

    Returns:
        Their run ids.
    """
    done = rows[(rows["status"] == "finished") & (rows["seed"] == 0)]
    done = done.assign(val_accuracy_first=done["val_accuracy"], sparsity_first=done["sparsity"])
    group = done["method"].mask(done["method"] == "pwd", "pwd " + done["p"].astype(str))
    chosen: set[str] = set()
    told = done[done["method"].isin(TOLD)]
    for _, runs in told.groupby([told["method"].map(TOLD), "target_sparsity"]):
        chosen.update(best_at_target(runs)["run_id"])
    for _, runs in done.groupby(group):
        for bound in (0.0, *REPEATED_AT):
            chosen.update(best(runs, bound)["run_id"])
    return chosen
