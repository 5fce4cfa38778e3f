"""What is zero: the sparsity of a model's decayed weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pnorm_decay.optim.groups import split_decayed
from pnorm_decay.optim.layout import local_part, whole

__all__ = ["layer_sparsity", "sparsity", "structured_share", "zero_fraction", "zeroed"]


def sparsity(model_or_parameters: nn.Module | Iterable[Tensor], threshold: float = 1e-13) -> float:
    """The fraction of the decayed weights with `|w| < threshold`.

    Args:
        model_or_parameters: a module (its trainable tensors of two or more dimensions count,
            shared ones once) or an iterable of tensors (those of two or more dimensions count).
        threshold: a weight counts as zero strictly below it; the paper's value is 1e-13.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: there is no decayed weight.
    """
    tensors = _decayed(model_or_parameters)
    return _fraction(_count(tensors, threshold), tensors)


def zero_fraction(model_or_parameters: nn.Module | Iterable[Tensor]) -> float:
    """The fraction of the decayed weights that are exactly 0; otherwise as `sparsity`."""
    tensors = _decayed(model_or_parameters)
    return _fraction(_count(tensors, None), tensors)


def layer_sparsity(model: nn.Module, threshold: float = 1e-13) -> dict[str, float]:
    """`sparsity` of each decayed parameter of a model, by name."""
    named = [(name, tensor.detach()) for name, tensor in split_decayed(model)[0]]
    counts = _count([tensor for _, tensor in named], threshold)
    return {
        name: count / max(tensor.numel(), 1)
        for (name, tensor), count in zip(named, counts, strict=True)
    }


def structured_share(
    model_or_parameters: nn.Module | Iterable[Tensor], threshold: float = 1e-13
) -> float:
    """Of the decayed weights with `|w| < threshold`, the fraction in units that have no others.

    A unit is all that comes into one output of a tensor, `w[i]`, or all that leaves one input,
    `w[:, j]`: a row or column of a matrix, a channel of a convolution. Such a unit can be cut out
    of the network; a single zero between other weights cannot.

    Args:
        model_or_parameters: as for `sparsity`; not sharded over processes.
        threshold: as for `sparsity`.

    Returns:
        A number in [0, 1], NaN where no weight is small.

    Raises:
        ValueError: there is no decayed weight.
    """
    small_count = in_units = 0
    for tensor in _decayed(model_or_parameters):
        small = _is_small(tensor, threshold).unsqueeze(-1).flatten(2)  # (outputs, inputs, kernel)
        of_unit = small.all((1, 2), keepdim=True) | small.all((0, 2), keepdim=True)
        small_count += int(small.sum())
        in_units += int(of_unit.expand_as(small).sum())
    return in_units / small_count if small_count else math.nan


@contextmanager
def zeroed(model: nn.Module, threshold: float = 1e-13) -> Iterator[nn.Module]:
    """Inside the block, every decayed weight with `|w| < threshold` is exactly 0.

    On leaving, those weights get their values back. Train outside the block: what the block
    changes in them is lost.

    Args:
        model: any module.
        threshold: as for `sparsity`.

    Yields:
        The model.
    """
    saved = []
    with torch.no_grad():
        for tensor in map(local_part, _decayed(model)):
            small = _is_small(tensor, threshold)
            saved.append((tensor, small, tensor[small]))
            tensor.masked_fill_(small, 0)
    try:
        yield model
    finally:
        with torch.no_grad():
            for tensor, small, values in saved:
                tensor[small] = values


# The package's function of this name hides the module from `import pnorm_decay.sparsity`. It
# carries what else is here, so that `pnorm_decay.sparsity.zeroed` is found after either import.
for _name in __all__:
    setattr(sparsity, _name, globals()[_name])


def _decayed(model_or_parameters: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(model_or_parameters, nn.Module):
        tensors = [tensor.detach() for _, tensor in split_decayed(model_or_parameters)[0]]
    else:
        distinct = {id(tensor): tensor for tensor in model_or_parameters}
        tensors = [tensor.detach() for tensor in distinct.values() if tensor.ndim >= 2]
    if not tensors:
        raise ValueError("No decayed weight: no (trainable) tensor has two or more dimensions")
    return tensors


def _is_small(tensor: Tensor, threshold: float) -> Tensor:
    if tensor.dtype == torch.float16:
        tensor = tensor.float()  # 1e-13 would be rounded to 0 there, and nothing is below 0
    return tensor.abs() < threshold


def _count(tensors: list[Tensor], threshold: float | None) -> list[int]:
    """How many elements of each tensor are below the threshold, or zero, with one host sync."""
    if not tensors:
        return []
    counts = [
        (tensor == 0 if threshold is None else _is_small(tensor, threshold)).sum()
        for tensor in tensors
    ]
    added = [whole(count) for count in counts]
    return torch.stack([count.to(added[0].device) for count in added]).tolist()


def _fraction(counts: list[int], tensors: list[Tensor]) -> float:
    return sum(counts) / max(sum(tensor.numel() for tensor in tensors), 1)
