"""The trainer's settings, checked before anything is trained."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

import torch
from omegaconf import OmegaConf

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line that names the key and the value."""


def check(condition: bool, key: str, value: object, wanted: str) -> None:
    """Raises a ConfigError that names the key, the value and what was wanted."""
    if not condition:
        raise ConfigError(f"{key}={value}: must be {wanted}")


def whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: object) -> bool:
    """Whether a value is a finite number; True and False are not."""
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class TrainerSettings:
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
        checkpoint_minutes: time between two checkpoints, at most this much is lost.
        save_model: whether the trained weights stay in the run folder as ``model.pt``.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 100
    val_batch_size: int = 1000
    eval_every: int | None = None
    clip_grad_norm: float | None = None
    precision: str = "auto"
    device: str = "auto"
    threads: int | str = "auto"
    channels_last: bool = True
    compile: bool = False
    checkpoint_minutes: float = 5.0
    save_model: bool = True

    # What changes how a run is done but not what it finds: no part of a run's identity.
    NOT_IDENTITY = (
        "val_batch_size",
        "device",
        "threads",
        "compile",
        "checkpoint_minutes",
        "save_model",
    )

    def __post_init__(self) -> None:
        lengths = (self.epochs is None) + (self.steps is None)
        if lengths != 1:
            raise ConfigError(
                f"trainer.epochs={self.epochs}, trainer.steps={self.steps}: set exactly one of them"
            )
        for name in ("epochs", "clip_grad_norm", "checkpoint_minutes"):
            value = getattr(self, name)
            optional = name != "checkpoint_minutes"
            check(
                (value is None and optional) or (number(value) and value > 0),
                f"trainer.{name}",
                value,
                "a positive number",
            )
        for name in ("steps", "batch_size", "val_batch_size", "eval_every"):
            value = getattr(self, name)
            optional = name in ("steps", "eval_every")
            check(
                (value is None and optional) or (whole(value) and value > 0),
                f"trainer.{name}",
                value,
                "a positive whole number",
            )
        for name in ("channels_last", "compile", "save_model"):
            value = getattr(self, name)
            check(isinstance(value, bool), f"trainer.{name}", value, "true or false")
        check(
            self.threads == "auto" or (whole(self.threads) and int(self.threads) > 0),
            "trainer.threads",
            self.threads,
            "auto or a positive whole number",
        )
        options = ", ".join(PRECISIONS)
        check(self.precision in PRECISIONS, "trainer.precision", self.precision, options)
        check(self.device in DEVICES, "trainer.device", self.device, ", ".join(DEVICES))

    @classmethod
    def from_config(cls, config: dict[str, object]) -> TrainerSettings:
        """Settings from the config group ``trainer``; an unknown key is a ConfigError."""
        known = {field.name for field in fields(cls)}
        for key in config:
            check(key in known, "trainer." + key, config[key], f"one of {', '.join(sorted(known))}")
        return cls(**config)  # type: ignore[arg-type]

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
            return int(self.threads)
        if "OMP_NUM_THREADS" in os.environ:  # as a cluster or torchrun has decided
            return max(1, int(os.environ["OMP_NUM_THREADS"]))
        return max(1, cores() // workers)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers() -> int:
    """How many runs of a sweep this machine does beside each other: one a GPU, else one a core.

    Measured on CPUs by `make bench-sweep`: single-threaded runs beside each other get more done
    than one run with all threads.
    """
    return torch.cuda.device_count() or cores()


OmegaConf.register_new_resolver("workers", workers, replace=True)  # for configs/hydra/launcher


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware.

    Measured on CPUs, ResNet18 under bf16 autocast against fp32: three times as fast with AMX, 1.8
    times with AVX-512 BF16, a tenth as fast with AVX2 alone, which emulates it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
