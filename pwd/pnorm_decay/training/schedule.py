"""The schedules: of the learning rate, and of the decay's options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pnorm_decay.optim import OptionScheduler, TargetSparsity, ramp
from pnorm_decay.training.settings import ConfigError, check, number


def warmup_cosine(step: int, *, steps: int, warmup: int, final_fraction: float) -> float:
    """The factor on lr: linear from lr/(warmup+1) to lr, then a cosine down to its final fraction.

    Args:
        step: the step about to be taken, from 0.
        steps: length of training; the last step, ``steps - 1``, uses ``final_fraction``.
        warmup: steps of linear warm-up, fewer than ``steps``.
        final_fraction: of lr, in [0, 1]; 1 keeps lr constant after the warm-up.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WarmupCosine:
    """What `configs/schedule/*.yaml` sets.

    Attributes:
        warmup_epochs: length of the warm-up in epochs, or None.
        warmup_steps: length of the warm-up in steps, or None.
        final_fraction: the last step's lr as a fraction of lr, in [0, 1].
    """

    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    final_fraction: float = 0.01

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "warmup_steps"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"schedule.{name}", value, "at least 0")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ConfigError("schedule.warmup_epochs and schedule.warmup_steps: set one of them")
        value = self.final_fraction
        check(0 <= value <= 1, "schedule.final_fraction", value, "in [0, 1]")

    def warmup(self, steps: int, steps_per_epoch: int | None) -> int:
        """The length of the warm-up in steps, for a run of ``steps``."""
        warmup = self.warmup_steps or 0
        if self.warmup_epochs is not None:
            if steps_per_epoch is None:
                raise ConfigError(
                    f"schedule.warmup_epochs={self.warmup_epochs}: text has no epochs; "
                    "set schedule.warmup_steps instead"
                )
            warmup = round(self.warmup_epochs * steps_per_epoch)
        # A run cut short for a look would otherwise never leave its warm-up.
        return min(warmup, steps // 2)

    def attach(self, optimizer: Optimizer, steps: int, steps_per_epoch: int | None) -> LambdaLR:
        """The scheduler for a run of ``steps``."""
        factor = partial(
            warmup_cosine,
            steps=steps,
            warmup=self.warmup(steps, steps_per_epoch),
            final_fraction=self.final_fraction,
        )
        return LambdaLR(optimizer, factor)


def check_way(begin: float, end: float) -> None:
    """Raises a ConfigError unless begin and end are fractions of a run, one before the other."""
    check(number(begin) and 0 <= begin < 1, "decay_schedule.begin", begin, "in [0, 1)")
    check(number(end) and begin < end <= 1, "decay_schedule.end", end, "in (begin, 1]")


@dataclass(frozen=True)
class DecaySchedule:
    """What `configs/decay_schedule/*.yaml` sets: one option's way to the value that it was given.

    Attributes:
        option: an option of the optimizer's groups, such as "p" or "lambda_p"; None: no schedule.
        start: its value up to ``begin``.
        begin: where the way begins, as a fraction of the run, in [0, 1).
        end: where the option has reached the value that the optimizer was given, in (begin, 1].
    """

    option: str | None = None
    start: float = 0.0
    begin: float = 0.0
    end: float = 0.2

    def __post_init__(self) -> None:
        lowest = self.start > 0 if self.option == "p" else self.start >= 0
        check(lowest and self.start < math.inf, "decay_schedule.start", self.start, "a valid value")
        check_way(self.begin, self.end)

    def attach(self, optimizer: Optimizer, steps: int) -> list[OptionScheduler]:
        """The scheduler for a run of ``steps``, or none."""
        if self.option is None:
            return []
        begin = round(self.begin * steps)
        length = max(1, round(self.end * steps) - begin)
        way = ramp(self.start, length, begin)

        def value(step: int, own: float) -> float:
            # A group that is given no decay has none on the way either.
            return own if self.option == "lambda_p" and own == 0 else way(step, own)

        try:
            return [OptionScheduler(optimizer, self.option, value)]
        except ValueError as error:
            raise ConfigError(
                f"decay_schedule.option={self.option}: the optimizer has no such option"
            ) from error


@dataclass(frozen=True)
class TargetSchedule:
    """What `configs/decay_schedule/target_sparsity.yaml` sets: see `TargetSparsity`.

    Attributes:
        sparsity: the fraction of zeros that the run ends with, in (0, 1).
        begin: where in the run sparsity begins to rise, in [0, 1).
        end: where it has reached the target, in (begin, 1].
    """

    sparsity: float
    begin: float = 0.0
    end: float = 0.6

    def __post_init__(self) -> None:
        value = self.sparsity
        check(number(value) and 0 < value < 1, "decay_schedule.sparsity", value, "in (0, 1)")
        check_way(self.begin, self.end)

    def attach(self, optimizer: Optimizer, steps: int) -> list[TargetSparsity]:
        """The controller for a run of ``steps``."""
        try:
            return [TargetSparsity(optimizer, self.sparsity, steps, begin=self.begin, end=self.end)]
        except ValueError as error:
            hint = "use optimizer=pwd, exact or sgd_pwd"
            raise ConfigError(f"decay_schedule=target_sparsity: {error}; {hint}") from error
