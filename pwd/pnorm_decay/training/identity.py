"""What tells runs apart: a run's id, its columns in records, its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pnorm_decay.training.composing import experiments_own
from pnorm_decay.training.settings import DECAY_OPTIONS, RENAMED, Settings


def identity(settings: Settings, label: str) -> str:
    """A hash of what determines a run's result: no paths, devices, loggers or names.

    Args:
        settings: the run's settings.
        label: what the data are: ``Dataset.identity``.
    """
    text = json.dumps(_canonical({"label": label, **determining(settings)}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def determining(settings: Settings) -> dict[str, Any]:
    """The part of the config that determines a run's result, under the names of recorded ids."""
    config = settings.config
    what = {key: config[key] for key in settings.IDENTITY}
    for group in ("data", "trainer"):
        left_out = getattr(settings, group).NOT_IDENTITY
        what[group] = {key: v for key, v in config[group].items() if key not in left_out}
    if what["trainer"].get("precision") == "auto":
        # "auto" stands for bf16, as on the machines of the recorded runs; what it is elsewhere is
        # another run.
        trainer = settings.trainer
        precision = trainer.resolve_precision(trainer.resolve_device())
        what["trainer"]["precision"] = "auto" if precision == "bf16" else precision
    recorded = {new: old for old, new in RENAMED.items()}
    target = settings.pruning.target
    what["pruning"] = what["pruning"] | {"_target_": recorded.get(target, target)}
    return what


def _canonical(value: Any) -> Any:
    """The same value for what is equal: 1 and 1.0 give one hash."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def hyperparameters(settings: Settings) -> dict[str, Any]:
    """Method, p, lambda_p, lr, seed and target sparsity as records name them.

    AdamW's decay is that of p = 2, so its weight decay stands as lambda_p. With pruning, the method
    is the pruning's, and so is p where the pruning determines it.
    """
    optimizer, pruning = settings.optimizer, settings.pruning
    method, p, target = optimizer.method, optimizer.exponent, pruning.sparsity
    decay: float | None = optimizer.decay
    if not pruning.is_none:
        method = pruning.name
        p = p if pruning.exponent is None else pruning.exponent
    if settings.target_sparsity is not None:  # lambda_p is steered: it is no setting
        method, decay, target = f"{method}_target", None, settings.target_sparsity
    return {
        "method": method,
        "p": float(p),
        "lambda_p": None if decay is None else float(decay),
        "lr": float(optimizer.lr),
        "seed": settings.seed,
        "target_sparsity": target,
    }


def options(settings: Settings) -> dict[str, Any]:
    """What determines a run's result beside ``hyperparameters``, one entry an option.

    Returns:
        Such as {"model/width": 8}; without what is not set, and without the names of classes. W&B
        would take a dot in a name for a dictionary in another.
    """
    given = determining(settings)
    told = _told_by_columns(given["optimizer"])
    return {
        f"{group}/{key}": value
        for group in settings.IDENTITY
        if group != "seed"
        for key, value in given[group].items()
        if key != "_target_" and value is not None and f"{group}.{key}" not in told
    }


def overrides(settings: Settings) -> str:
    """What sets a run apart from its experiment's file, beside what the other columns tell.

    Returns:
        Words as on the command line, such as "model.n_embd=48 trainer.steps=20"; "" for a run of
        the experiment as it stands.
    """
    own = experiments_own(settings)
    return "" if own is None else " ".join(differences(settings, own))


def differences(settings: Settings, own: Settings) -> list[str]:
    """The words of ``overrides``, in order, against given settings of the experiment."""
    ours, theirs = determining(settings), determining(own)
    told = _told_by_columns(ours["optimizer"])
    words = []
    for group in settings.IDENTITY:
        if group == "seed":
            continue
        mine, its = ours[group], theirs[group]
        if mine.get("_target_") != its.get("_target_"):
            choice = mine.get("method") or mine.get("name") or mine["_target_"].rpartition(".")[2]
            words.append(f"{group}={choice}")
            continue
        for key in sorted(mine.keys() | its.keys()):
            name = f"{group}.{key}"
            if name not in told and _canonical(mine.get(key)) != _canonical(its.get(key)):
                words.append(f"{name}={_word(mine.get(key))}")
    return words


def _told_by_columns(optimizer: Mapping[str, Any]) -> set[str]:
    """The options that a record has in columns of their own."""
    decay = next((name for name in DECAY_OPTIONS if name in optimizer), None)
    told = {"optimizer.lr", "optimizer.p", "optimizer.method", f"optimizer.{decay}"}
    return told | {"pruning.name", "pruning.sparsity", "decay_schedule.sparsity"}


def _word(value: Any) -> str:
    """A value as on the command line, whole."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace(", ", ",")


def run_name(settings: Settings, *, seed: bool = True) -> str:
    """What a person reads in a list of runs; without its seed, the name of all its repetitions."""
    what = hyperparameters(settings)
    words = [what["method"], f"p={what['p']:g}"]
    if what["lambda_p"] is not None:
        words.append(f"lambda_p={what['lambda_p']:g}")
    words.append(f"lr={what['lr']:g}")
    if seed:
        words.append(f"seed={settings.seed}")
    if what["target_sparsity"] is not None:
        words.append(f"sparsity={what['target_sparsity']}")
    return " ".join([*words, overrides(settings)]).rstrip()
