"""p-norm weight decay for any torch optimizer."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pnorm_decay.decay import shrink_factor
from pnorm_decay.optim.base import (
    Group,
    check_decay,
    flush_subnormal,
    local,
    refuse_complex,
    warn_of_stuck,
    wide,
)

__all__ = ["PNormDecay", "attach_pnorm_decay"]


class PNormDecay:
    """The decay that `attach_pnorm_decay` has added to an optimizer."""

    def __init__(self, optimizer: Optimizer, p: float, lambda_p: float) -> None:
        self._options = {"p": p, "lambda_p": lambda_p}
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._met_decay: set[int] = set()
        for group in optimizer.param_groups:
            check_decay(self._complete(group))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Ends the decay; the groups keep their options `p` and `lambda_p`."""
        for hook in self._hooks:
            hook.remove()

    def _complete(self, group: Group) -> Group:
        """The group with both options: its own, or those given to `attach_pnorm_decay`."""
        for option, value in self._options.items():
            group.setdefault(option, value)
        return group

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._factors.clear()
        for group in map(self._complete, optimizer.param_groups):
            check_decay(group)
            step = group["lr"] * group["lambda_p"]
            params = [param for param in group["params"] if param.requires_grad]
            if not group["lambda_p"] or not params:
                continue
            refuse_complex(params, type(optimizer).__name__)
            warn_of_stuck(params, group, self._met_decay)
            for param in params:
                w = wide(local(param))
                self._factors.append((param, shrink_factor(w, group["p"], step)))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for param, factor in self._factors:
            if param.grad is not None:
                w = local(param)
                w.copy_(flush_subnormal(wide(w) * factor))
        self._factors.clear()


def attach_pnorm_decay(optimizer: Optimizer, *, p: float, lambda_p: float) -> PNormDecay:
    """Adds p-norm weight decay to any torch optimizer, through its public step hooks.

    Each step ends with `w <- w' / (1 + lr lambda_p |w|^(p-2))`, w' being the weight that the
    optimizer's own step has made of w and lr its group's learning rate before the step: the
    paper's update, with the direction of that optimizer. Its own weight decay stays: set it to 0.

    p and lambda_p become options of each parameter group that has none, so that groups can
    differ (those of `param_groups` do), schedulers can change them, and `state_dict` keeps them.
    During a step, one tensor of factors a parameter exists; between steps nothing is kept.
    AdamPWD and SGDPWD do the same in one pass over the memory and are several times faster.

    Args:
        optimizer: any optimizer whose gradients are dense.
        p: the norm's exponent, in (0, inf).
        lambda_p: the strength of the decay, in [0, inf).

    Returns:
        A handle; its `detach()` ends the decay.

    Raises:
        ValueError: p or lambda_p is out of its range, here or in a group.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = torch.optim.NAdam([weight], lr=1e-3)
        >>> decay = attach_pnorm_decay(optimizer, p=0.8, lambda_p=1e-2)
    """
    return PNormDecay(optimizer, p, lambda_p)
