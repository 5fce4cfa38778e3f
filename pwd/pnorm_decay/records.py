"""A finished run as one row: ``result.json`` in its folder, a line of ``results/*/*.csv``.

A run folder with a ``result.json`` is complete; one without is not. The CSV files are what the
figures and tables are made from, and what is committed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pnorm_decay.files import atomic_write, read_regular, write_changed, write_text

if TYPE_CHECKING:
    import pandas as pd  # which the process of a run does without: it takes a while to import

__all__ = [
    "COLUMNS",
    "RecordError",
    "read",
    "read_curves",
    "read_result",
    "read_weights",
    "recorded_runs",
    "write",
    "write_curves",
    "write_failure",
    "write_result",
]

RESULT_FILE = "result.json"
MODEL_FILE = "model.pt"
FAILURE_FILE = "failure.json"
LARGEST = 2**28  # bytes of a result or a results file; a thousand runs have 300,000

#: Column -> pandas dtype, in the order of the CSV. Accuracies are in percent, sparsity and
#: zero_fraction fractions in [0, 1], losses in nats, seconds of wall-clock time; device with the
#: precision. status: "finished"; "diverged" or "failed", without metrics and with a reason.
#: target_sparsity: what a pruning method or TargetSparsity was asked for (OTO: of the channels).
#: val_precision: of the last evaluation; val_accuracy_recalibrated: with batch-norm statistics
#: estimated anew on 50 training batches, empty without batch norms and in older rows.
#: overrides: what sets a run apart from its experiment's file beside the other columns, such as
#: "model.n_embd=48"; empty for a run of the experiment as it stands, and in older rows.
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
    "overrides": "string",
}
ADDED = {"val_precision", "val_accuracy_recalibrated", "overrides"}  # files from before lack them
REQUIRED = ("run_id", "method", "status")  # of every record
STATUSES = ("finished", "diverged", "failed")
MOST = 2.0**62  # of a whole number, which a column of 64 bits holds
PERCENT, FRACTION, POSITIVE = (0.0, 100.0), (0.0, 1.0), (0.0, math.inf)
RANGES = {
    **dict.fromkeys(
        ("p", "lambda_p", "lr", "seed", "steps", "params_decayed", "seconds"), POSITIVE
    ),
    **dict.fromkeys(("val_accuracy", "best_val_accuracy", "val_accuracy_zeroed"), PERCENT),
    "val_accuracy_recalibrated": PERCENT,
    **dict.fromkeys(("sparsity", "zero_fraction", "target_sparsity"), FRACTION),
}


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
    """The ``result.json`` of a run folder, or None where the run is not complete.

    Raises:
        RecordError: the file cannot be read or holds no record of a run.
    """
    path = run_dir / file
    try:
        result = json.loads(read_regular(path, LARGEST).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise RecordError(f"{path} is not valid JSON ({error}); delete it to run again") from None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from None
    record = result.get("record") if isinstance(result, dict) else None
    if not isinstance(record, dict):
        raise RecordError(f"{path} holds no record; delete it to run again")
    try:
        check_types(record)
        row = {name: "" if value is None else str(value) for name, value in record.items()}
        return result | {"record": record | parse_row(row)}
    except ValueError as error:
        raise RecordError(f"{path}: {error}; delete it to run again") from None


def recorded_runs(
    runs: Path, broken: list[RecordError] | None = None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every run below ``runs`` that ended, failed ones too: (scale, name, result) by path.

    Args:
        runs: the folder of run folders.
        broken: takes what is wrong with the folders that are left out.

    Raises:
        RecordError: a record cannot be read or stands in another run's folder, and there is no
            ``broken``.
    """
    for run_dir in sorted(path for path in runs.glob("*/*/*") if path.is_dir()):
        try:
            result = read_result(run_dir) or read_result(run_dir, FAILURE_FILE)
            if result is not None:
                check_owner(run_dir, result, run_dir.name)
        except RecordError as error:
            if broken is None:
                raise
            broken.append(error)
            continue
        if result is not None:
            yield run_dir.parts[-3], run_dir.parts[-2], result


def check_owner(run_dir: Path, result: Mapping[str, Any], run_id: str) -> None:
    """Raises a RecordError unless a result is of the run that its folder is for."""
    if result["record"]["run_id"] != run_id:
        was = result["record"]["run_id"]
        raise RecordError(f"{run_dir} holds the result of run {was}; move it to a folder {was}")


def check_types(record: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the values are texts and numbers as ``COLUMNS`` says, or None."""
    for name, kind in COLUMNS.items():
        value = record.get(name)
        right = isinstance(value, str) if kind == "string" else isinstance(value, int | float)
        if value is not None and (not right or isinstance(value, bool)):
            what = "a text" if kind == "string" else "a number"
            raise ValueError(f"{name}={value!r:.80}: must be {what}")


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file as text: one row a line, its number (the header's is 1) as the index.

    A file that ends in ".gz" is decompressed.

    Raises:
        RecordError: the file cannot be read, or is not a CSV table of UTF-8 text; with its line.
    """
    try:
        content = read_regular(path, LARGEST)
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise RecordError(f"{path} is cut off or damaged") from None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 text: {error.reason}") from None
    if not text:
        raise RecordError(f"{path} is empty")
    import pandas as pd

    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines, rows = [], []
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            raise RecordError(f"{path}, line 1: two columns have one name")
        for row in reader:
            if len(row) != len(header):
                number = f"{len(row)} values, but the table has {len(header)} columns"
                raise RecordError(f"{path}, line {reader.line_num}: {number}")
            lines.append(reader.line_num)
            rows.append(row)
    except csv.Error as error:
        raise RecordError(f"{path}, line {reader.line_num}: {error}") from None
    if not text.endswith(("\n", "\r")):
        raise RecordError(f"{path}, line {reader.line_num}: it ends within the line")
    return pd.DataFrame(rows, columns=header, index=lines, dtype=object)


def read_numbers(path: Path, texts: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV table of numbers; an empty place is NaN.

    Args:
        path: the file.
        texts: the columns that hold text instead.

    Raises:
        RecordError: as of ``read_table``, or a value is no number.
    """
    table = read_table(path)
    numbers: dict[str, list[float]] = {}
    for name in table.columns.difference(list(texts), sort=False):
        numbers[name] = []
        for line, text in table[name].items():
            try:
                whole = text.isdecimal()
                numbers[name].append(int(text) if whole else float(text) if text else math.nan)
            except ValueError:
                raise RecordError(f"{path}, line {line}: {name}={text}: no number") from None
    return table.assign(**numbers).reset_index(drop=True)


def read_weights(path: Path) -> pd.DataFrame:
    """Reads what ``scripts/collect.py`` kept of some runs' ``weights.csv``.

    Raises:
        RecordError: the file cannot be read or is not of that kind.
    """
    weights = read_numbers(path, texts=["run_id"])
    if weights.empty or not {"run_id", "step"} <= set(weights.columns):
        raise RecordError(f"{path} lacks the column run_id or step, or holds no rows")
    return weights


def parse_row(row: Mapping[str, str]) -> dict[str, Any]:
    """A record with the types of ``COLUMNS`` from its text; what is empty is None.

    Raises:
        ValueError: a value is missing, of the wrong type, or one that no run can have.
    """
    missing = [name for name in REQUIRED if not row.get(name)]
    if missing:
        raise ValueError(f"there is no {', '.join(missing)}")
    for name in REQUIRED:
        if not row[name].isprintable():
            raise ValueError(f"{name}={row[name]!r}: must be printable text")
    if row["status"] not in STATUSES:
        raise ValueError(f"status={row['status']}: must be one of {', '.join(STATUSES)}")
    record: dict[str, Any] = {}
    for name, kind in COLUMNS.items():
        text = row.get(name, "")
        if not text or kind == "string":
            record[name] = text or None
            continue
        low, high = RANGES.get(name, (-math.inf, math.inf))
        high = min(high, MOST) if kind == "Int64" else high
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        whole = kind != "Int64" or value.is_integer()
        if not (math.isfinite(value) and whole and low <= value <= high):
            what = "whole number" if kind == "Int64" else "number"
            within = f" from {low:g} to {high:g}" if name in RANGES else ""
            raise ValueError(f"{name}={text}: must be a {what}{within}")
        record[name] = int(value) if kind == "Int64" else value
    return record


def read(path: Path) -> pd.DataFrame:
    """A results file as a frame with the types of ``COLUMNS``; further columns follow as text.

    Raises:
        RecordError: the file is missing, is not a CSV, lacks a column, or holds what no run can
            have; with its line.
    """
    table = read_table(path)
    missing = COLUMNS.keys() - set(table.columns) - ADDED
    if missing:
        raise RecordError(f"{path} lacks the column {', '.join(sorted(missing))}")
    rows: list[dict[str, Any]] = []
    line_of: dict[str, object] = {}
    for line, values in zip(table.index, table.itertuples(index=False), strict=True):
        row = dict(zip(table.columns, values, strict=True))
        try:
            rows.append(parse_row(row))
        except ValueError as error:
            raise RecordError(f"{path}, line {line}: {error}") from None
        if (first := line_of.setdefault(row["run_id"], line)) != line:
            raise RecordError(f"{path}, line {line}: run {row['run_id']} is in line {first} too")
    import pandas as pd

    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    for name in table.columns.difference(list(COLUMNS), sort=False):
        frame[name] = table[name].replace("", None).astype("string").to_numpy()
    return frame


def are_comparable(rows: pd.DataFrame) -> pd.Series:
    """Which runs differ in nothing but what the other columns tell: those of the same overrides.

    Args:
        rows: recorded runs of one experiment.

    Returns:
        A mask: of the runs of the experiment as it stands or, where none of them has finished, of
        the most frequent overrides.
    """
    overrides = rows["overrides"].fillna("")
    finished = overrides[rows["status"].eq("finished").fillna(False)]
    own = finished.empty or finished.eq("").any()
    return overrides == ("" if own else finished.mode().iloc[0])


def write(
    path: Path, rows: pd.DataFrame, *, keep: bool = True, replace: bool = False
) -> pd.DataFrame:
    """Writes rows to a results file, sorted, one row a run.

    Args:
        path: ``results/<scale>/<name>.csv``.
        rows: new rows; a column of ``COLUMNS`` that they lack stays empty.
        keep: whether rows already in the file stay.
        replace: whether the new row of a run that is in the file takes the old one's place; that
            of a failed run always does so, and is never what does so.

    Returns:
        What the file now holds; also what somebody added to it in columns of their own.
    """
    import pandas as pd

    frame = rows.reindex(columns=list(COLUMNS)).astype(COLUMNS)
    old = read(path) if os.path.lexists(path) else frame.head(0)
    added = old.set_index("run_id")[list(old.columns.difference(list(COLUMNS), sort=False))]
    frame = frame.join(added, on="run_id")
    if keep:
        failed, failed_before = (f["status"].eq("failed").fillna(False) for f in (frame, old))
        frame = frame[~(failed & frame["run_id"].isin(old["run_id"]))]
        if not replace:
            frame = frame[~frame["run_id"].isin(old["run_id"][~failed_before])]
        frame = pd.concat([old[~old["run_id"].isin(frame["run_id"])], frame])
    order = ["method", "p", "lambda_p", "lr", "seed", "run_id"]
    frame = frame.sort_values(order, kind="stable", ignore_index=True)
    write_changed(path, frame.to_csv(index=False, lineterminator="\n"))
    return frame


def read_curves(path: Path) -> pd.DataFrame:
    """The learning curves of recorded runs, from ``results/<scale>/curves/<name>.csv.gz``.

    Returns:
        A row an evaluation: ``run_id``, and the numbers of the run's ``metrics.csv``: ``step``,
        ``lr``, ``lambda_p`` where the method has one, ``train_loss`` and ``val_loss`` in nats,
        ``val_accuracy`` in percent, ``sparsity``, ``zero_fraction``, ``seconds`` since the start.

    Raises:
        RecordError: the file cannot be read, or a value is no number; with its line.
    """
    return read_numbers(path, texts=["run_id"])


def write_curves(path: Path, curves: Mapping[str, pd.DataFrame], runs: Iterable[str]) -> int:
    """Adds learning curves to those in a file, and removes those of other than some runs.

    The same curves make the same file, and a file that would hold the same stays untouched.

    Args:
        path: ``results/<scale>/curves/<name>.csv.gz``.
        curves: run id -> the table of the run's ``metrics.csv``, see ``read_table``.
        runs: the runs whose curves may be in the file.

    Returns:
        Of how many runs the file now holds curves.

    Raises:
        RecordError: the file that is there cannot be read.
    """
    import pandas as pd

    before = read_table(path) if path.exists() else pd.DataFrame({"run_id": []})
    if "run_id" not in before.columns:
        raise RecordError(f"{path} lacks the column run_id")
    kept = before[before["run_id"].isin(list(runs)) & ~before["run_id"].isin(list(curves))]
    new = [curve.assign(run_id=run_id) for run_id, curve in curves.items()]
    whole = pd.concat([kept, *new]).sort_values("run_id", kind="stable", ignore_index=True)
    first = {"run_id": 0, "step": 1}
    columns = sorted(whole.columns, key=lambda name: (first.get(name, 2), name))
    whole = whole[columns].fillna("")
    if not whole.equals(before.reset_index(drop=True)):
        text = whole.to_csv(index=False, lineterminator="\n")
        with atomic_write(path) as file:
            file.write(gzip.compress(text.encode(), mtime=0))
    return int(whole["run_id"].nunique())
