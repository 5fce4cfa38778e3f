"""Copies of a model and of its inputs, so that trying it out changes nothing of the user's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, also of one with weights that are computed, as under a mask.

    Raises:
        ValueError: it cannot be copied.
    """
    computed: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, computed)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(model).__name__} cannot be copied: {reason}") from error


def fresh(inputs: Any) -> Any:
    """Inputs that a model may write into: tensors, alone or in tuples and the like, as copies."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


@torch.no_grad()
def restore_buffers(tried: nn.Module, model: nn.Module) -> None:
    """Gives buffers that runs of a copy have changed, such as counters, the model's numbers."""
    theirs = dict(model.named_buffers())
    for name, buffer in tried.named_buffers():
        own = theirs.get(name)
        if own is not None and own.shape == buffer.shape:
            was = own.to(buffer)
            if not torch.equal(was, buffer):
                buffer.data = was.clone()  # in the place of memory that may be shared
