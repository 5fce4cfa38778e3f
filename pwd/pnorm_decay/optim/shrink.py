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
from typing import Any, ClassVar

import torch
from torch import Tensor

from pnorm_decay.decay import NEARLY_1, proximal_factor, shrink_factor
from pnorm_decay.optim.layout import Slot, flush_subnormal, local_part, widened
from pnorm_decay.optim.options import Group, Number

__all__ = ["Delayed", "Exact", "Reweighted", "Shrink", "shrink_of"]


@dataclass
class Shrink:
    """The decay of one group in one step; `before` and `after` surround the weight's move.

    Attributes:
        names: of the entries that it keeps in each parameter's state.
    """

    names: ClassVar[tuple[str, ...]] = ()
    p: Any
    alpha: Number
    lambda_p: Number
    weight_decay: float = 0.0
    hold_zeros: bool = False

    def __post_init__(self) -> None:
        self.scale = 1 / (1 + self.alpha * self.weight_decay)
        self.step = self.alpha * self.lambda_p * self.scale

    def complete(self, state: dict[str, Any], param: Tensor) -> None:
        """Adds the entries of `names` that a parameter's state lacks."""

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
    names: ClassVar[tuple[str, ...]] = ("auxiliary",)

    def complete(self, state: dict[str, Any], param: Tensor) -> None:
        if "auxiliary" not in state:
            state["auxiliary"] = torch.zeros_like(param)
            local_part(state["auxiliary"]).copy_(shrink_factor(local_part(param), self.p, 1))

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.p - 1) < NEARLY_1:
            self.p = 1

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
