"""What batch norms need: values enough, and running statistics estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pnorm_decay.training.settings import ConfigError


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The model's batch norms that keep running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]


def check_one_image(model: nn.Module, image: Tensor) -> None:
    """Refuses training on single images where a batch norm sees one value a channel of them.

    Its output would not depend on the image. Whether it comes to that, the sizes of the image and
    of the network decide: ResNet18 has four values a channel or more from images of 9 x 9 on.

    Args:
        model: any module; it and the random numbers stay as they are.
        image: its input, a batch of one.

    Raises:
        ConfigError: it comes to that.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    try:
        copy.deepcopy(model).to("meta").train()(image.to("meta"))  # where nothing is computed
    except ValueError as error:
        raise ConfigError(
            f"trainer.batch_size=1: must be at least 2, for a batch norm of this model: {error}"
        ) from error
    except Exception:  # a model that cannot be there
        return


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
