"""Every option of a parameter group: what it may be, and the message where it is something else."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Group", "Number", "check", "decays", "floats"]

Group = dict[str, Any]
Number = float | Tensor  # a tensor has one element


class Option(NamedTuple):
    """What an option may be."""

    is_valid: Callable[[Any], bool]
    allowed: str  # how a message says it


AT_LEAST_0 = Option(lambda v: 0 <= v < math.inf, "at least 0 and finite")
OPTIONS = {
    "lr": AT_LEAST_0,
    "p": Option(lambda v: 0 < v < math.inf, "positive and finite"),
    "lambda_p": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "reweight_every": Option(lambda v: isinstance(v, int) and v >= 1, "an integer of at least 1"),
    "auxiliary_beta": Option(lambda v: 0 <= v < 1, "in [0, 1)"),
    "betas": Option(lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
    "eps": Option(lambda v: v >= 0, "at least 0"),
    "momentum": AT_LEAST_0,
    "dampening": Option(math.isfinite, "finite"),
}


def check(group: Group, owner: str, names: Iterable[str] = OPTIONS) -> None:
    """Checks a group's options, each alone and those that exclude each other.

    The value of a tensor is not looked at: every step would wait for its device.

    Args:
        group: a parameter group.
        owner: who takes the options, for messages.
        names: the options to check; those that the group lacks are left out.

    Raises:
        ValueError: an option is missing or out of its range; the message names it and its value.
        RuntimeError: two options exclude each other.
    """
    missing = None
    for name in names:
        if name not in group:
            continue
        value = group[name]
        if value is None:
            missing = missing or name
        elif not isinstance(value, Tensor):
            option = OPTIONS[name]
            try:
                valid = option.is_valid(value)
            except TypeError:
                valid = False
            if not valid:
                allowed = option.allowed
                if isinstance(value, str):
                    allowed = f"a number, not a text; {allowed}"
                shown = repr(value) if isinstance(value, str) else value
                raise ValueError(f"Invalid {name}: {shown} (must be {allowed})")
    if missing:
        raise ValueError(f"Missing {missing}: give it to {owner}")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening "
            f"(momentum={group['momentum']}, dampening={group['dampening']})"
        )
    if group.get("exact"):
        p = group["p"]
        if isinstance(p, Tensor) or p > 2:
            raise ValueError(f"Invalid p: {p} (must be a number in (0, 2] with exact=True)")
        for name, plain in (("reweight_every", 1), ("auxiliary_beta", 0)):
            if group.get(name, plain) != plain:
                raise RuntimeError(f"`exact` and `{name}` exclude each other: s has no delay there")
    if group.get("fused") and (group["foreach"] or group["differentiable"]):
        other = "foreach" if group["foreach"] else "differentiable"
        raise RuntimeError(f"`fused` and `{other}` cannot be `True` together")


def floats(values: Any) -> Any:
    """A tuple of floats; what is none stays as it is, for `check` to name it."""
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError):
        return values


def decays(group: Group) -> bool:
    """Whether a group's step is more than the plain rule's."""
    strengths = (group["lambda_p"], group.get("weight_decay", 0))
    return group["hold_zeros"] or any(isinstance(v, Tensor) or v != 0 for v in strengths)
