"""Where a run's metrics go: Weights & Biases, and two CSV files in the run folder.

``metrics.csv`` has a row an evaluation; ``weights.csv`` as well, with the sparsity of every layer
(``sparsity/<layer>``) and the histogram of log10|w| (``log10/<lower edge of the bin>``).

In W&B a run's config holds its settings, its summary what its record says of the result, and its
history the curves: ``train/``, ``val/`` and ``weights/``, with ``weights/sparsity/<layer>``.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pnorm_decay.files import write_text
from pnorm_decay.optim import split_decayed
from pnorm_decay.sparsity import layer_sparsity
from pnorm_decay.training.settings import ConfigError, LoggerSettings

METRICS_FILE = "metrics.csv"
WEIGHTS_FILE = "weights.csv"
LOG_WEIGHT_RANGE = (-20.0, 2.0)  # of log10|w|; exact zeros and smaller weights: the first bin
LOG_WEIGHT_BINS = 88  # four a decade
LARGEST_COUNT = 2**24  # that torch.histc is exact to: it counts in float32

# W&B shows curves whose names begin alike beside each other.
CURVES = {
    "train_loss": "train/loss",
    "lr": "train/lr",
    "lambda_p": "train/lambda_p",
    "seconds": "train/seconds",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
    "sparsity": "weights/sparsity",
    "zero_fraction": "weights/zero_fraction",
}
LONGEST_NAME = 128  # characters of a run's or a group's name that a W&B server takes
HISTOGRAM = "weights/log10_abs"
LAYER_PREFIX = "weights/sparsity/"

Row = dict[str, Any]  # of numbers


def log_weight_histogram(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """How many decayed weights have which log10|w|.

    Returns:
        Counts, int64 of shape (bins,), and bin edges, float64 of shape (bins + 1,).
    """
    low, high = LOG_WEIGHT_RANGE
    counts = torch.zeros(LOG_WEIGHT_BINS, dtype=torch.float64)
    for _, weight in split_decayed(model)[0]:
        logs: Tensor = weight.detach().float().abs().log10().clamp(low, high)
        for part in logs.flatten().split(LARGEST_COUNT):
            counts += torch.histc(part, LOG_WEIGHT_BINS, low, high).double().cpu()
    return counts.long().numpy(), np.linspace(low, high, LOG_WEIGHT_BINS + 1)


def shortened(name: str) -> str:
    """A name that W&B takes: the end of a longer one is replaced by a hash of the whole."""
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 10]}… {digest}"


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes rows, atomically; what a row lacks stays empty.

    A run that an older version began may have rows without some of the present columns.
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


class Tracker:
    """Logs one run, as a context manager, so that it is closed whatever happens.

    Args:
        run_dir: the run's folder.
        logger: the config group ``logger``.
        run: what W&B is told of the run: the arguments ``id``, ``name``, ``group``, ``job_type``,
            ``tags`` and ``config`` of ``wandb.init``.
        enabled: whether anything is written; of several processes of a run, one does.
    """

    def __init__(
        self,
        run_dir: Path,
        logger: LoggerSettings,
        run: Mapping[str, Any],
        *,
        enabled: bool = True,
    ) -> None:
        self.run_dir = run_dir
        self.enabled = enabled
        self.history: list[Row] = []
        self._weights: list[Row] = []
        self._settings = frozenset(run["config"])
        self._wandb: Any = None
        if enabled and logger.mode != "disabled":
            self._wandb = start_wandb(logger, **run)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An unfinished run would swallow the next run of this process.
        with contextlib.suppress(Exception):
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"history": self.history, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the history of a run that goes on from its checkpoint."""
        self.history, self._weights = list(state["history"]), list(state["weights"])

    def log(self, row: Row, model: nn.Module) -> None:
        """Logs one evaluation: the row, the sparsity of every layer, the weights' histogram."""
        layers = layer_sparsity(model)
        counts, edges = log_weight_histogram(model)
        weights: Row = {"step": row["step"]}
        weights |= {f"sparsity/{name}": value for name, value in layers.items()}
        weights |= {
            f"log10/{edge:g}": count
            for edge, count in zip(edges[:-1], counts.tolist(), strict=True)
        }
        self.history.append(row)
        self._weights.append(weights)
        if not self.enabled:
            return
        write_csv(self.run_dir / METRICS_FILE, self.history)
        write_csv(self.run_dir / WEIGHTS_FILE, self._weights)
        if self._wandb is None:
            return
        import wandb

        curves = {CURVES[name]: value for name, value in row.items() if name in CURVES}
        curves |= {f"{LAYER_PREFIX}{name}": value for name, value in layers.items()}
        histogram = wandb.Histogram(np_histogram=(counts, edges))
        self._wandb.log({**curves, HISTOGRAM: histogram}, step=int(row["step"]))
        self.summarise(row)

    def summarise(self, record: Mapping[str, Any]) -> None:
        """Puts into W&B's summary what is a result: what the run's config does not hold."""
        if self._wandb is not None:
            left_out = self._settings | {"run_id", "step"}
            self._wandb.summary.update({k: v for k, v in record.items() if k not in left_out})


class LoggerError(ConfigError):
    """W&B cannot be used here: no other run of a sweep could use it."""


def start_wandb(logger: LoggerSettings, **run: Any) -> Any:
    """W&B's run, for one of ours.

    Args:
        logger: its mode, project, entity, folder.
        run: what W&B is told of the run.

    Raises:
        LoggerError: W&B is not installed or could not start.
    """
    hint = "logger.mode=offline needs no account and no network, logger=none no W&B"
    try:
        import wandb
    except ImportError as error:
        raise LoggerError(f"logger.mode={logger.mode}: {error}; {hint}") from None
    logging.getLogger("wandb").setLevel(logging.ERROR)
    Path(logger.dir).mkdir(parents=True, exist_ok=True)
    try:
        # Statistics, console capture and code saving cost seconds a run; a demo sweep is hundreds.
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_save_requirements=False,  # a tenth of a demo run; the lock file has them
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        started = wandb.init(
            mode=logger.mode,
            project=logger.project,
            entity=logger.entity,
            dir=logger.dir,
            resume="allow",
            settings=settings,
            reinit="finish_previous",
            **run,
        )
        # The last row of the history, which is written last, would overwrite the record. The
        # layers' sparsities have dots in their names, which the pattern passes over: they stay.
        started.define_metric("*", summary="none")
        return started
    except (wandb.errors.Error, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValidationError):  # of a variable such as WANDB_MODE
            first = error.errors(include_url=False)[0]
            name = "_".join(["WANDB", *map(str, first["loc"])]).upper()
            reason = f"{name}={first['input']}: {first['msg']}"
        raise LoggerError(
            f"logger.mode={logger.mode}: W&B could not start ({reason}); {hint}"
        ) from None
