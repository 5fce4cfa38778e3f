"""The objects that settings describe: data, model, optimizer, schedules, sparsity method."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from pnorm_decay import records
from pnorm_decay.baselines import SparsityMethod
from pnorm_decay.data import DataError, Dataset
from pnorm_decay.optim import split_decayed
from pnorm_decay.training.schedule import DecaySchedule, TargetSchedule, WarmupCosine
from pnorm_decay.training.settings import (
    DECAY_OPTIONS,
    ConfigError,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    Part,
    Settings,
    explain,
)


def build(group: str, part: Part, **later: Any) -> Any:
    """Makes the object of a config group.

    Args:
        group: the group's name, for messages.
        part: the group's settings.
        later: arguments that no config has.

    Raises:
        ConfigError: the class does not take the options; one line that names the group.
        DataError: the data set is not there.
    """
    try:
        return instantiate({"_target_": part.target, **part.options}, _convert_="all", **later)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        if isinstance(cause, ValidationError):
            line = explain(cause, get_object(part.target), part.options, group)
            raise ConfigError(line) from cause
        raise config_error(group, cause) from cause


def config_error(group: str, error: BaseException) -> ConfigError:
    """What went wrong in a config group as one line: "group.option=..." or "group: ..."."""
    # torch puts its own frames behind the first line.
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return ConfigError(f"{group}{'.' if re.match(r'[a-z_]+=', text) else ': '}{text}")


def build_data(settings: Settings) -> Dataset:
    """The data set; nothing is read yet."""
    return build("data", settings.data)


def set_up_data(data: Dataset, device: torch.device) -> None:
    """As ``Dataset.setup``; options that do not fit the data are a ConfigError."""
    try:
        data.setup(device)
    except ValueError as error:
        raise config_error("data", error) from error


def build_model(settings: Settings, data: Dataset) -> nn.Module:
    """A freshly drawn model, on the CPU, for a data set that is set up."""
    return build("model", settings.model, **data.model_args)


def load_run(
    folder: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a finished run, and the config that it was trained with.

    The run's data are not needed for the networks of this package. Nothing is unpickled.

    Args:
        folder: the run's, ``runs/<scale>/<name>/<run_id>``, with ``result.json`` and ``model.pt``.
        device: where the network goes.

    Returns:
        The network, in eval mode, and the resolved config: a dictionary like
        ``result.json["config"]``.

    Raises:
        ConfigError: there is no finished run, or none whose network was saved, or it is damaged.
        RecordError: the run's ``result.json`` is damaged.

    Example:
        >>> model, config = load_run(folder)  # doctest: +SKIP
        >>> config["optimizer"]["p"]  # doctest: +SKIP
        0.8
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; a run is in runs/<scale>/<name>/<run_id>")
    result = records.read_result(folder)
    if result is None:
        raise ConfigError(f"{folder} holds no finished run: there is no {records.RESULT_FILE}")
    path = folder / records.MODEL_FILE
    if not path.exists():
        raise ConfigError(
            f"{folder} has no saved network: there is no {records.MODEL_FILE}, which "
            "trainer.save_model=true leaves"
        )
    config = result.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / records.RESULT_FILE} holds no config")
    return saved_network(path, config).to(device), config


def saved_network(path: Path, config: Mapping[str, Any]) -> nn.Module:
    """The network of a ``model.pt``, in eval mode on the CPU.

    Args:
        path: the file.
        config: of the run that wrote it.

    Raises:
        ConfigError: the file is damaged or of another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = ModelSettings.checked(config["model"], "model")
        network: nn.Module = build("model", model, **sizes(config, state))
        network.load_state_dict(state)
    except (RuntimeError, UnpicklingError, EOFError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or of another model") from error
    return network.eval()


def sizes(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the data prescribe to a model, seen from its weights; asked of the data otherwise."""
    if "token_embedding.weight" in state:
        return {"vocab_size": len(state["token_embedding.weight"])}
    if {"head.weight", "conv1.weight"} <= state.keys():
        channels = state["conv1.weight"].shape[1]
        return {"num_classes": len(state["head.weight"]), "in_channels": channels}
    data: Dataset = build("data", DataSettings.checked(config["data"], "data"))
    data.setup(torch.device("cpu"))
    return data.model_args


def check_memory(settings: Settings, data: Dataset) -> None:
    """Raises a ConfigError where the model alone would take more memory than the machine has."""
    try:
        with torch.device("meta"):  # which allocates nothing
            model = build_model(settings, data)
        takes = sum(tensor.nbytes for tensor in model.state_dict().values())
    except Exception:  # a model that cannot be made there, or not at all
        return
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if takes > has:
        raise ConfigError(
            f"model: takes {takes / 1e9:,.0f} GB, and this machine has {has / 1e9:,.0f} GB"
        )


def build_method(settings: Settings) -> SparsityMethod:
    """What makes zeros beside the optimizer."""
    return build("pruning", settings.pruning)


def set_up_method(
    method: SparsityMethod, model: nn.Module, example: Tensor, *, steps: int, warmup: int
) -> None:
    """As ``SparsityMethod.setup``; what it cannot be applied to is a ConfigError."""
    try:
        method.setup(model, example, steps=steps, warmup=warmup)
    except ValueError as error:
        raise config_error("pruning", error) from error


def build_schedule(settings: Settings) -> WarmupCosine:
    """The learning rate's schedule."""
    return build("schedule", settings.schedule)


def build_decay_schedule(settings: Settings) -> DecaySchedule | TargetSchedule:
    """The schedule of the decay's options."""
    return build("decay_schedule", settings.decay_schedule)


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """The configured optimizer over the model's decayed and undecayed parameters."""
    decayed, undecayed = split_decayed(model)
    options = settings.options
    off: dict[str, Any] = {option: 0.0 for option in DECAY_OPTIONS if option in options}
    if "hold_zeros" in options:
        off["hold_zeros"] = False
    if not any(parameter.is_cuda for parameter in model.parameters()):
        # torch's default step on a CPU; AdamPWD's, which is faster, would round differently from
        # that of the recorded runs.
        off["foreach"] = False
    groups: list[dict[str, Any]] = [
        {"params": [parameter for _, parameter in decayed]},
        {"params": [parameter for _, parameter in undecayed], **off},
    ]
    make = instantiate({"_target_": settings.target, **options, "_partial_": True}, _convert_="all")
    try:
        return make([group for group in groups if group["params"]])
    except (TypeError, ValueError, RuntimeError) as error:
        raise config_error("optimizer", error) from error


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raises a ConfigError unless the optimizer takes its options, before there is a model."""
    trial = nn.Module()
    trial.weight, trial.bias = Parameter(torch.ones(1, 1)), Parameter(torch.ones(1))
    build_optimizer(settings, trial)


def steps_per_epoch(data: Dataset, batch_size: int) -> int | None:
    """As ``Dataset.steps_per_epoch``, for a batch size from the config."""
    try:
        return data.steps_per_epoch(batch_size)
    except ValueError as error:
        raise ConfigError(f"trainer.batch_size={batch_size}: {error}") from error
