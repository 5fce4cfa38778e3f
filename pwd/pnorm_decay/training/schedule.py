"""The schedules: of the learning rate, and of the decay's options."""

from __future__ import annotations

import math
from functools import partial
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pnorm_decay.optim import OptionScheduler, TargetSparsity, ramp
from pnorm_decay.training.settings import COUNT_OR_0, FRACTION, Checked, ConfigError

NON_NEGATIVE = "a finite number of at least 0"


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


class WarmupCosine(Checked):
    """What `configs/schedule/*.yaml` sets.

    Attributes:
        warmup_epochs: length of the warm-up in epochs, or None.
        warmup_steps: length of the warm-up in steps, or None.
        final_fraction: the last step's lr as a fraction of lr, in [0, 1].
    """

    warmup_epochs: float | None = Field(
        None, ge=0, allow_inf_nan=False, description=f"{NON_NEGATIVE} or null"
    )
    warmup_steps: int | None = Field(None, ge=0, description=f"{COUNT_OR_0} or null")
    final_fraction: float = Field(0.01, ge=0, le=1, description="a number in [0, 1]")

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("schedule.warmup_epochs and schedule.warmup_steps: set one of them")
        return self

    def asked(self, steps_per_epoch: int | None) -> int:
        """The length of the warm-up in steps, however long the run is."""
        if self.warmup_epochs is None:
            return self.warmup_steps or 0
        if steps_per_epoch is None:
            raise ConfigError(
                f"schedule.warmup_epochs={self.warmup_epochs}: text has no epochs; "
                "set schedule.warmup_steps instead"
            )
        return round(self.warmup_epochs * steps_per_epoch)

    def warmup(self, steps: int, steps_per_epoch: int | None) -> int:
        """The length of the warm-up in steps, for a run of ``steps``."""
        # A run cut short for a look would otherwise never leave its warm-up.
        return min(self.asked(steps_per_epoch), steps // 2)

    def shortened(self, steps: int, steps_per_epoch: int | None) -> str:
        """What to tell of a warm-up that a run of ``steps`` cannot have whole; "" of any other."""
        asked, takes = self.asked(steps_per_epoch), self.warmup(steps, steps_per_epoch)
        if takes == asked:
            return ""
        key = "warmup_steps" if self.warmup_epochs is None else "warmup_epochs"
        return (
            f"schedule.{key}={getattr(self, key)}: more than half of the run, which has "
            f"{steps:,} steps; the warm-up takes {takes:,} of them, not {asked:,}"
        )

    def attach(self, optimizer: Optimizer, steps: int, steps_per_epoch: int | None) -> LambdaLR:
        """The scheduler for a run of ``steps``."""
        factor = partial(
            warmup_cosine,
            steps=steps,
            warmup=self.warmup(steps, steps_per_epoch),
            final_fraction=self.final_fraction,
        )
        return LambdaLR(optimizer, factor)


class Way(Checked):
    """Where in a run an option changes.

    Attributes:
        begin: where its way begins, as a fraction of the run, in [0, 1).
        end: where its way ends, in (begin, 1].
    """

    begin: float = Field(0.0, ge=0, lt=1, description=FRACTION)
    end: float = Field(0.2, gt=0, le=1, description="a number in (0, 1]")

    @model_validator(mode="after")
    def _goes_forwards(self) -> Self:
        if self.end <= self.begin:
            raise ValueError(
                f"decay_schedule.end={self.end}: must be a number in (begin, 1], and begin is "
                f"{self.begin}"
            )
        return self


class DecaySchedule(Way):
    """What `configs/decay_schedule/*.yaml` sets: one option's way to the value that it was given.

    Attributes:
        option: an option of the optimizer's groups, such as "p" or "lambda_p"; None: no schedule.
        start: its value up to ``begin``; at ``end`` it has the value that the optimizer was given.
    """

    option: str | None = Field(None, description="an option of the optimizer or null")
    start: float = Field(0.0, ge=0, allow_inf_nan=False, description=NON_NEGATIVE)

    @model_validator(mode="after")
    def _starts_at_a_valid_p(self) -> Self:
        if self.option == "p" and self.start == 0:
            raise ValueError(f"decay_schedule.start={self.start}: p must be a positive number")
        return self

    def attach(self, optimizer: Optimizer, steps: int) -> list[OptionScheduler]:
        """The scheduler for a run of ``steps``, or none."""
        if self.option is None:
            return []
        if self.option == "lr":
            raise ConfigError("decay_schedule.option=lr: that is what schedule=... is for")
        values = [g[self.option] for g in optimizer.param_groups if self.option in g]
        if not all(map(is_number, values)):
            raise ConfigError(f"decay_schedule.option={self.option}: must be an option of numbers")
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


def is_number(value: object) -> bool:
    """Whether a value is a number; True and False are not."""
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


class TargetSchedule(Way):
    """What `configs/decay_schedule/target_sparsity.yaml` sets: see `TargetSparsity`.

    Attributes:
        sparsity: the fraction of zeros that the run ends with, in (0, 1); it rises from ``begin``
            on and is reached at ``end``.
    """

    sparsity: float = Field(gt=0, lt=1, description="a number in (0, 1)")
    end: float = Field(0.6, gt=0, le=1, description="a number in (0, 1]")

    def attach(self, optimizer: Optimizer, steps: int) -> list[TargetSparsity]:
        """The controller for a run of ``steps``."""
        try:
            return [TargetSparsity(optimizer, self.sparsity, steps, begin=self.begin, end=self.end)]
        except ValueError as error:
            hint = "use optimizer=pwd, exact or sgd_pwd with lambda_p above 0"
            raise ConfigError(f"decay_schedule=target_sparsity: {error}; {hint}") from error
