"""Three ways to do one step: reference, foreach and native; this file chooses."""

import torch

from pnorm_decay.optim.backends import foreach, native, reference
from pnorm_decay.optim.layout import Slot, is_flat
from pnorm_decay.optim.options import Group
from pnorm_decay.optim.rules import Rule
from pnorm_decay.optim.shrink import Shrink

__all__ = ["run"]


def run(slots: list[Slot], rule: Rule, shrink: Shrink, group: Group) -> None:
    """Moves and decays each slot, by torch's rules of which implementation to take.

    With foreach and fused both None it is the native step where it can be had for the device, the
    dtype and the shrink, else foreach; with both False it is the reference. Tensors whose memory
    has gaps, or another order than their gradient's, take the reference, too.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Slot]] = {}
    for slot in slots:
        kinds.setdefault((slot.param.device, slot.param.dtype), []).append(slot)
    automatic = group["foreach"] is None and group["fused"] is None
    if group["differentiable"] or not (automatic or group["foreach"] or group["fused"]):
        kinds.clear()
    done: set[int] = set()
    for (device, dtype), alike in kinds.items():
        flat = [slot for slot in alike if is_flat(slot)]
        wanted = not group["foreach"] and native.supports(shrink)
        kernel = native.kernel(device, dtype) if wanted else None
        if kernel is not None:
            native.run(flat, rule, shrink, group, kernel)
        else:
            foreach.run(flat, rule, shrink, group)
        done.update(map(id, flat))
    for slot in slots:
        if id(slot) not in done:
            reference.run(slot, rule, shrink, group)
