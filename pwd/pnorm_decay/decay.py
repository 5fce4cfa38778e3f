"""The mathematics of p-norm weight decay (paper.md, "The method"): pure functions of tensors.

The penalty is `sum |w|^p / p`. For `p < 2` it has a second form with one auxiliary variable a
weight (Theorem 1.1), `min over s > 0 of { s w^2 / 2 + (2-p)/(2p) s^(-p/(2-p)) }`, reached at
`s = |w|^(p-2)`. At fixed s the proximal step in w is a division by `1 + step * s`, which is what
the optimizers apply.
"""

import math

import torch
from torch import Tensor

__all__ = ["auxiliary", "penalty", "shrink_factor"]


def penalty(w: Tensor, p: float) -> Tensor:
    """The penalty of the paper, `sum_i |w_i|^p / p`.

    Multiply by `lambda_p` for the term of the paper's objective. Its gradient diverges at 0 for
    `p < 1`: minimise it with the optimizers of this package, not by adding it to the loss.

    Args:
        w: weights of any shape, floating point or complex.
        p: the norm's exponent, in (0, inf).

    Returns:
        A scalar of w's real dtype (float32 for the 16-bit dtypes); infinite only where the sum
        itself exceeds that dtype's range.

    Raises:
        ValueError: p is not a positive finite number.
    """
    _check_p(p)
    return _widen(w).abs().pow(p).sum() / p


def auxiliary(w: Tensor, p: float) -> Tensor:
    """The auxiliary variable at its minimum, `s = |w|^(p-2)`.

    Args:
        w: weights of any shape, floating point or complex.
        p: the norm's exponent, in (0, inf).

    Returns:
        A tensor of w's shape and real dtype. At `w = 0` it is infinite for `p < 2`, 1 for
        `p = 2` and 0 for `p > 2`; `shrink_factor` is the form that is finite everywhere.

    Raises:
        ValueError: p is not a positive finite number.
    """
    _check_p(p)
    magnitude = w.abs()
    return _widen(magnitude).pow(p - 2).to(magnitude.dtype)


def shrink_factor(w: Tensor, p: float, step: float | Tensor) -> Tensor:
    """What a decay step multiplies a weight by, `1 / (1 + step * |w|^(p-2))`.

    It is evaluated as `sigmoid((2-p) log|w| - log(step))`, the same number for every p, in which
    no power of w appears that could overflow (`p < 2`, small w) or vanish (p near 0).

    Args:
        w: weights of any shape, floating point or complex.
        p: the norm's exponent, in (0, inf).
        step: `alpha * lambda_p`, learning rate times strength, in [0, inf); a number or a
            one-element tensor on w's device.

    Returns:
        A tensor of w's shape and real dtype with values in [0, 1]: 1 everywhere if `step = 0`,
        else exactly 0 (`p < 2`), `1 / (1 + step)` (`p = 2`) or exactly 1 (`p > 2`) at `w = 0`.
        16-bit dtypes are computed in float32.

    Raises:
        ValueError: p is not a positive finite number, or step is negative or NaN.
    """
    _check_p(p)
    magnitude = w.abs()
    if not isinstance(step, Tensor):
        if not step >= 0:
            raise ValueError(f"Invalid step: {step} (must be at least 0)")
        if step == 0:
            return torch.ones_like(magnitude)
    if p == 2:
        return torch.ones_like(magnitude) / (1 + step)
    x = _widen(magnitude)
    zero = x == 0
    # The bound keeps (2-p) finite in float32, so that it times log(1) is 0 for any p.
    exponent = max(2 - p, -1e30)
    # log(0) is replaced rather than used, because its derivative would be NaN.
    log_x = x.masked_fill(zero, 1).log()
    if isinstance(step, Tensor):
        factor = torch.sigmoid(exponent * log_x - step.to(x).log())
        factor = factor.masked_fill(zero, float(p > 2)).masked_fill(step == 0, 1)
    else:
        factor = torch.sigmoid(exponent * log_x - math.log(step))
        factor = factor.masked_fill(zero, float(p > 2))
    return factor.to(magnitude.dtype)


def _check_p(p: float) -> None:
    if not 0 < p < math.inf:
        raise ValueError(f"Invalid p: {p} (must be positive and finite)")


def _widen(x: Tensor) -> Tensor:
    """16-bit floating point as float32; anything else unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
