"""Schedules of any option of an optimizer's groups: p during training, a warm-up of lambda_p."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["OptionScheduler", "ramp"]


class OptionScheduler:
    """Sets an option of every parameter group to a function of the step.

    It has the interface of torch's learning-rate schedulers, beside which it can run: call
    `step()` as often as theirs. As there, the first values are set on construction, each group's
    value before that is kept in it as `initial_<option>`, and functions are not saved.

    Args:
        optimizer: any torch optimizer.
        option: a name in its groups, such as `p`, `lambda_p` or `weight_decay`.
        function: the value at a step, from the number of steps so far and the group's initial
            value. A group can stay as it is by that: a warm-up that multiplies leaves 0 at 0.

    Raises:
        ValueError: a group has no such option.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
        >>> warm_up = OptionScheduler(
        ...     optimizer, "weight_decay", lambda step, initial: initial * min(1, step / 100)
        ... )
        >>> warm_up.step()
        >>> warm_up.get_last_value()
        [0.001]
    """

    def __init__(
        self, optimizer: Optimizer, option: str, function: Callable[[int, Any], Any]
    ) -> None:
        self.optimizer = optimizer
        self.option = option
        self.function = function
        self.last_epoch = 0
        self._set()

    def step(self) -> None:
        """Goes on to the next step's value."""
        self.last_epoch += 1
        self._set()

    def get_last_value(self) -> list[Any]:
        """The option's present value in each group."""
        return [group[self.option] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on; the optimizer's own state has the rest."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state; load the optimizer's first."""
        self.last_epoch = state_dict["last_epoch"]
        self._set()

    def _set(self) -> None:
        for group in self.optimizer.param_groups:
            if self.option not in group:
                raise ValueError(f"No option {self.option!r} in a group of {self.optimizer}")
            initial = group.setdefault(f"initial_{self.option}", group[self.option])
            value = self.function(self.last_epoch, initial)
            if isinstance(group[self.option], torch.Tensor):
                group[self.option].fill_(value)  # a captured step reads this tensor
            else:
                group[self.option] = value


def ramp(start: float, steps: int, begin: int = 0) -> Callable[[int, float], float]:
    """A function for OptionScheduler: linear from start to the group's own value, then constant.

    Args:
        start: the value up to step `begin`.
        steps: the length of the way from start to the group's own value, at least 1.
        begin: the step at which the way begins.

    Returns:
        A function of the step and of the group's own value.

    Raises:
        ValueError: steps is less than 1.

    Example:
        >>> ramp(2.0, steps=100)(25, 0.8)
        1.7
    """
    if steps < 1:
        raise ValueError(f"Invalid steps: {steps} (must be at least 1)")

    def value(step: int, own: float) -> float:
        done = min(1.0, max(0.0, (step - begin) / steps))
        return own if done == 1 else start + (own - start) * done

    return value
