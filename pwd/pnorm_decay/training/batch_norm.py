"""Running statistics of batch norms, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The model's batch norms that keep running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[nn.Module]:
    """Inside the block, batch norms have the mean statistics of some batches instead of their own.

    The running statistics of training follow weights that have changed since. In a very sparse
    network that is enough to make an evaluation fail where training does not.

    Args:
        model: any module.
        batches: its inputs, as in training.

    Yields:
        The model; on leaving, its statistics are what they were.
    """
    norms = batch_norms(model)
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
        model.train()
        with torch.no_grad():
            for inputs in batches:
                model(inputs)
        model.train(was_training)
        yield model
    finally:
        model.train(was_training)
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
