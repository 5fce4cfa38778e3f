"""Adam with the exact proximal step of the p norm, p = 0 included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import Adam, Optimizer

from pnorm_decay.optim import AdamPWD


def ProximalAdam(  # noqa: N802  a class to those who use it, and the recorded run ids hold its name
    params: Any, *, p: float, lambda_p: float, **options: Any
) -> Optimizer:
    """Adam, then the exact proximal step: `AdamPWD(exact=True)`, and `HardThresholdAdam` for p = 0.

    Args:
        params: parameters or groups; `lambda_p` is an option of a group.
        p: the norm's exponent, in [0, 2].
        lambda_p: the strength, in [0, inf).
        options: those of `torch.optim.Adam`.

    Raises:
        ValueError: p or lambda_p is out of its range.
    """
    if p == 0:
        return HardThresholdAdam(params, lambda_p=lambda_p, **options)
    return AdamPWD(params, p=p, lambda_p=lambda_p, exact=True, **options)


class HardThresholdAdam(Adam):
    """Adam, then the exact proximal step of `lambda_p [w != 0]`: 0 where `w^2 <= 2 lr lambda_p`.

    Args:
        params: parameters or groups; `lambda_p` is an option of a group.
        lambda_p: the strength, in [0, inf).
        options: those of `torch.optim.Adam`.

    Raises:
        ValueError: lambda_p is out of its range.
    """

    def __init__(self, params: Any, *, lambda_p: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults |= {"p": 0.0, "lambda_p": lambda_p}
        for group in self.param_groups:
            group.setdefault("lambda_p", lambda_p)
            if not 0 <= group["lambda_p"] < math.inf:
                raise ValueError(f"Invalid lambda_p: {group['lambda_p']} (must be in [0, inf))")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Performs one step; as in torch."""
        loss = super().step(closure)
        for group in self.param_groups:
            threshold = math.sqrt(2 * float(group["lr"]) * group["lambda_p"])
            for param in group["params"]:
                if threshold and param.grad is not None:
                    param.copy_(F.hardshrink(param, threshold))
        return loss
