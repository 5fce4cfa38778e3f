"""One configured run, from config to ``result.json``: what `experiments/train.py` calls."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from pnorm_decay import records, selection
from pnorm_decay.data import DataError, Dataset
from pnorm_decay.messages import one_line
from pnorm_decay.training import checkpoint
from pnorm_decay.training.building import build_data
from pnorm_decay.training.claiming import LOCKS, claimed
from pnorm_decay.training.devices import own_gpu
from pnorm_decay.training.identity import (
    hyperparameters,
    identity,
    options,
    overrides,
    run_name,
)
from pnorm_decay.training.machine import make_accelerator, prepare_process
from pnorm_decay.training.progress import (
    console,
    in_sweep,
    is_first_process,
    run_line,
    summary_table,
    sweep_position,
    sweep_workers,
    warnings_in_lines,
)
from pnorm_decay.training.provenance import describe_machine, git_commit
from pnorm_decay.training.settings import ConfigError, Settings
from pnorm_decay.training.sharing import Footprint, footprint
from pnorm_decay.training.tracking import Tracker, shortened
from pnorm_decay.training.trainer import Outcome, Training, train

if TYPE_CHECKING:
    import pandas as pd


class RunError(RuntimeError):
    """A run ended in an error that nobody foresaw; the message says where its details are."""


class LeftError(RunError):
    """Another process is doing a run of a sweep, which does not wait for it.

    Args:
        message: names the run.
        lock: the file that the other process holds a lock of.
    """

    def __init__(self, message: str, lock: Path) -> None:
        super().__init__(message, lock)
        self.lock = lock

    def __str__(self) -> str:
        return str(self.args[0])


class ProcessDiedError(RuntimeError):
    """The process of a run ended before the run; the message says how."""


@dataclass(frozen=True)
class Run:
    """A run's settings and data set, and what follows from them.

    Attributes:
        settings: checked.
        data: not set up yet.
    """

    settings: Settings
    data: Dataset

    @cached_property
    def id(self) -> str:
        """What tells it from every run of another result."""
        return identity(self.settings, self.data.identity)

    @property
    def folder(self) -> Path:
        """Where everything goes that it leaves."""
        return Path(self.settings.runs_dir) / self.settings.experiment_name / self.id

    @property
    def recorded(self) -> Path:
        """The recorded rows of its experiment."""
        return Path(self.settings.results_dir) / f"{self.settings.experiment_name}.csv"

    @cached_property
    def name(self) -> str:
        """What a person reads in a list of runs."""
        return run_name(self.settings)

    @property
    def columns(self) -> dict[str, Any]:
        """Its record, as far as it is known before training."""
        empty: dict[str, Any] = dict.fromkeys(records.COLUMNS)
        known = {"run_id": self.id, "data": self.data.label}
        known["overrides"] = overrides(self.settings)
        return empty | known | hyperparameters(self.settings)

    @property
    def described(self) -> dict[str, Any]:
        """What W&B is told of it, see ``Tracker``: seeds of one setting share a group."""
        scale, experiment = self.settings.experiment_name.split("/")
        sweep = self.settings.sweep_name
        where = {"scale": scale, "experiment": experiment, "sweep": sweep, "data": self.data.label}
        what = hyperparameters(self.settings)
        method, group = what["method"], run_name(self.settings, seed=False)
        tags = [scale, experiment, method, *([] if sweep == "none" else [sweep])]
        return {
            "id": self.id,
            "name": shortened(self.name),
            "group": shortened(f"{scale}/{experiment} {group}"),
            "job_type": method,
            "tags": list(dict.fromkeys(tags)),
            "config": where
            | what
            | {"overrides": overrides(self.settings)}
            | options(self.settings),
        }


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Does the run that ``cfg`` describes, unless it is already complete.

    Args:
        cfg: the composed config, see `configs/train.yaml`.

    Returns:
        The run's record, see ``records.COLUMNS``; None for one that ``repeat_best`` leaves out.

    Raises:
        ConfigError: a value is out of range or options do not go together.
        DataError: the data set is missing or broken.
        OSError: the run's folder cannot be written; no finished run is lost.
        LeftError: of a sweep: another process is doing the run.
        RunError: anything else went wrong; the failure is recorded.
        Stopped: the process was asked to stop, and the run's state is saved.
    """
    name = ""
    git_commit()  # of the code that this process has loaded, whatever becomes of the files
    try:
        settings = Settings.from_config(cfg)
        name = f"{run_name(settings)}: "
        return _run(Run(settings, build_data(settings)))
    except LeftError:
        raise
    except Exception as error:
        if in_sweep():  # Hydra would tell of it only when the whole sweep has ended
            cause = error.__cause__ if isinstance(error, RunError) else error
            kind = "" if isinstance(cause, ConfigError | DataError) else f"{type(cause).__name__}: "
            console.print(f"{sweep_position()}{name}failed: {kind}{one_line(cause)}", style="red")
            forget_frames(error)
            raise error
        raise


def _run(run: Run) -> dict[str, Any] | None:
    settings = run.settings
    if settings.repeat_best and not repeats_a_best_run(run):
        return None
    record = finished_record(run)
    if record is not None:
        if is_first_process():
            console.print(run_line(run.name, record, already_complete=True))
        return record

    device = own_gpu(settings.trainer.resolve_device())
    accelerator = make_accelerator(device, settings.trainer.resolve_precision(device))
    lock = Path(settings.runs_dir) / LOCKS / run.id
    with claimed(lock, accelerator) as is_ours:
        record = finished_record(run)  # while this process waited
        if record is None and is_ours:
            try:
                with warnings_in_lines():
                    record = train_and_record(run, accelerator)
            except (ConfigError, DataError, OSError):
                raise
            except Exception as error:
                record_failure(run, error)
                where = run.folder / records.FAILURE_FILE
                raise RunError(f"{run.name}: {reason_of(error)} (see {where})") from error
        elif record is None:
            left = f"{run.name}: left to the process that is doing it"
            console.print(f"{sweep_position()}{left}")
            raise LeftError(left, lock)
    return record


def measure(cfg: DictConfig) -> Footprint | None:
    """What the run that ``cfg`` describes would take of a GPU; None where it takes nothing."""
    settings = Settings.from_config(cfg)
    run = Run(settings, build_data(settings))
    left_out = settings.repeat_best and not repeats_a_best_run(run)
    device = settings.trainer.resolve_device()
    if device.type != "cuda" or left_out or finished_record(run) is not None:
        return None
    device = own_gpu(device)
    accelerator = make_accelerator(device, settings.trainer.resolve_precision(device))
    prepare_process(settings.trainer.resolve_threads(sweep_workers()))
    try:
        return footprint(settings, run.data, accelerator)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def train_and_record(run: Run, accelerator: Accelerator) -> dict[str, Any]:
    """Trains, and writes everything that a finished run leaves; returns its record."""
    settings = run.settings
    prepare_process(settings.trainer.resolve_threads(sweep_workers()))
    training = Training(settings, run.data, accelerator)
    with Tracker(
        run.folder,
        settings.logger,
        run.described,
        enabled=accelerator.is_main_process,
    ) as tracker:
        outcome = train(training, run.folder, tracker)
        provenance = describe_machine(accelerator)
        record = make_record(run, outcome, provenance)
        tracker.summarise(record)

    if accelerator.is_main_process:
        not_saved = None
        if settings.trainer.save_model:
            try:
                checkpoint.save_model(
                    run.folder / records.MODEL_FILE, training.method.plain_model()
                )
            except OSError as error:  # a full disk has room for the small result
                not_saved = error
        result = {"config": settings.config, "record": record, "provenance": provenance}
        records.write_result(run.folder, result)
        checkpoint.remove(run.folder / checkpoint.CHECKPOINT_FILE)
        if in_sweep():
            # Most jobs of a repeat_best sweep leave their run out.
            console.print(run_line(run.name, record, runs_after_it=not settings.repeat_best))
        else:
            console.print(summary_table(run.name, record, run.folder))
        if not_saved is not None:
            raise OSError(f"{run.name} is recorded, but its network is not saved: {not_saved}")
    return record


def repeats_a_best_run(run: Run) -> bool:
    """Whether the same run with seed 0 is recorded as one that is worth repeating."""
    if not run.recorded.exists():
        raise ConfigError(f"repeat_best: there are no recorded runs to repeat in {run.recorded}")
    first = identity(run.settings.model_copy(update={"seed": 0}), run.data.identity)
    return first in worth_repeating(*version(run.recorded))


def version(path: Path) -> tuple[Path, int, int]:
    """A file with what changes when it is written."""
    now = path.stat()
    return path, now.st_mtime_ns, now.st_size


# The runs of a sweep ask the same file one after the other.
@functools.lru_cache(maxsize=2)
def worth_repeating(path: Path, *_: int) -> set[str]:
    """As ``selection.worth_repeating``, of a version of a results file."""
    return selection.worth_repeating(recorded_rows(*version(path)))


@functools.lru_cache(maxsize=2)
def recorded_rows(path: Path, *_: int) -> pd.DataFrame:
    """As ``records.read``, of a version of a results file."""
    return records.read(path)


def finished_record(run: Run) -> dict[str, Any] | None:
    """The record of a run that is already complete, from its folder or the recorded rows."""
    result = records.read_result(run.folder)
    if result is not None:
        records.check_owner(run.folder, result, run.id)
        return result["record"]
    if run.settings.skip_recorded and run.recorded.exists():
        rows = recorded_rows(*version(run.recorded))
        rows = rows[(rows["run_id"] == run.id) & (rows["status"] != "failed")]
        if len(rows):
            return {str(key): value for key, value in rows.iloc[0].items()}
    return None


def make_record(run: Run, outcome: Outcome, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The run as one row; what a diverged run did not reach is None."""
    ended = {"status": outcome.status, "reason": outcome.reason}
    made = {key: provenance[key] for key in ("device", "commit", "finished_at")}
    return run.columns | outcome.metrics | ended | made


def reason_of(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def record_failure(run: Run, error: Exception) -> None:
    """Leaves in the run's folder what went wrong; the run is not complete and is tried again."""
    ended = {"status": "failed", "reason": reason_of(error), "commit": git_commit()}
    record = run.columns | ended
    trace = "".join(traceback.format_exception(error))
    failure = {"config": run.settings.config, "record": record, "traceback": trace}
    records.write_failure(run.folder, failure)


def forget_frames(error: BaseException | None) -> None:
    """Lets go of what an error's frames hold: the memory that the next run may need."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    torch.cuda.empty_cache()


def record_lost(cfg: DictConfig, *, cause: ProcessDiedError) -> None:
    """Records a run of a sweep as failed, unless it is complete; its process can no longer do so.

    Raises:
        RunError: it was recorded.
    """
    settings = Settings.from_config(cfg)
    run = Run(settings, build_data(settings))
    if finished_record(run) is None:
        console.print(f"{sweep_position()}{run.name}: failed: {cause}", style="red")
        record_failure(run, cause)
        where = run.folder / records.FAILURE_FILE
        raise RunError(f"{run.name}: {cause} (see {where})") from cause
