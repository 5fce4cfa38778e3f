"""What a person sees while runs go on: a bar for one run, a line a run for a sweep."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pnorm_decay.messages import one_line
from pnorm_decay.training.settings import cores

TOTAL = "PNORM_SWEEP_TOTAL"  # environment variable of a sweep's jobs, set by our launcher


class StandardError:
    """``sys.stderr``; a run goes on when its terminal hangs up or nobody reads its pipe."""

    def write(self, text: str) -> None:
        """Writes, where there is somebody to read it."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Writes what is left."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


console = Console(file=StandardError(), highlight=False, soft_wrap=True, markup=False)  # type: ignore[arg-type]


def is_first_process() -> bool:
    """Whether this process speaks for those that do a run together, as torchrun starts them."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Warnings to users come as a line each, without the place in the code that warns."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
        if not issubclass(category, UserWarning):
            before(message, category, *place, **rest)
        elif is_first_process():
            console.print(f"{sweep_position()}warning: {one_line(message)}", style="yellow")

    with warnings.catch_warnings():  # each run of a process says it again
        before, warnings.showwarning = warnings.showwarning, show
        yield


def in_sweep() -> bool:
    """Whether this run is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def say_if_one_of_a_sweep() -> None:
    """Says after a single run that a sweep was chosen, which takes -m to be done."""
    if in_sweep() or not is_first_process():
        return
    if HydraConfig.get().sweeper.get("params"):
        choice = HydraConfig.get().runtime.choices["sweep"]
        console.print(f"this was one run; with -m, sweep={choice} does all of its runs")


def sweep_workers() -> int:
    """How many runs this sweep does beside each other."""
    if not in_sweep():
        return 1
    workers = HydraConfig.get().launcher.get("n_jobs") or 1
    return cores() if workers == -1 else max(1, workers)


def sweep_position(run_seconds: float | None = None) -> str:
    """This run's place in its sweep, as "[3/60, 2:10 left] "; "[3] " from other launchers.

    Args:
        run_seconds: what this run took; if given, the time that the runs after it will take if
            they are like it. (Not the time since the sweep began: that says little where some of
            its runs were complete already.)
    """
    if not in_sweep():
        return ""
    done = HydraConfig.get().job.num + 1
    if TOTAL not in os.environ:
        return f"[{done}] "
    total = int(os.environ[TOTAL])
    if run_seconds is None:
        return f"[{done}/{total}] "
    minutes, seconds = divmod(round(run_seconds * (total - done) / sweep_workers()), 60)
    return f"[{done}/{total}, {minutes}:{seconds:02} left] "


def run_line(
    name: str,
    record: Mapping[str, Any],
    *,
    already_complete: bool = False,
    runs_after_it: bool = True,
) -> str:
    """One line on a run of which there is a record.

    Args:
        name: the run's name.
        record: its record, see ``records.COLUMNS``.
        already_complete: it took none of this sweep's time.
        runs_after_it: the sweep's other jobs are runs too, so that the time left can be told.
    """
    tell_time = runs_after_it and not already_complete
    position = sweep_position(record["seconds"] if tell_time else None)
    note = " (already complete)" if already_complete else ""
    if record["status"] != "finished":
        return f"{position}{name}: {record['status']}, {record['reason']}{note}"
    return (
        f"{position}{name}: accuracy {record['val_accuracy']:.2f} %, "
        f"sparsity {record['sparsity']:.4f}, {record['seconds']:.1f} s{note}"
    )


def training_progress(shown: bool = True) -> Progress:
    """A bar with loss, accuracy, sparsity, lr and time left; silent in a sweep or without a tty."""
    columns = [f"{name} {{task.fields[{name}]}}" for name in ("loss", "accuracy", "sparsity", "lr")]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,  # drawing takes milliseconds
        disable=not shown or in_sweep() or not console.is_terminal,
    )


def summary_table(name: str, record: Mapping[str, Any], run_dir: object) -> Table:
    """The finished run as a table of two columns."""
    table = Table(title=name, title_justify="left", show_header=False)
    rows = {
        "status": record["status"],
        "data": record["data"],
        "steps": f"{record['steps']:,}",
    }
    if record["status"] == "finished":
        rows |= {
            "validation accuracy": f"{record['val_accuracy']:.2f} %"
            f" (best {record['best_val_accuracy']:.2f} %)",
            "  with small weights zeroed": f"{record['val_accuracy_zeroed']:.2f} %",
            "validation loss": f"{record['val_loss']:.4f}",
            "training loss": f"{record['train_loss']:.4f}",
            "sparsity": f"{record['sparsity']:.4f} of {record['params_decayed']:,} decayed weights",
            "  exactly zero": f"{record['zero_fraction']:.4f}",
        }
    rows |= {"time": f"{record['seconds']:.1f} s on {record['device']}", "folder": str(run_dir)}
    for key, value in rows.items():
        table.add_row(key, value)
    return table
