"""Adam with the Lp norm in the loss: the method that fails for p < 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Adam


class CoupledAdam(Adam):
    """Adam on `loss + lambda_p * sum |w|^p / p`: the penalty's gradient goes through Adam.

    The gradient `lambda_p sign(w) |w|^(p-1)` is added to the loss's before the moments are updated
    (Figure 1's dotted line is its counterpart for gradient descent). For p < 1 it diverges at 0, so
    that a weight is thrown back and forth across 0 and never settles there. At exactly 0, where
    the penalty has no gradient, nothing is added.

    Args:
        params: parameters or groups; `p` and `lambda_p` are options of a group.
        p: the norm's exponent, in (0, inf).
        lambda_p: the strength, in [0, inf).
        options: those of `torch.optim.Adam`.

    Raises:
        ValueError: p or lambda_p is out of its range.
    """

    def __init__(self, params: Any, *, p: float, lambda_p: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults |= {"p": p, "lambda_p": lambda_p}
        for group in self.param_groups:
            group.setdefault("p", p)
            group.setdefault("lambda_p", lambda_p)
            if not 0 < group["p"] < math.inf:
                raise ValueError(f"Invalid p: {group['p']} (must be positive and finite)")
            if not 0 <= group["lambda_p"] < math.inf:
                raise ValueError(f"Invalid lambda_p: {group['lambda_p']} (must be in [0, inf))")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Performs one step; as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if group["lambda_p"] and param.grad is not None:
                    slope = param.abs().pow(group["p"] - 1).masked_fill(param == 0, 0)
                    param.grad.add_(param.sign() * slope, alpha=group["lambda_p"])
        super().step()
        return loss
