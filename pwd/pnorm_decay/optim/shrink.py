"""What the decay makes of a moved weight. A new decay is a class here, and nothing more.

The notation of this folder:

    w       the weight before the step
    u       the direction, from `rules.py`
    alpha   the group's present learning rate
    moved   w - alpha u
    s       the auxiliary variable, |w|^(p-2)
    q       1 / (1 + s), in [0, 1], which stands for s where s has a state

The denominator `1 + alpha (lambda_p s + weight_decay)` is written as `(1 + step s) / scale` with
`scale = 1 / (1 + alpha weight_decay)` and `step = alpha lambda_p scale`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pnorm_decay.decay import proximal_factor, shrink_factor, survival_limit
from pnorm_decay.optim.layout import Slot, flush_subnormal, widened
from pnorm_decay.optim.options import Group, Number

__all__ = ["Delayed", "Exact", "Reweighted", "Shrink", "shrink_of"]


@dataclass
class Shrink:
    """The decay of one group in one step; `before` and `after` surround the weight's move."""

    p: Any
    alpha: Number
    lambda_p: Number
    weight_decay: float = 0.0
    hold_zeros: bool = False

    def __post_init__(self) -> None:
        self.scale = 1 / (1 + self.alpha * self.weight_decay)
        self.step = self.alpha * self.lambda_p * self.scale

    def before(self, w: Tensor, slot: Slot | None) -> Tensor:
        """What has to be known of w before it moves; w is widened, the slot holds its state."""
        raise NotImplementedError

    def after(self, moved: Tensor, known: Tensor) -> Tensor:
        """The weight after the step."""
        raise NotImplementedError

    def _held(self, w: Tensor, factor: Tensor) -> Tensor:
        return factor.masked_fill(w == 0, 0) if self.hold_zeros else factor


class Reweighted(Shrink):
    """The paper's: `w <- moved / (1 + alpha lambda_p s)`, with s from the weight before."""

    def before(self, w: Tensor, slot: Slot | None) -> Tensor:
        return self._held(w, shrink_factor(w, self.p, self.step))

    def after(self, moved: Tensor, known: Tensor) -> Tensor:
        return moved * (known * self.scale)


@dataclass
class Delayed(Reweighted):
    """The same with s refreshed every so many steps, or following |w|^(p-2) slowly, as q."""

    every: int = 1
    beta: float = 0.0

    def before(self, w: Tensor, slot: Slot | None) -> Tensor:
        assert slot is not None
        q, fresh = widened(slot.state["auxiliary"]), shrink_factor(w, self.p, 1)
        refresh = torch.as_tensor((slot.step - 1) % self.every == 0, device=q.device)
        q = torch.lerp(q, fresh, refresh.to(q.dtype) * (1 - self.beta))
        slot.state["auxiliary"].copy_(flush_subnormal(q))
        q = widened(slot.state["auxiliary"])
        factor = (q / (q + self.step * (1 - q))).nan_to_num(1)  # 0 / 0 where step = 0
        return self._held(w, factor)


class Exact(Shrink):
    """The proximal step of the penalty itself: s is that of the weight after the step."""

    def before(self, w: Tensor, slot: Slot | None) -> Tensor:
        return self._held(w, torch.ones_like(w)) if self.hold_zeros else w.new_ones(())

    def after(self, moved: Tensor, known: Tensor) -> Tensor:
        moved = moved * self.scale
        return moved * proximal_factor(moved, self.p, self.step) * known


def shrink_of(group: Group, alpha: Number) -> Shrink:
    """The decay that the group's options ask for, at a learning rate."""
    common = (group["p"], alpha, group["lambda_p"], group["weight_decay"], group["hold_zeros"])
    if group["exact"]:
        return Exact(*common)
    every, beta = group["reweight_every"], group["auxiliary_beta"]
    return Delayed(*common, every, beta) if every > 1 or beta > 0 else Reweighted(*common)


class Fit(NamedTuple):
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


@cache
def fit(p: float, degree: int = 10) -> Fit:
    """What the native backend evaluates instead of solving an equation for each weight."""
    if p == 1 or p == 2:
        return Fit(1, 1, 1, 0, (0.0,) * (degree + 1))
    limit, branch = survival_limit(p) if p < 1 else (0.25, 1.0)
    low, high = ((1 - limit / branch) ** 0.5, 1.0) if p < 1 else (0.0, limit)
    order = torch.arange(degree + 1, dtype=torch.float64)
    nodes = torch.cos(torch.pi * (order + 0.5) / (degree + 1))  # Chebyshev's
    x = low + (high - low) * (nodes + 1) / 2
    r = branch * (1 - x**2) if p < 1 else x
    values = (1 - proximal_factor(torch.ones_like(r), p, r)) / r
    coefficients = torch.linalg.solve(nodes[:, None] ** order, values)
    slope = 2 / (high - low)
    return Fit(limit, branch, slope, -1 - slope * low, tuple(coefficients.tolist()))
