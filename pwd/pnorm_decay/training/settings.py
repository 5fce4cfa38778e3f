"""A run's settings: the composed config, turned once into typed models and checked."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

MOST_THREADS_A_CORE = 16
LARGEST = 2**31 - 1  # of a whole number; a larger one is a slip, and some libraries overflow
# What a value may be, as a message says it after "must be".
COUNT = f"a whole number from 1 to {LARGEST}"
FRACTION = "a number in [0, 1)"
STRENGTH = "a finite number of at least 0"
POSITIVE = "a positive number"
COUNT_OR_0 = "a whole number of at least 0"
FLAG = "true or false"
NAME = "a name"
FOLDER = "a folder"

# Classes that the ids of recorded runs know by another name.
RENAMED = {"pnorm_decay.baselines.Pruning": "pnorm_decay.baselines.NoPruning"}
# The decay's strength under its name in each optimizer; undecayed parameters get 0.
DECAY_OPTIONS = ("lambda_p", "weight_decay")


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line that names the key and the value."""


class Checked(BaseModel):
    """A model that takes no value for what it is not: no 1 for true, no "1" for 1."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @classmethod
    def checked(cls, config: Mapping[str, Any], key: str = "") -> Self:
        """The settings in a part of the config.

        Args:
            config: plain values, lists and dictionaries.
            key: where the part stands in the whole, for messages; "" for the whole.

        Raises:
            ConfigError: a value is missing, unknown, of the wrong type or out of its range.
        """
        try:
            # In JSON a list stands for a tuple, a text for a path, and nothing else is guessed.
            return cls.model_validate_json(json.dumps(config))
        except ValidationError as error:
            raise ConfigError(explain(error, cls, config, key)) from None
        except TypeError as error:
            raise ConfigError(f"{key or 'config'}: {error}") from None


def explain(
    error: ValidationError, model: type[BaseModel], config: Mapping[str, Any], key: str = ""
) -> str:
    """The first thing that pydantic found, in one line: the key, its value, what is allowed."""
    first = error.errors(include_url=False)[0]
    path, fields, wanted = [key] if key else [], model, None
    found: Any = config
    for part in first["loc"]:
        names = {field.alias or name: field for name, field in fields.model_fields.items()}
        if part in names:
            wanted, kind = names[part].description, names[part].annotation
        elif first["type"] != "extra_forbidden":
            break  # a place in a list, or one of several types
        path.append(str(part))
        found = found.get(part) if isinstance(found, Mapping) else None
        if part not in names or not (inspect.isclass(kind) and issubclass(kind, BaseModel)):
            break
        fields = kind
    name = ".".join(path)
    if first["type"] == "value_error":  # of our own checks, which say everything
        return str(first["ctx"]["error"])
    if first["type"] == "missing" and found is None:
        return f"{name}: is missing; must be {wanted}"
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(field.alias or n for n, field in fields.model_fields.items()))
        return f"{name}={shown(found)}: no such setting; there are {known}"
    is_whole = isinstance(found, float) and first["type"].startswith("int")  # 1000.0 is no integer
    given = repr(found) if is_whole else shown(found)
    return f"{name}={given}: must be {wanted or allowed(first['msg'])}"


def allowed(message: str) -> str:
    """What pydantic's message says that a value should be."""
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def shown(value: object) -> str:
    """A value as one would write it in a config, cut short where it is long."""
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}…"


class Part(Checked):
    """A config group that names a class and its options; `building.py` makes the object.

    Attributes:
        target: the class's (or function's) full name.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    GROUP: ClassVar[str] = ""  # where the config has it
    LABELS: ClassVar[set[str]] = set()  # what is not an option of the class but for records
    LATER: ClassVar[set[str]] = set()  # what the class is given besides

    target: str = Field(alias="_target_", description="the full name of a class", min_length=1)

    @model_validator(mode="after")
    def _has_no_null(self) -> Self:
        for name in type(self).model_fields.keys() & self.model_fields_set:
            if getattr(self, name) is None:  # the default of what the class may not know
                wanted = type(self).model_fields[name].description
                raise ValueError(f"{self.GROUP}.{name}=null: must be {wanted}")
        return self

    @property
    def config(self) -> dict[str, Any]:
        """The group as it was composed."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @property
    def options(self) -> dict[str, Any]:
        """What the class is given."""
        return {k: v for k, v in self.config.items() if k not in {"_target_", *self.LABELS}}

    def check_name(self, key: str) -> None:
        """Raises a ConfigError where a name in records stands for something else than this.

        Args:
            key: of the name.
        """
        name = getattr(self, key)
        where, known = f"{self.GROUP}.{key}={name}", METHODS.get(name)
        if name.endswith(STEERED):
            raise ConfigError(f"{where}: must not end with {STEERED}, as runs to a target do")
        if known is None:
            return
        if known.group != self.GROUP or get_object(known.target) is not get_object(self.target):
            raise ConfigError(
                f"{where}: {self.target} is not that method; must be a name that no method has"
            )
        if known.option is not None:
            option, meant, is_meant = known.option
            if not is_meant(given := self.options.get(option)):
                raise ConfigError(
                    f"{self.GROUP}.{option}={shown(given)}: {where} stands for {meant}; must be "
                    "that, or the name one that no method has"
                )

    def check_options(self, group: str) -> None:
        """Compares the options with the signature of the class: their names and types.

        Raises:
            ConfigError: the class cannot be found, or an option is not one of its own.
        """
        try:
            kind = get_object(self.target)
        except Exception as error:  # whatever the module raises when it is imported
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{group}._target_={self.target}: cannot be found: {reason}"
            ) from error
        if not callable(kind):
            raise ConfigError(f"{group}._target_={self.target}: must be a class or a function")
        check_signature(kind, self.options, self.LATER, group)


def check_signature(
    kind: Callable[..., Any], options: Mapping[str, Any], later: set[str], group: str
) -> None:
    """Raises a ConfigError unless ``options`` are arguments of ``kind``, of the right types."""
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return  # it says more about its fields when it is made
    title = getattr(kind, "__name__", str(kind))
    try:
        parameters = inspect.signature(kind).parameters
    except ValueError:  # of a function in C, which does not tell
        raise ConfigError(f"{group}._target_: {title} does not tell its options") from None
    others = inspect.Parameter.VAR_KEYWORD in {p.kind for p in parameters.values()}
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    for name, value in options.items():
        if name in later or (name not in named and not others):
            known = ", ".join(sorted(named.keys() - later)) or "none"
            raise ConfigError(
                f"{group}.{name}={shown(value)}: {title} has no such option; there are {known}"
            )
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in later and name not in options:
            raise ConfigError(f"{group}.{name}: is missing")
    types: dict[str, TypeAdapter[Any]] = option_types(typing.cast(typing.Hashable, kind))
    for name, value in options.items():
        if name in types:
            try:
                types[name].validate_json(json.dumps(value))
            except ValidationError as error:
                wanted = allowed(error.errors(include_url=False)[0]["msg"])
                raise ConfigError(f"{group}.{name}={shown(value)}: must be {wanted}") from None


@functools.cache
def option_types(kind: Any) -> dict[str, TypeAdapter[Any]]:
    """What checks the arguments of a class or function, as far as their types can be found out."""
    try:
        hints = typing.get_type_hints(kind.__init__ if inspect.isclass(kind) else kind)
    except Exception:  # a name that only a type checker knows
        return {}
    types = {}
    for name, hint in hints.items():
        with contextlib.suppress(PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
            strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
            types[name] = TypeAdapter(hint, config=strict)
    return types


class Named(NamedTuple):
    """What a method's name stands for: in a group, a class and perhaps an option.

    Attributes:
        group: the config group.
        target: the class.
        option: its name, what it is, and whether a value is that; None where any will do.
    """

    group: str
    target: str
    option: tuple[str, str, Callable[[Any], bool]] | None = None


METHODS = {
    "adamw": Named("optimizer", "torch.optim.AdamW"),
    "sgd": Named("optimizer", "torch.optim.SGD"),
    "pwd": Named("optimizer", "pnorm_decay.AdamPWD", ("exact", "false", lambda x: not x)),
    "exact": Named("optimizer", "pnorm_decay.AdamPWD", ("exact", "true", bool)),
    "sgd_pwd": Named("optimizer", "pnorm_decay.SGDPWD", ("exact", "false", lambda x: not x)),
    "l1": Named("optimizer", "pnorm_decay.baselines.ProximalAdam"),
    "proximal": Named("optimizer", "pnorm_decay.baselines.ProximalAdam"),
    "coupled": Named("optimizer", "pnorm_decay.baselines.CoupledAdam"),
    "none": Named("pruning", "pnorm_decay.baselines.NoPruning"),
    "magnitude": Named(
        "pruning",
        "pnorm_decay.baselines.MagnitudePruning",
        ("scope", "layer", lambda scope: scope in (None, "layer")),
    ),
    "magnitude_global": Named(
        "pruning",
        "pnorm_decay.baselines.MagnitudePruning",
        ("scope", "global", lambda scope: scope == "global"),
    ),
    "oto": Named("pruning", "pnorm_decay.baselines.OTO"),
    "spred": Named(
        "pruning", "pnorm_decay.baselines.Factorised", ("factors", "2", lambda k: k == 2)
    ),
    "dwf": Named(
        "pruning", "pnorm_decay.baselines.Factorised", ("factors", "3 or more", lambda k: k >= 3)
    ),
    "rewa": Named("pruning", "pnorm_decay.baselines.ReWA"),
}
STEERED = "_target"  # ends the names of methods that are steered to a sparsity


class DataSettings(Part):
    """What `configs/data/*.yaml` set: a `Dataset`."""

    NOT_IDENTITY: ClassVar[set[str]] = {"path", "cache_dir"}


class ModelSettings(Part):
    """What `configs/model/*.yaml` set: an `nn.Module`."""

    LATER: ClassVar[set[str]] = {"num_classes", "in_channels", "vocab_size"}


class OptimizerSettings(Part):
    """What `configs/optimizer/*.yaml` set; options that are not named here go to the class too.

    Attributes:
        method: the method's name in records and figures.
        lr: the learning rate after the warm-up.
    """

    GROUP: ClassVar[str] = "optimizer"
    LABELS: ClassVar[set[str]] = {"method"}
    LATER: ClassVar[set[str]] = {"params"}

    method: str = Field(pattern=r"^\w[\w.-]*$", description=NAME)
    lr: float = Field(ge=0, allow_inf_nan=False, description=STRENGTH)
    betas: (
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None
    ) = Field(None, description="two numbers in [0, 1)")
    eps: float | None = Field(None, ge=0, allow_inf_nan=False, description=STRENGTH)
    momentum: float | None = Field(None, ge=0, lt=1, description=FRACTION)
    p: float | None = Field(None, ge=0, allow_inf_nan=False, description=STRENGTH)
    lambda_p: float | None = Field(None, ge=0, allow_inf_nan=False, description=STRENGTH)
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False, description=STRENGTH)

    @property
    def decay(self) -> float:
        """The decay's strength, lambda_p or the weight decay; 0 where there is neither."""
        set_here = (getattr(self, option) for option in DECAY_OPTIONS)
        return next((value for value in set_here if value is not None), 0.0)

    @property
    def exponent(self) -> float:
        """The p of the decay; that of a weight decay is 2."""
        return 2.0 if self.p is None else self.p

    @model_validator(mode="after")
    def _names_its_method(self) -> Self:
        if self.method == "l1" and self.p != 1:
            raise ValueError(f"optimizer.p={self.p}: l1 has p=1; optimizer=proximal has any p")
        return self


class PruningSettings(Part):
    """What `configs/pruning/*.yaml` set: a `SparsityMethod`.

    Attributes:
        name: the method's name in records and figures, or "none".
        sparsity: what the method is asked for, where it is asked for one.
    """

    GROUP: ClassVar[str] = "pruning"
    LABELS: ClassVar[set[str]] = {"name"}

    name: str = Field(pattern=r"^\w[\w.-]*$", description=NAME)
    sparsity: float | None = Field(None, ge=0, lt=1, description=FRACTION)

    @property
    def exponent(self) -> float | None:
        """The p that the method itself determines, or None."""
        return get_object(self.target).exponent(self.options)

    @property
    def is_none(self) -> bool:
        return self.name == "none"

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if self.is_none != (self.target == "pnorm_decay.baselines.NoPruning"):
            raise ValueError(f"pruning.name={self.name}: {self.target} must have another name")
        return self


class ScheduleSettings(Part):
    """What `configs/schedule/*.yaml` and `configs/decay_schedule/*.yaml` set."""


class LoggerSettings(Checked):
    """What `configs/logger/*.yaml` set.

    Attributes:
        mode: W&B's: "offline", "online" or "disabled".
        project: W&B's project.
        entity: W&B's entity, or None for the user's own.
        dir: where W&B keeps its files.
    """

    mode: Literal["offline", "online", "disabled"] = Field(
        description="one of offline, online, disabled"
    )
    project: str = Field(min_length=1, description=NAME)
    entity: str | None = Field(description="a name or null")
    dir: str = Field(min_length=1, description=FOLDER)


class TrainerSettings(Checked):
    """What `configs/trainer/*.yaml` sets.

    Attributes:
        epochs: length of training in epochs, or None. Exactly one of epochs and steps is set.
        steps: length of training in optimizer steps, or None.
        batch_size: samples a step.
        val_batch_size: samples an evaluation batch.
        eval_every: steps between evaluations; None: an epoch, or a tenth of the run where the
            data has no epochs. The last step is always evaluated.
        clip_grad_norm: the gradient's L2 norm is clipped to this; None: not clipped.
        precision: "fp32", "bf16" or "fp16" (autocast), or "auto": bf16 where it is fast.
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        threads: CPU threads, or "auto": the cores, shared among a sweep's workers.
        channels_last: whether images and convolutions use the channels_last memory format.
        compile: whether the model is compiled by `torch.compile`, which takes up to a minute.
        cuda_graphs: whether forward and backward pass are recorded once and then started as one
            (CUDA graphs): for networks so small that starting their operations takes longest.
        checkpoint_minutes: time between two checkpoints, at most this much is lost.
        save_model: whether the trained weights stay in the run folder as ``model.pt``.
    """

    # What changes how a run is done but not what it finds: no part of a run's identity.
    NOT_IDENTITY: ClassVar[set[str]] = {
        "val_batch_size",
        "device",
        "threads",
        "compile",
        "cuda_graphs",
        "checkpoint_minutes",
        "save_model",
    }

    epochs: float | None = Field(None, gt=0, lt=LARGEST, description=f"{POSITIVE} or null")
    steps: int | None = Field(None, gt=0, le=LARGEST, description=f"{COUNT} or null")
    batch_size: int = Field(100, gt=0, le=LARGEST, description=COUNT)
    val_batch_size: int = Field(1000, gt=0, le=LARGEST, description=COUNT)
    eval_every: int | None = Field(None, gt=0, le=LARGEST, description=f"{COUNT} or null")
    clip_grad_norm: float | None = Field(
        None, gt=0, allow_inf_nan=False, description=f"{POSITIVE} or null"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="one of auto, fp32, bf16, fp16"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="one of auto, cpu, cuda")
    threads: Annotated[int, Field(gt=0, le=4096)] | Literal["auto"] = Field(
        "auto", description="auto or a whole number from 1 to 4096"
    )
    channels_last: bool = Field(True, description=FLAG)
    compile: bool = Field(False, description=FLAG)
    cuda_graphs: bool = Field(False, description=FLAG)
    checkpoint_minutes: float = Field(5.0, gt=0, allow_inf_nan=False, description=POSITIVE)
    save_model: bool = Field(True, description=FLAG)

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            lengths = f"trainer.epochs={shown(self.epochs)}, trainer.steps={shown(self.steps)}"
            raise ValueError(f"{lengths}: set exactly one of them")
        return self

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """The length of training in optimizer steps."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if steps_per_epoch is None:
            raise ConfigError(
                f"trainer.epochs={self.epochs}: text has no epochs; set trainer.steps instead"
            )
        return max(1, round(self.epochs * steps_per_epoch))

    def evaluation_interval(self, steps: int, steps_per_epoch: int | None) -> int:
        """Steps between two evaluations."""
        return self.eval_every or steps_per_epoch or max(1, steps // 10)

    def resolve_device(self) -> torch.device:
        """The device to train on; see ``devices.own_gpu`` for which GPU of several."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("trainer.device=cuda: no CUDA device; use trainer.device=cpu or auto")
        cuda = self.device != "cpu" and torch.cuda.is_available()
        if not cuda:
            return torch.device("cpu")
        # Of a run with several processes, each has a GPU that its launcher names.
        local = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local % torch.cuda.device_count())

    def resolve_precision(self, device: torch.device) -> str:
        """The precision to train in: "fp32", "bf16" or "fp16"."""
        if self.precision == "fp16" and device.type == "cpu":
            raise ConfigError("trainer.precision=fp16: needs CUDA; use bf16, fp32 or auto")
        if self.precision != "auto":
            return self.precision
        return "bf16" if bf16_is_fast(device) else "fp32"

    def resolve_threads(self, workers: int) -> int:
        """CPU threads of this process, given how many work beside each other."""
        if self.threads != "auto":
            return bearable(int(self.threads), "trainer.threads")
        given = os.environ.get("OMP_NUM_THREADS", "").strip()  # by a cluster or torchrun
        if not given:
            return max(1, cores() // workers)
        first = given.partition(",")[0].strip()  # a list has a number for each level of nesting
        if not first.isdecimal() or int(first) == 0:
            raise ConfigError(f"OMP_NUM_THREADS={shown(given)}: must be a positive whole number")
        return bearable(int(first), "OMP_NUM_THREADS")


def bearable(threads: int, key: str) -> int:
    """A number of threads; a ConfigError where it would bring the machine to a standstill."""
    most = MOST_THREADS_A_CORE * (os.cpu_count() or 1)
    if threads > most:
        raise ConfigError(f"{key}={threads}: must be at most {most} on this machine")
    return threads


class Settings(Checked):
    """Everything that a run is made of: the composed config, see `configs/train.yaml`.

    Attributes:
        data, model, optimizer, pruning, schedule, decay_schedule, trainer, logger: config groups.
        seed: of weights, data order and dropout.
        experiment_name: ``<scale>/<name>``.
        sweep_name: the sweep's name, or "none".
        runs_dir: where run folders are.
        results_dir: where recorded rows are.
        skip_recorded: whether a run with a recorded row is done.
        repeat_best: whether only runs are done whose seed 0 is recorded as a best one.
        betas, target_end, final_fraction, grid, point: what other values refer to.
        sweeps, repeat_seeds: what `sweep.py` does.
    """

    # What determines a run's result, with parts of the groups left out: see their NOT_IDENTITY.
    IDENTITY: ClassVar[tuple[str, ...]] = (
        "data",
        "model",
        "optimizer",
        "pruning",
        "schedule",
        "decay_schedule",
        "trainer",
        "seed",
    )

    # NumPy's and Python's generators take 32 bits.
    seed: int = Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    experiment_name: str = Field(
        pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="<scale>/<name>, as experiment=... gives it"
    )
    sweep_name: str = Field(min_length=1, description=NAME)
    runs_dir: str = Field(min_length=1, description=FOLDER)
    results_dir: str = Field(min_length=1, description=FOLDER)
    skip_recorded: bool = Field(True, description=FLAG)
    repeat_best: bool = Field(False, description=FLAG)
    data: DataSettings = Field(description="a choice of data=...")
    model: ModelSettings = Field(description="a choice of model=...")
    optimizer: OptimizerSettings = Field(description="a choice of optimizer=...")
    pruning: PruningSettings = Field(description="a choice of pruning=...")
    schedule: ScheduleSettings = Field(description="a choice of schedule=...")
    decay_schedule: ScheduleSettings = Field(description="a choice of decay_schedule=...")
    trainer: TrainerSettings = Field(description="a choice of trainer=...")
    logger: LoggerSettings = Field(description="a choice of logger=...")
    betas: Any = None
    target_end: Any = None
    final_fraction: Any = None
    grid: dict[str, Any] = Field(default_factory=dict, description="values that sweeps refer to")
    point: dict[str, Any] = Field(default_factory=dict, description="values of one point")
    sweeps: list[str] = Field(default_factory=list, description="a list of sweeps")
    repeat_seeds: Any = None

    @classmethod
    def from_config(cls, cfg: DictConfig | Mapping[str, Any]) -> Self:
        """The settings of a composed config, every option of every group checked.

        Raises:
            ConfigError: something is missing, unknown, out of its range, or does not go together.
            OmegaConfBaseException: an interpolation leads nowhere.
        """
        config: Any = cfg
        if isinstance(cfg, DictConfig):
            config = OmegaConf.to_container(cfg, resolve=True)
        if isinstance(config.get("pruning"), Mapping):
            pruning = config["pruning"]
            target = pruning.get("_target_")
            config = config | {"pruning": pruning | {"_target_": RENAMED.get(target, target)}}
        settings = cls.checked(config)
        for group in ("data", "model", "optimizer", "pruning", "schedule", "decay_schedule"):
            getattr(settings, group).check_options(group)
        settings.optimizer.check_name("method")
        settings.pruning.check_name("name")
        settings.check_method()
        return settings

    def check_method(self) -> None:
        """Raises a ConfigError where a run would not be the method that its record names."""
        pruning, optimizer = self.pruning, self.optimizer
        p = pruning.exponent
        if p is None or not get_object(pruning.target).NEEDS_L2_DECAY:
            return
        needs = f"pruning={pruning.name} has p={p:g} by L2 decay of what it trains"
        if optimizer.exponent != 2:
            chosen = f"optimizer={optimizer.method}, optimizer.p={shown(optimizer.exponent)}"
            raise ConfigError(f"{chosen}: {needs}; use optimizer=adamw")
        if (option := self.decay_schedule.options.get("option")) == "p":
            raise ConfigError(f"decay_schedule.option={option}: {needs}; use decay_schedule=none")

    @property
    def config(self) -> dict[str, Any]:
        """The config as it was composed: plain values, lists and dictionaries."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @property
    def target_sparsity(self) -> float | None:
        """The sparsity that lambda_p is steered to, or None where it is not steered."""
        return self.decay_schedule.options.get("sparsity")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.pruning.is_none and self.target_sparsity is not None:
            raise ValueError(
                f"pruning={self.pruning.name}, decay_schedule=target_sparsity: "
                "both make zeros; use one of them"
            )
        return self


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware.

    Measured on CPUs, ResNet18 under bf16 autocast against fp32: three times as fast with AMX, 1.8
    times with AVX-512 BF16, a tenth as fast with AVX2 alone, which emulates it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
