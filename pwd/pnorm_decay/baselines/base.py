"""What a method does beside its optimizer: the hooks that the trainer calls, all empty here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

Loss = Callable[[nn.Module], float]


def check(condition: bool, option: str, value: object, wanted: str) -> None:
    """Raises a ValueError that names the option, its value and what was wanted."""
    if not condition:
        raise ValueError(f"{option}={value}: must be {wanted}")


def whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: object) -> bool:
    """Whether a value is a finite number; True and False are not."""
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


class SparsityMethod:
    """The base of every method that makes zeros beside the optimizer.

    The trainer calls `setup` before it builds the optimizer, `before_step` and `after_step` around
    every optimizer step, `finish` after the last one, and evaluates and saves `plain_model()`. A
    subclass overrides what it needs; what it must remember between two steps goes into
    `state_dict`, so that a run which was cut off goes on exactly.
    """

    # Whether the p of records is that of an L2 decay on what the method has put behind the weights.
    NEEDS_L2_DECAY: ClassVar[bool] = False

    @classmethod
    def exponent(cls, options: Mapping[str, Any]) -> float | None:
        """The p that records give a run, where the method and not the optimizer determines it.

        Args:
            options: the method's options, not checked yet.
        """
        return None

    def setup(self, model: nn.Module, example: Tensor, *, steps: int, warmup: int) -> None:
        """Takes the model over, before its optimizer is built.

        Args:
            model: the model to be trained, on its device.
            example: a small batch of its inputs.
            steps: the run's length.
            warmup: steps of learning-rate warm-up.

        Raises:
            ValueError: the method cannot be applied to this model or this length.
        """
        self._model = model

    def before_step(self, step: int) -> None:
        """Called between the backward pass and the optimizer's step.

        Args:
            step: the step about to be taken, from 0.
        """

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step.

        Args:
            step: the step just taken, from 0.
        """

    def finish(self, training_loss: Loss) -> None:
        """Called after the last step: makes `plain_model()` the network that the run ends with.

        Args:
            training_loss: the mean loss (nats) of a model on a few fixed training batches.
        """

    def plain_model(self) -> nn.Module:
        """The network with the weights that it computes with now, under their usual names."""
        return self._model

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the model: tensors, numbers, lists, dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, after `setup`."""


class NoPruning(SparsityMethod):
    """Zeros come from the optimizer alone."""
