"""The step with torch's operations on lists of tensors, a cache-sized piece at a time."""

import math
from typing import Any

import torch
from torch import Tensor

from pnorm_decay.optim.layout import Slot, copy_back, flush_subnormal, is_16_bit, pieces
from pnorm_decay.optim.options import Group, Number
from pnorm_decay.optim.rules import Rule
from pnorm_decay.optim.shrink import Reweighted, Shrink

__all__ = ["run"]


def run(slots: list[Slot], rule: Rule, shrink: Shrink, group: Group) -> None:
    """Does one step of flat tensors of one device and dtype.

    The decay is a list operation for `Reweighted`; any other goes tensor by tensor.
    """
    listed = type(shrink) is Reweighted and not isinstance(shrink.p, Tensor)
    for stored in pieces(slots):
        narrow = is_16_bit(stored[0].param)
        moving = [slot.map(Tensor.float) for slot in stored] if narrow else stored
        params = [slot.param for slot in moving]
        if listed:
            known = _divisors(params, shrink)
            zeros = [param == 0 for param in params] if shrink.hold_zeros else []
        else:
            known = [shrink.before(s.param, old) for s, old in zip(moving, stored, strict=True)]
        rule.foreach_move(moving, group, shrink.alpha)
        if listed:
            torch._foreach_div_(params, known)
            for param, zero in zip(params, zeros, strict=False):
                param.masked_fill_(zero, 0)
            for param in params:
                torch.hardshrink(param, _largest_subnormal(param.dtype), out=param)
        else:
            for param, known_of_it in zip(params, known, strict=True):
                param.copy_(flush_subnormal(shrink.after(param, known_of_it)))
        if narrow:
            copy_back(moving, stored, rule.moments)


def _divisors(params: list[Tensor], shrink: Shrink) -> list[Any]:
    """`1 + strength |w|^(p-2) + l2` for each tensor; one number where it is the same for all w."""
    p, strength = shrink.p, shrink.alpha * shrink.lambda_p
    l2 = shrink.alpha * shrink.weight_decay
    if p == 2 or (not isinstance(strength, Tensor) and strength == 0):
        return [1 + strength + l2] * len(params)
    divisors = list(torch._foreach_abs(params))
    torch._foreach_log2_(divisors)
    torch._foreach_mul_(divisors, min(p - 2, 1e30))
    torch._foreach_add_(divisors, _log2(strength))
    for divisor in divisors:
        divisor.exp2_()  # twice as fast as exp on CPUs, but torch has no _foreach_exp2
    if isinstance(strength, Tensor):  # which is not looked at
        divisors = [torch.where(strength == 0, 0, divisor) for divisor in divisors]
    torch._foreach_add_(divisors, 1 + l2)
    return divisors


def _log2(strength: Number) -> Number:
    if isinstance(strength, Tensor):
        return strength.clamp(min=1e-37).log2()
    return math.log2(strength)


def _largest_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.tiny * (1 - info.eps)
