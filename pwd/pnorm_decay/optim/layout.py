"""Where numbers lie in memory: views, 16-bit types, pieces. No mathematics."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pnorm_decay.optim.options import Group, Number

__all__ = [
    "Slot",
    "State",
    "check_shapes",
    "copy_back",
    "flush_subnormal",
    "is_16_bit",
    "is_flat",
    "local_part",
    "names_of",
    "pieces",
    "suits_fused",
    "whole",
    "widened",
]

State = dict[str, Tensor]
PLAIN = (Tensor, Parameter)  # what has its elements in memory of its own; other subclasses may not

# Elements that the foreach backend works on at a time: on a CPU what stays in its cache, elsewhere
# what bounds the temporary memory at little cost.
CPU_PIECE = 2**19
DEVICE_PIECE = 2**24


@dataclass(slots=True)
class Slot:
    """One tensor in one step: views of the same elements of all that belongs to it."""

    param: Tensor
    grad: Tensor
    state: State
    step: Number = 1  # the step's number, from 1
    is_first: bool = False  # whether the state has been created in this step

    def map(self, function: Any) -> "Slot":
        """The slot with a function applied to each of its tensors."""
        state = {name: function(value) for name, value in self.state.items()}
        return Slot(function(self.param), function(self.grad), state, self.step, self.is_first)


def local_part(tensor: Any, like: Any = None) -> Tensor:
    """The part of a distributed tensor (DTensor) that this process holds; others unchanged.

    Args:
        tensor: any tensor.
        like: the parameter that it belongs to, as whose parts its parts are to lie.
    """
    if type(tensor) in PLAIN:
        return tensor
    if not hasattr(tensor, "to_local"):
        return tensor
    if like is not None and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.to_local()


def whole(value: Tensor) -> Tensor:
    """A number of a distributed tensor, such as a count, added over all processes."""
    full_tensor = getattr(value, "full_tensor", None)
    return value if full_tensor is None else full_tensor()


def is_16_bit(tensor: Tensor) -> bool:
    """Whether arithmetic is done in float32 instead."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def widened(tensor: Tensor) -> Tensor:
    """The tensor for arithmetic: 16-bit types as float32.

    A copy where the step is differentiated, because the original is overwritten.
    """
    if is_16_bit(tensor):
        return tensor.float()
    return tensor.clone() if torch.is_grad_enabled() else tensor


def flush_subnormal(w: Tensor) -> Tensor:
    """W with 0 for what is below the smallest normal number: some CPUs crawl there."""
    return w.masked_fill(w.abs() < torch.finfo(w.dtype).tiny, 0)


def check_shapes(slot: Slot, group: Group, param: Tensor) -> None:
    """Raises RuntimeError if a tensor of a parameter's slot has another shape than it."""
    shape = slot.param.shape
    if slot.grad.shape == shape and all(x.shape == shape for x in slot.state.values()):
        return
    index = next(i for i, other in enumerate(group["params"]) if other is param)
    for what, tensor in (("the gradient", slot.grad), *slot.state.items()):
        if tensor.shape != shape:
            raise RuntimeError(
                f"The size of {what}, {tuple(tensor.shape)}, must match the size of parameter "
                f"{names_of(group)[index]}, {tuple(shape)}"
            )


def is_flat(slot: Slot) -> bool:
    """Whether all tensors of the slot list their elements in one order without gaps."""
    param, others = slot.param, (slot.grad, *slot.state.values())
    if type(param) not in PLAIN or param.is_neg() or param.layout != torch.strided:
        return False
    contiguous = param.is_contiguous()
    for other in others:
        if other.dtype != param.dtype or other.device != param.device:
            return False
        if type(other) not in PLAIN or other.is_neg() or other.layout != torch.strided:
            return False
        contiguous = contiguous and other.is_contiguous()
    if contiguous:
        return True
    order = sorted(range(param.ndim), key=param.stride, reverse=True)
    return param.permute(order).is_contiguous() and all(
        other.stride() == param.stride() for other in others
    )


def suits_fused(slot: Slot) -> bool:
    """Whether torch's fused step on a CPU is right for the slot: it takes all to lie alike."""
    param = slot.param
    return param.is_cpu and param.is_floating_point() and param.is_contiguous() and is_flat(slot)


def pieces(slots: list[Slot]) -> Iterator[list[Slot]]:
    """Flat slots in lists of about as many elements as one piece, large tensors cut."""
    limit = CPU_PIECE if slots and slots[0].param.is_cpu else DEVICE_PIECE
    batch: list[Slot] = []
    size = 0
    for slot in slots:
        for start in range(0, slot.param.numel(), limit):
            length = min(limit, slot.param.numel() - start)
            if batch and size + length > limit:
                yield batch
                batch, size = [], 0
            batch.append(_cut(slot, start, length))
            size += length
    if batch:
        yield batch


def _cut(slot: Slot, start: int, length: int) -> Slot:
    return slot.map(lambda x: x.as_strided((length,), (1,), x.storage_offset() + start))


def copy_back(widened: list[Slot], stored: list[Slot], names: tuple[str, ...]) -> None:
    """Stores parameters, and the state of these names, of slots that are float32 copies."""
    pairs = [(new.param, old.param) for new, old in zip(widened, stored, strict=True)]
    for new, old in zip(widened, stored, strict=True):
        pairs += [(new.state[name], old.state[name]) for name in names if name in old.state]
    sources, targets = zip(*pairs, strict=True)
    torch._foreach_copy_(list(targets), list(sources))


def names_of(group: Group) -> list[str]:
    """A name for each parameter of a group, for messages."""
    names = group.get("names") or group.get("param_names") or []
    if len(names) == len(group["params"]):
        return list(names)
    return [
        f"number {index} (shape {tuple(param.shape)})"
        for index, param in enumerate(group["params"])
    ]
