"""The step as one operation in a compiled graph.

Dynamo would trace a step into thousands of lines and compile them anew for each value of p. It sees
this operation instead, which takes the eager step: options are read when it runs, not when it is
compiled.

What reads a parameter with gradients, before the step and in the same graph, torch 2.14's inductor
may compute after it, as around any custom operation that changes its arguments. A training step has
no such reads: its forward pass is another graph.
"""

import inspect
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["IS_COMPILED", "register", "step"]


class Steps(Protocol):
    """What has an eager step: an optimizer of this package."""

    params_of_all_groups: list[Tensor]

    def step_eagerly(self) -> None: ...


_OPTIMIZERS: WeakValueDictionary[int, Steps] = WeakValueDictionary()


def register(optimizer: Steps) -> int:
    """A key by which the operation finds the optimizer."""
    _OPTIMIZERS[id(optimizer)] = optimizer
    return id(optimizer)


SCHEMA = "(Tensor(a!)[] params, Tensor[] grads, int[] places, int key) -> ()"
OPTIONS: dict[str, Any] = {"mutates_args": ("params",), "schema": SCHEMA}
# Older ones cannot compile an operation that changes a list; they break the graph at the step.
IS_COMPILED = "tags" in inspect.signature(torch.library.custom_op).parameters
if IS_COMPILED:
    # A CUDA graph would keep the present p and lambda_p for ever.
    OPTIONS["tags"] = [tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag]


@torch.library.custom_op("pnorm_decay::step", **OPTIONS)
def step(params: list[Tensor], grads: list[Tensor], places: list[int], key: int) -> None:
    """Performs one step of the optimizer with this key.

    Args:
        params: the present values of those of its parameters that have a gradient: themselves, or
            the compiler's copies of them. These are what changes.
        grads: the gradients that they have in the graph.
        places: which of the optimizer's parameters they are.
        key: what `register` returned.
    """
    optimizer = _OPTIMIZERS[key]
    own = [optimizer.params_of_all_groups[place] for place in places]
    kept = [(param.data, param.grad) for param in own]
    for param, now, grad in zip(own, params, grads, strict=True):
        param.data, param.grad = now, grad
    try:
        optimizer.step_eagerly()
    finally:
        for param, (value, gradient) in zip(own, kept, strict=True):
            param.data, param.grad = value, gradient


@step.register_fake
def _(params: list[Tensor], grads: list[Tensor], places: list[int], key: int) -> None:
    return None
