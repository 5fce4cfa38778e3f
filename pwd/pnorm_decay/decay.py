"""The mathematics of p-norm weight decay (paper.md, "The method"): pure functions of tensors.

The penalty is `sum |w|^p / p`. For `p < 2` it has a second form with one auxiliary variable a
weight (Theorem 1.1), `min over s > 0 of { s w^2 / 2 + (2-p)/(2p) s^(-p/(2-p)) }`, reached at
`s = |w|^(p-2)`. At fixed s the proximal step in w is a division by `1 + step * s`, which is what
the optimizers apply: `shrink_factor`. With s at its minimum for the weight after the step, it is
the proximal step of the penalty itself: `proximal_factor`.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "auxiliary",
    "penalty",
    "proximal_factor",
    "proximal_fit",
    "proximal_table",
    "shrink_factor",
]

NEWTON_STEPS = 10  # to the last bit of float64, but for p within 1e-3 of 1
TABULATED_BELOW = 0.98  # the p of proximal_table; near 1 its z would be smaller than it knows
NEARLY_1 = 1e-6  # p that are nearer to 1 are 1: their differences would be lost in float32


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


def shrink_factor(w: Tensor, p: float | Tensor, step: float | Tensor) -> Tensor:
    """What a decay step multiplies a weight by, `1 / (1 + step * |w|^(p-2))`.

    It is evaluated as `sigmoid((2-p) log|w| - log(step))`, the same number for every p, in which
    no power of w appears that could overflow (`p < 2`, small w) or vanish (p near 0).

    Args:
        w: weights of any shape, floating point or complex.
        p: the norm's exponent, in (0, inf); a number or a one-element tensor on w's device.
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
        _check_step(step)
        if step == 0:
            return torch.ones_like(magnitude)
    if not isinstance(p, Tensor) and p == 2:
        return torch.ones_like(magnitude) / (1 + step)
    x = _widen(magnitude)
    zero = x == 0
    # The bound keeps (2-p) finite in float32, so that it times log(1) is 0 for any p.
    exponent = (2 - p).clamp(min=-1e30) if isinstance(p, Tensor) else max(2 - p, -1e30)
    # log(0) is replaced rather than used, because its derivative would be NaN.
    log_x = x.masked_fill(zero, 1).log()
    log_step = step.to(x).log() if isinstance(step, Tensor) else math.log(step)
    factor = torch.sigmoid(exponent * log_x - log_step)
    if isinstance(p, Tensor):
        at_zero = torch.where(p > 2, 1.0, torch.where(p == 2, 1 / (1 + step), 0.0))
        factor = torch.where(zero, at_zero.to(factor), factor)
    else:
        factor = factor.masked_fill(zero, float(p > 2))
    if isinstance(step, Tensor):
        factor = factor.masked_fill(step == 0, 1)
    return factor.to(magnitude.dtype)


def proximal_factor(v: Tensor, p: float, step: float | Tensor) -> Tensor:
    """What an exact decay step multiplies a weight by: `x / v`, x minimising its own penalty.

    `x = argmin_x (x - v)^2 / 2 + step |x|^p / p`. With `h = x / v` and `r = step |v|^(p-2)`, a
    minimiser other than 0 has `h + r h^(p-1) = 1`. For `p < 1` there is one up to the r of
    `survival_limit`; above it the minimiser is 0, as it is where both are equally good
    (generalised soft thresholding: Zuo et al., "A Generalized Iterated Shrinkage Algorithm for
    Non-convex Sparse Coding", 2013). At `p = 1` it is soft thresholding, `1 - r`; at `p = 2` both
    decay steps are one, `1 / (1 + step)`. Elsewhere Newton's method solves
    `log(h + r h^(p-1)) = 0` for log h: that function is convex, so that it converges from above.

    Args:
        v: weights of any shape, floating point.
        p: the norm's exponent, in (0, 2].
        step: `alpha * lambda_p`, in [0, inf); a number, or a tensor on v's device that broadcasts.

    Returns:
        A tensor of v's shape and dtype with values in [0, 1]. 16-bit dtypes are computed in
        float32.

    Raises:
        ValueError: p is not in (0, 2], or step is negative or NaN.
    """
    if not 0 < p <= 2:
        raise ValueError(f"Invalid p: {p} (must be in (0, 2])")
    x = _widen(v.abs())
    if not isinstance(step, Tensor):
        _check_step(step)
        if step == 0:
            return torch.ones_like(v)
    if p == 2:
        return (torch.ones_like(x) / (1 + step)).to(v.dtype)
    zero = x == 0
    log_step = step.to(x.dtype).log() if isinstance(step, Tensor) else math.log(step)
    log_r = log_step + (p - 2) * x.masked_fill(zero, 1).log()
    if abs(p - 1) < NEARLY_1:
        factor = (1 - log_r.exp()).clamp(min=0)
    else:
        a = p - 1
        if p > 1:  # of both terms, the one that is 1 on its own
            log_h = (-log_r / a).clamp(max=0)
        else:  # between where two solutions meet, at r = branch, and 1
            limit, branch = survival_limit(p)
            vanishes = log_r > math.log(limit)
            log_r = log_r.masked_fill(vanishes, math.log(limit))
            meeting = -a / (1 - a)
            log_h = (meeting + (1 - meeting) * (1 - log_r.exp() / branch).sqrt()).log()
        for _ in range(NEWTON_STEPS):
            share = torch.sigmoid((a - 1) * log_h + log_r)  # of r h^(p-1) in the sum
            log_h = log_h - torch.logaddexp(log_h, a * log_h + log_r) / (1 + (a - 1) * share)
        factor = log_h.exp()
        if p < 1:
            factor = factor.masked_fill(vanishes, 0)
    return factor.masked_fill(zero, 0).to(v.dtype)


def survival_limit(p: float) -> tuple[float, float]:
    """Two values of `r = step |v|^(p-2)` for `p < 1`, the ends of an exact step's survivors.

    Up to the first a weight survives; up to the second its penalised problem has a stationary point
    other than 0. With q = 1 - p, both are `(1 - h) h^q`: where the solution has come down to
    `h = 2q / (1 + q)`, no better than 0, and where it meets the other one, `h = q / (1 + q)`.
    """
    q = 1 - p
    limit = p / (1 + q) * (2 * q / (1 + q)) ** q
    branch = 1 / (1 + q) * (q / (1 + q)) ** q
    return limit, branch


class ProximalFit(NamedTuple):
    """`(1 - h) / r` as a polynomial; h, r, limit and branch as in `proximal_factor`.

    Its variable is `slope x + offset` with `x = sqrt(1 - r / branch)` for `p < 1`, where that
    root is what keeps h from being smooth, and `x = r` for `p > 1`. Up to `r = limit` it is good to
    1e-8 for p up to 0.98 and for p from 1.01 on, to 1e-5 elsewhere.
    """

    limit: float
    branch: float
    slope: float
    offset: float
    coefficients: tuple[float, ...]  # the highest power last


@lru_cache(64)
def proximal_fit(p: float, degree: int = 10) -> ProximalFit:
    """The fit for one p in (0, 2]: what compiled code evaluates instead of iterating."""
    if abs(p - 1) < NEARLY_1 or p == 2:
        return ProximalFit(1, 1, 1, 0, (0.0,) * (degree + 1))
    limit, branch = survival_limit(p) if p < 1 else (0.25, 1.0)
    low, high = ((1 - limit / branch) ** 0.5, 1.0) if p < 1 else (0.0, limit)
    order = torch.arange(degree + 1, dtype=torch.float64, device="cpu")
    nodes = torch.cos(torch.pi * (order + 0.5) / (degree + 1))  # Chebyshev's
    x = low + (high - low) * (nodes + 1) / 2
    r = branch * (1 - x**2) if p < 1 else x
    values = (1 - proximal_factor(torch.ones_like(r), p, r)) / r
    coefficients = torch.linalg.solve(nodes[:, None] ** order, values)
    slope = 2 / (high - low)
    return ProximalFit(limit, branch, slope, -1 - slope * low, tuple(coefficients.tolist()))


@lru_cache(64)
def proximal_table(p: float) -> Tensor:
    """The h of `proximal_factor` for one p as a table, for code that can look 16 up at once.

    With `u = |v| / threshold`, which is 1 at the limit's r and u0 at the branch's, h is smooth in
    `z = sqrt(u - u0)`. For each exponent of z as a float32 and first bit of its mantissa, from
    `2^-4` to `2^12`, `1 - h` is a polynomial in `mantissa - 1.5`; beyond, it is below `2^-24`.

    Args:
        p: the norm's exponent, in (0, 0.98).

    Returns:
        The coefficients, float32 of shape (7, 32), from the constant ones on. The polynomial of z
        is in column `(bits >> 22) & 31` of its bits.

    Raises:
        ValueError: p is out of its range.
    """
    if not 0 < p < TABULATED_BELOW:
        raise ValueError(f"Invalid p: {p} (must be in (0, {TABULATED_BELOW}))")
    limit, branch = survival_limit(p)
    order = torch.arange(7, dtype=torch.float64, device="cpu")
    places = torch.arange(2 * -4, 2 * 12, device="cpu")[:, None]  # two for each power of 2
    nodes = torch.cos(torch.pi * (order + 0.5) / len(order))  # Chebyshev's
    mantissa = 1 + (places % 2) / 2 + (nodes + 1) / 4
    u = (mantissa * 2.0 ** (places // 2)) ** 2 + (limit / branch) ** (1 / (2 - p))
    r = limit * u ** (p - 2)
    h = torch.ones_like(r)
    for _ in range(50):  # Newton's method from above, for a convex function
        h -= (h + r * h ** (p - 1) - 1) / (1 + (p - 1) * r * h ** (p - 2))
    coefficients = torch.linalg.solve((mantissa[:, :, None] - 1.5) ** order, 1 - h)
    return coefficients.T.roll((2 * (127 - 4)) % 32, 1).float().contiguous()


def _check_p(p: float | Tensor) -> None:
    if not isinstance(p, Tensor) and not 0 < p < math.inf:
        raise ValueError(f"Invalid p: {p} (must be positive and finite)")


def _check_step(step: float) -> None:
    if not step >= 0:
        raise ValueError(f"Invalid step: {step} (must be at least 0)")


def _widen(x: Tensor) -> Tensor:
    """16-bit floating point as float32; anything else unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
