"""One configured run, from config to ``result.json``: what `experiments/train.py` calls."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import subprocess
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from pnorm_decay import records
from pnorm_decay.baselines import Pruning
from pnorm_decay.data import DataError, Dataset
from pnorm_decay.optim import split_decayed
from pnorm_decay.training import checkpoint
from pnorm_decay.training.progress import (
    console,
    in_sweep,
    run_line,
    summary_table,
    sweep_position,
    sweep_workers,
    worker_number,
)
from pnorm_decay.training.schedule import DecaySchedule, TargetSchedule, WarmupCosine
from pnorm_decay.training.settings import ConfigError, TrainerSettings
from pnorm_decay.training.tracking import Tracker
from pnorm_decay.training.trainer import (
    Outcome,
    check_channels_last,
    check_share,
    make_accelerator,
    place,
    prepare_process,
    share_batch_norm,
    train,
)

MODEL_FILE = "model.pt"
LOCKS = ".locks"  # in runs_dir: a folder of one file a run
# The strength of the decay under its name in each optimizer; undecayed parameters get 0.
DECAY_OPTIONS = ("lambda_p", "weight_decay")


class RunError(RuntimeError):
    """A run of a sweep ended in an error; the message says where its details are."""


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Does the run that ``cfg`` describes, unless it is already complete.

    Args:
        cfg: the composed config, see `configs/train.yaml`.

    Returns:
        The run's record, see ``records.COLUMNS``; None for a run of a sweep that another process
        is doing, and for one that ``repeat_best`` leaves out.

    Raises:
        ConfigError: a value is out of range or options do not go together.
        DataError: the data set is missing or broken.
        OSError: the run's folder cannot be written; no finished run is lost.
        RunError: in a sweep, anything else went wrong; the failure is recorded.
        Stopped: the process was asked to stop, and the run's state is saved.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    name = run_name(config)
    try:
        return _run(config, name)
    except Exception as error:
        if in_sweep():  # Hydra would tell of it only when the whole sweep has ended
            cause = error.__cause__ if isinstance(error, RunError) else error
            kind = "" if isinstance(cause, ConfigError | DataError) else f"{type(cause).__name__}: "
            console.print(f"{sweep_position()}{name}: failed: {kind}{cause}", style="red")
        raise


def _run(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    settings = TrainerSettings.from_config(config["trainer"])
    data: Dataset = build(config, "data")
    run_id = identity(config, data.label)
    run_dir = Path(config["runs_dir"]) / config["experiment_name"] / run_id
    if config["repeat_best"] and not repeats_a_best_run(config, data.label):
        return None
    record = finished_record(config, run_dir, run_id)
    if record is not None:
        console.print(run_line(name, record, already_complete=True))
        return record

    device = settings.resolve_device(worker_number())
    accelerator = make_accelerator(device, settings.resolve_precision(device))
    lock = Path(config["runs_dir"]) / LOCKS / run_id
    with claimed(lock, accelerator) as is_ours:
        record = finished_record(config, run_dir, run_id)  # while this process waited
        if record is None and is_ours:
            try:
                record = do(config, settings, data, accelerator, run_id, run_dir, name)
            except (ConfigError, DataError, OSError):
                raise
            except Exception as error:
                record_failure(config, run_id, data.label, run_dir, error)
                if not in_sweep():
                    raise
                raise RunError(f"{name}: {error} (see {run_dir / records.FAILURE_FILE})") from error
        elif record is None:
            console.print(f"{sweep_position()}{name}: left to the process that is doing it")
    return record


def do(
    config: dict[str, Any],
    settings: TrainerSettings,
    data: Dataset,
    accelerator: Accelerator,
    run_id: str,
    run_dir: Path,
    name: str,
) -> dict[str, Any]:
    """Trains, and writes everything that a finished run leaves; returns its record."""
    schedule: WarmupCosine = build(config, "schedule")
    decay_schedule: DecaySchedule | TargetSchedule = build(config, "decay_schedule")
    pruning = build_pruning(config)
    if config["pruning"]["name"] != "none" and isinstance(decay_schedule, TargetSchedule):
        raise ConfigError(
            f"pruning={config['pruning']['name']}, decay_schedule=target_sparsity: "
            "both make zeros; use one of them"
        )
    check_share(settings.batch_size, accelerator.num_processes)
    prepare_process(settings.resolve_threads(sweep_workers()))
    data.setup(accelerator.device)
    set_seed(config["seed"])
    model: nn.Module = build(config, "model", **data.model_args).to(accelerator.device)
    if accelerator.num_processes > 1:
        model = share_batch_norm(model, accelerator.device)
    if settings.channels_last:
        check_channels_last(model, accelerator.device)
        model = model.to(memory_format=torch.channels_last)
    per_epoch = steps_per_epoch(data, settings.batch_size)
    steps = settings.total_steps(per_epoch)
    example = place(data.train_batch(0, 2, config["seed"])[0], settings.channels_last)
    pruning.setup(model, example, steps=steps, warmup=schedule.warmup(steps, per_epoch))
    optimizer = build_optimizer(config, model)
    decay_schedulers = decay_schedule.attach(optimizer, steps)

    with Tracker(
        run_dir,
        config["logger"],
        run_id=run_id,
        experiment=config["experiment_name"],
        sweep=config["sweep_name"],
        method=hyperparameters(config)["method"],
        name=name,
        config=config,
        enabled=accelerator.is_main_process,
    ) as tracker:
        outcome = train(
            data=data,
            model=model,
            optimizer=optimizer,
            pruning=pruning,
            schedulers=[schedule.attach(optimizer, steps, per_epoch), *decay_schedulers],
            steps=steps,
            eval_every=settings.evaluation_interval(steps, per_epoch),
            settings=settings,
            accelerator=accelerator,
            seed=config["seed"],
            run_dir=run_dir,
            tracker=tracker,
        )
        provenance = describe_machine(accelerator)
        record = make_record(config, run_id, data.label, outcome, provenance)
        tracker.summarise(record)

    if accelerator.is_main_process:
        if settings.save_model:
            checkpoint.save_model(run_dir / MODEL_FILE, pruning.plain_model())
        result = {"config": config, "record": record, "provenance": provenance}
        records.write_result(run_dir, result)
        checkpoint.remove(run_dir / checkpoint.CHECKPOINT_FILE)
        if in_sweep():
            # Most jobs of a repeat_best sweep leave their run out.
            console.print(run_line(name, record, runs_after_it=not config["repeat_best"]))
        else:
            console.print(summary_table(name, record, run_dir))
    return record


@contextlib.contextmanager
def claimed(path: Path, accelerator: Accelerator) -> Iterator[bool]:
    """Keeps other processes from doing the same run at the same time.

    A run of a sweep does not wait for another process's, so that the sweep goes on; a single run
    waits. The lock goes with the process that holds it.

    Args:
        path: the run's lock file.
        accelerator: of several processes that share the run, the main one holds the lock.

    Yields:
        Whether the run is this process's.
    """
    lock = FileLock(path)
    waits = not in_sweep() or accelerator.num_processes > 1
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not waits:
                yield False
                return
            console.print("another process is doing this run; waiting for it")
            lock.acquire()
    accelerator.wait_for_everyone()
    try:
        yield True
    finally:
        lock.release()


def record_failure(
    config: Mapping[str, Any], run_id: str, label: str, run_dir: Path, error: Exception
) -> None:
    """Leaves in the run's folder what went wrong; the run is not complete and is tried again."""
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    record: dict[str, Any] = dict.fromkeys(records.COLUMNS)
    record |= {"run_id": run_id, **hyperparameters(config), "data": label}
    record |= {"status": "failed", "reason": reason, "commit": git_commit()}
    trace = "".join(traceback.format_exception(error))
    records.write_failure(run_dir, {"config": config, "record": record, "traceback": trace})


def build(config: Mapping[str, Any], group: str, **arguments: Any) -> Any:
    """Instantiates a config group; what goes wrong there is one line that names the group."""
    try:
        return instantiate(config[group], _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{group}: {' '.join(str(cause).split())}") from cause


def saved_network(run_dir: Path) -> nn.Module:
    """The network of a finished run, in eval mode on the CPU; its data are not needed.

    Raises:
        ConfigError: there is no finished run with a saved network, or it is damaged.
    """
    result = records.read_result(run_dir)
    if result is None or not (run_dir / MODEL_FILE).exists():
        raise ConfigError(f"{run_dir} is no finished run with a saved network ({MODEL_FILE})")
    try:
        state = torch.load(run_dir / MODEL_FILE, map_location="cpu", weights_only=True)
        if "token_embedding.weight" in state:
            sizes = {"vocab_size": len(state["token_embedding.weight"])}
        else:
            sizes = {
                "num_classes": len(state["head.weight"]),
                "in_channels": state["conv1.weight"].shape[1],
            }
        network: nn.Module = build(result["config"], "model", **sizes)
        network.load_state_dict(state)
    except (RuntimeError, UnpicklingError, KeyError, EOFError) as error:
        raise ConfigError(f"{run_dir / MODEL_FILE} is damaged or of another model") from error
    return network.eval()


def build_pruning(config: Mapping[str, Any]) -> Pruning:
    """The configured method of making zeros beside the optimizer."""
    options = {key: value for key, value in config["pruning"].items() if key != "name"}
    return build({"pruning": options}, "pruning")


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """The configured optimizer over the model's decayed and undecayed parameters."""
    settings = {key: value for key, value in config["optimizer"].items() if key != "method"}
    if config["optimizer"]["method"] == "l1" and settings["p"] != 1:
        raise ConfigError(f"optimizer.p={settings['p']}: l1 has p=1; optimizer=proximal has any p")
    decayed, undecayed = split_decayed(model)
    off: dict[str, Any] = {option: 0.0 for option in DECAY_OPTIONS if option in settings}
    if "hold_zeros" in settings:
        off["hold_zeros"] = False
    if not any(parameter.is_cuda for parameter in model.parameters()):
        # torch's default step on a CPU; AdamPWD's, which is faster, would round differently from
        # that of the recorded runs.
        off["foreach"] = False
    groups: list[dict[str, Any]] = [
        {"params": [parameter for _, parameter in decayed]},
        {"params": [parameter for _, parameter in undecayed], **off},
    ]
    make = build({"optimizer": {**settings, "_partial_": True}}, "optimizer")
    try:
        return make([group for group in groups if group["params"]])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {error}") from error


def steps_per_epoch(data: Dataset, batch_size: int) -> int | None:
    """As ``Dataset.steps_per_epoch``, for a batch size from the config."""
    try:
        return data.steps_per_epoch(batch_size)
    except ValueError as error:
        raise ConfigError(f"trainer.batch_size={batch_size}: {error}") from error


def identity(config: Mapping[str, Any], label: str) -> str:
    """A hash of what determines a run's result: no paths, devices, loggers or names.

    Args:
        config: the resolved config.
        label: the data set's label, which tells a lossy copy from the original.
    """
    trainer = {k: v for k, v in config["trainer"].items() if k not in TrainerSettings.NOT_IDENTITY}
    if trainer.get("precision") == "auto":
        # "auto" stands for bf16, as on the machines of the recorded runs; what it is elsewhere is
        # another run.
        settings = TrainerSettings.from_config(config["trainer"])
        precision = settings.resolve_precision(settings.resolve_device(worker_number()))
        trainer["precision"] = "auto" if precision == "bf16" else precision
    what = {
        "data": {k: v for k, v in config["data"].items() if k not in ("path", "cache_dir")},
        "label": label,
        "trainer": trainer,
        **{
            k: config[k]
            for k in ("model", "optimizer", "pruning", "schedule", "decay_schedule", "seed")
        },
    }
    text = json.dumps(_canonical(what), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(value: Any) -> Any:
    """The same value for what is equal: 1 and 1.0 give one hash."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Method, p, lambda_p, lr, seed and target sparsity as records name them.

    AdamW's decay is that of p = 2, so its weight decay stands as lambda_p. With pruning, the method
    is the pruning's, and so is p where the pruning determines it.
    """
    optimizer, pruning = config["optimizer"], config["pruning"]
    target = pruning.get("sparsity")
    decay = next((optimizer[option] for option in DECAY_OPTIONS if option in optimizer), 0.0)
    method, p = optimizer["method"], optimizer.get("p", 2.0)
    if pruning["name"] != "none":
        method = pruning["name"]
        kind: type[Pruning] = get_class(pruning["_target_"])
        own_p = kind.exponent(pruning)
        p = p if own_p is None else own_p
    if "sparsity" in config["decay_schedule"]:  # lambda_p is steered: it is no setting
        method, decay, target = f"{method}_target", None, config["decay_schedule"]["sparsity"]
    return {
        "method": method,
        "p": float(p),
        "lambda_p": None if decay is None else float(decay),
        "lr": float(optimizer["lr"]),
        "seed": config["seed"],
        "target_sparsity": target,
    }


def run_name(config: Mapping[str, Any]) -> str:
    """What a person reads in a list of runs."""
    what = hyperparameters(config)
    strength = "" if what["lambda_p"] is None else f" lambda_p={what['lambda_p']:g}"
    name = "{method} p={p:g}{strength} lr={lr:g} seed={seed}".format(**what, strength=strength)
    target = what["target_sparsity"]
    return name if target is None else f"{name} sparsity={target}"


def repeats_a_best_run(config: Mapping[str, Any], label: str) -> bool:
    """Whether the same run with seed 0 is recorded as one that is worth repeating."""
    recorded = Path(config["results_dir"]) / f"{config['experiment_name']}.csv"
    if not recorded.exists():
        raise ConfigError(f"repeat_best: there are no recorded runs to repeat in {recorded}")
    first = identity({**config, "seed": 0}, label)
    return first in records.worth_repeating(records.read(recorded))


def finished_record(config: Mapping[str, Any], run_dir: Path, run_id: str) -> dict[str, Any] | None:
    """The record of a run that is already complete, from its folder or the recorded rows."""
    result = records.read_result(run_dir)
    if result is not None:
        return result["record"]
    recorded = Path(config["results_dir"]) / f"{config['experiment_name']}.csv"
    if config["skip_recorded"] and recorded.exists():
        rows = records.read(recorded)
        rows = rows[(rows["run_id"] == run_id) & (rows["status"] != "failed")]
        if len(rows):
            return {str(key): value for key, value in rows.iloc[0].items()}
    return None


def make_record(
    config: Mapping[str, Any],
    run_id: str,
    label: str,
    outcome: Outcome,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The run as one row; what a diverged run did not reach is None."""
    record: dict[str, Any] = dict.fromkeys(records.COLUMNS)
    record |= {"run_id": run_id, **hyperparameters(config), **outcome.metrics}
    record |= {"data": label, "status": outcome.status, "reason": outcome.reason}
    record |= {key: provenance[key] for key in ("device", "commit", "finished_at")}
    return record


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """Where a result comes from: commit, versions, device, precision, threads, time."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    count = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    return {
        "commit": git_commit(),
        "device": f"{count}{name}, {precision}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def git_commit() -> str:
    """The short commit of the working tree, with "+" where the code differs from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = [":(top)pwd", ":(top)configs", ":(top)experiments"]
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
