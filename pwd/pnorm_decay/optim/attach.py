"""p-norm weight decay for any torch optimizer."""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from pnorm_decay.optim.base import PNormDecayOptimizer
from pnorm_decay.optim.guards import refuse_complex, vectors, warn_of_stuck, warn_of_vectors
from pnorm_decay.optim.layout import flush_subnormal, local_part, widened
from pnorm_decay.optim.options import Group, check
from pnorm_decay.optim.shrink import Exact, Reweighted, Shrink

__all__ = ["PNormDecay", "attach_pnorm_decay"]

_DECAYING: WeakSet[Optimizer] = WeakSet()


class PNormDecay:
    """The decay that `attach_pnorm_decay` has added to an optimizer."""

    def __init__(self, optimizer: Optimizer, options: Group) -> None:
        if isinstance(optimizer, PNormDecayOptimizer) or optimizer in _DECAYING:
            raise ValueError(f"{type(optimizer).__name__} has p-norm weight decay already")
        self._optimizer, self._options = optimizer, options
        self._moving: list[tuple[Tensor, Shrink, Tensor]] = []
        self._checked_for_zeros: set[int] = set()
        self._unasked: set[int] = set()  # see warn_of_vectors
        for group in optimizer.param_groups:
            self._check(self._complete(group))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _DECAYING.add(optimizer)

    def detach(self) -> None:
        """Ends the decay; the groups keep their options."""
        for hook in self._hooks:
            hook.remove()
        _DECAYING.discard(self._optimizer)

    def _complete(self, group: Group) -> Group:
        """The group with all options: its own, or those given to `attach_pnorm_decay`."""
        if "lambda_p" not in group:
            self._unasked |= vectors(group["params"])
        for option, value in self._options.items():
            group.setdefault(option, value)
        return group

    def _check(self, group: Group) -> None:
        check({name: group[name] for name in self._options}, "the group")

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._moving.clear()
        for group in map(self._complete, optimizer.param_groups):
            self._check(group)
            params = [param for param in group["params"] if param.requires_grad]
            if not params or not (group["lambda_p"] or group["hold_zeros"]):
                continue
            refuse_complex(params, type(optimizer).__name__)
            owner = "attach_pnorm_decay"
            warn_of_vectors(optimizer.param_groups, self._unasked, owner, stacklevel=5)
            warn_of_stuck(params, group, self._checked_for_zeros, stacklevel=5)
            kind = Exact if group["exact"] else Reweighted
            common = (group["p"], group["lr"], group["lambda_p"])
            shrink = kind(*common, hold_zeros=group["hold_zeros"])
            for param in params:
                known = shrink.before(widened(local_part(param)), None)
                self._moving.append((param, shrink, known))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for param, shrink, known in self._moving:
            if param.grad is not None:
                w = local_part(param)
                w.copy_(flush_subnormal(shrink.after(widened(w), known)))
        self._moving.clear()


def attach_pnorm_decay(
    optimizer: Optimizer,
    *,
    p: float,
    lambda_p: float,
    exact: bool = False,
    hold_zeros: bool = False,
) -> PNormDecay:
    """Adds p-norm weight decay to any torch optimizer, through its public step hooks.

    Each step ends with `w <- w' / (1 + lr lambda_p |w|^(p-2))`, w' being the weight that the
    optimizer's own step has made of w and lr its group's learning rate before the step: the
    paper's update, with the direction of that optimizer. Its own weight decay stays: set it to 0.

    The options below become options of each parameter group that has none, so that groups can
    differ (those of `param_groups` do), schedulers can change them, and `state_dict` keeps them.
    During a step, one tensor of factors a parameter exists; between steps nothing is kept.
    AdamPWD and SGDPWD do the same in one pass over the memory and are several times faster.

    Args:
        optimizer: any optimizer whose gradients are dense.
        p: the norm's exponent, in (0, inf).
        lambda_p: the strength of the decay, in [0, inf).
        exact: the exact proximal step from w' instead, for p in (0, 2]; see `AdamPWD`.
        hold_zeros: whether a weight that is exactly 0 stays 0 whatever lambda_p is.

    Returns:
        A handle; its `detach()` ends the decay.

    Raises:
        ValueError: an option is out of its range, here or in a group, or the optimizer has p-norm
            weight decay already.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = torch.optim.NAdam([weight], lr=1e-3)
        >>> decay = attach_pnorm_decay(optimizer, p=0.8, lambda_p=1e-2)
    """
    options = {"p": p, "lambda_p": lambda_p, "exact": exact, "hold_zeros": hold_zeros}
    return PNormDecay(optimizer, options)
