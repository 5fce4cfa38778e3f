"""Adam with an exact proximal step for the norms that have one in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

CLOSED_FORMS = (0.0, 1 / 2, 2 / 3, 1.0, 3 / 2)


def proximal_map(v: Tensor, p: float, step: float) -> Tensor:
    """The minimiser over x of `(x - v)^2 / 2 + step * |x|^p / p`, in closed form.

    For p = 0 the penalty is `step * [x != 0]`. Where 0 and another point are both minimisers (at
    the threshold, for p < 1), the result is 0.

    - p = 0: v where `v^2 > 2 step`, else 0 (hard threshold).
    - p = 1/2 and 2/3: 0 up to a threshold, above it the largest root of the cubic (quartic) that
      the derivative is in `sqrt(x)` (`x^(1/3)`): Xu et al., "L1/2 Regularization: A Thresholding
      Representation Theory and a Fast Solver", 2012; Cao et al., "Fast Image Deconvolution Using
      Closed-Form Thresholding Formulas of Lq (q = 1/2, 2/3) Regularization", 2013.
    - p = 1: `sign(v) max(|v| - step, 0)` (soft threshold).
    - p = 3/2: the square of the positive root of `z^2 + step z - |v|`; 0 only at v = 0.

    Args:
        v: any shape, floating point.
        p: 0, 1/2, 2/3 (anything within 0.001 of it), 1 or 3/2.
        step: strength of the penalty, in [0, inf).

    Returns:
        A tensor of v's shape and dtype.

    Raises:
        ValueError: there is no closed form for p here, or step is negative or not finite.
    """
    p = closed_form(p)
    if not 0 <= step < math.inf:
        raise ValueError(f"Invalid step: {step} (must be at least 0 and finite)")
    if step < 1e-30:  # below what float32 resolves, and the powers below would overflow
        return v.clone()
    return _MAPS[p](v, step)


def closed_form(p: float) -> float:
    """The exponent of `CLOSED_FORMS` that p stands for.

    Raises:
        ValueError: it is none of them.
    """
    for known in CLOSED_FORMS:
        if math.isclose(p, known, abs_tol=1e-3):
            return known
    raise ValueError(f"Invalid p: {p} (must be 0, 0.5, 0.667, 1 or 1.5)")


def _hard_threshold(v: Tensor, step: float) -> Tensor:
    return F.hardshrink(v, math.sqrt(2 * step))


def _half(v: Tensor, step: float) -> Tensor:
    # With x = (2 step)^(2/3) r^2 the derivative is r^3 - c r + 1/2 = 0, and the threshold c = 3/2.
    scale = (2 * step) ** (2 / 3)

    def root(c: Tensor) -> Tensor:
        return 2 * (c / 3).sqrt() * (torch.arccos(-math.sqrt(27) / 4 * c**-1.5) / 3).cos()

    return _above(v, 1.5 * scale, lambda size: scale * root(size / scale) ** 2)


def _two_thirds(v: Tensor, step: float) -> Tensor:
    # With x = step^(3/4) r^3 the derivative is r^4 - c r + 1 = 0, and the threshold c = 2. The
    # quartic is (r^2 + a r + ..)(r^2 - a r + ..), where m = a^2 solves m^3 - 4 m - c^2 = 0.
    scale = step**0.75

    def root(c: Tensor) -> Tensor:
        m = 4 / math.sqrt(3) * (torch.arccosh(math.sqrt(27) / 16 * c**2) / 3).cosh()
        a = m.sqrt()
        return (a + (2 * c / a - m).sqrt()) / 2

    return _above(v, 2 * scale, lambda size: scale * root(size / scale) ** 3)


def _above(v: Tensor, threshold: float, shrunk: Callable[[Tensor], Tensor]) -> Tensor:
    """0 where `|v| <= threshold`; elsewhere v with the size that a function makes of its size."""
    size = v.abs().double()  # roots of polynomials cancel badly in float32
    kept = size > threshold
    result = torch.zeros_like(v)
    result[kept] = torch.copysign(shrunk(size[kept]).to(v.dtype), v[kept])
    return result


def _soft_threshold(v: Tensor, step: float) -> Tensor:
    return F.softshrink(v, step)


def _three_halves(v: Tensor, step: float) -> Tensor:
    # (sqrt(step^2 + 4 |v|) - step) / 2 without the cancellation.
    size = v.abs()
    root = 2 * size / (step + (step**2 + 4 * size).sqrt())
    return torch.copysign(root**2, v)


_MAPS: dict[float, Callable[[Tensor, float], Tensor]] = {
    0.0: _hard_threshold,
    1 / 2: _half,
    2 / 3: _two_thirds,
    1.0: _soft_threshold,
    3 / 2: _three_halves,
}


class ProximalAdam(Adam):
    """Adam, then the exact proximal step of `lambda_p |w|^p / p` with step size lr.

    `w <- prox(w - lr u)`, decoupled: the proximal problem has the plain Euclidean distance and not
    Adam's metric, as pWD's step has. Where pWD divides by what the weight was, this minimises
    exactly; it exists for p = 0 (`lambda_p [w != 0]`), 1/2, 2/3, 1 and 3/2 alone.

    Args:
        params: parameters or groups; `p` and `lambda_p` are options of a group.
        p: the norm's exponent, see `proximal_map`.
        lambda_p: the strength, in [0, inf).
        options: those of `torch.optim.Adam`.

    Raises:
        ValueError: p has no closed form here or lambda_p is out of its range.
    """

    def __init__(self, params: Any, *, p: float, lambda_p: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults |= {"p": p, "lambda_p": lambda_p}
        for group in self.param_groups:
            group.setdefault("p", p)
            group.setdefault("lambda_p", lambda_p)
            closed_form(group["p"])
            if not 0 <= group["lambda_p"] < math.inf:
                raise ValueError(f"Invalid lambda_p: {group['lambda_p']} (must be in [0, inf))")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Performs one step; as in torch."""
        loss = super().step(closure)
        for group in self.param_groups:
            step = float(group["lr"]) * group["lambda_p"]
            for param in group["params"]:
                if step and param.grad is not None:
                    param.copy_(proximal_map(param, group["p"], step))
        return loss
