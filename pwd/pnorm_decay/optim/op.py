"""The step as one operation in a compiled graph.

Dynamo would trace a step into thousands of lines and compile them anew for each value of p. It sees
this operation instead, which takes the eager step: options are read when it runs, not when it is
compiled.
"""

from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["register", "step"]


class Steps(Protocol):
    """What has an eager step: an optimizer of this package."""

    def step_eagerly(self) -> None: ...


_OPTIMIZERS: WeakValueDictionary[int, Steps] = WeakValueDictionary()


def register(optimizer: Steps) -> int:
    """A key by which the operation finds the optimizer."""
    _OPTIMIZERS[id(optimizer)] = optimizer
    return id(optimizer)


SCHEMA = "(Tensor(a!)[] params, Tensor[] grads, int key) -> ()"


@torch.library.custom_op("pnorm_decay::step", mutates_args=("params",), schema=SCHEMA)
def step(params: list[Tensor], grads: list[Tensor], key: int) -> None:
    """Performs one step of the optimizer with this key.

    Args:
        params: its parameters that have a gradient; they tell the compiler what changes.
        grads: their gradients.
        key: what `register` returned.
    """
    _OPTIMIZERS[key].step_eagerly()


@step.register_fake
def _(params: list[Tensor], grads: list[Tensor], key: int) -> None:
    return None
