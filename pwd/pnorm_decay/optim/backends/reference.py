"""The definition: any rule with any shrink, one tensor at a time, as the paper writes it."""

from pnorm_decay.optim.layout import Slot, flush_subnormal, widened
from pnorm_decay.optim.options import Group
from pnorm_decay.optim.rules import Rule
from pnorm_decay.optim.shrink import Shrink

__all__ = ["run"]


def run(slot: Slot, rule: Rule, shrink: Shrink, group: Group) -> None:
    """Does one step of one tensor."""
    w, grad = widened(slot.param), widened(slot.grad)
    known = shrink.before(w, slot)
    u = rule.direction(-grad if group["maximize"] else grad, slot, group)
    w = shrink.after(w - shrink.alpha * u, known)
    slot.param.copy_(flush_subnormal(w))
