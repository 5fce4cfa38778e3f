"""What a step cannot do, or does to the user's surprise: refusals and warnings."""

import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pnorm_decay.optim.layout import PLAIN, names_of, whole
from pnorm_decay.optim.options import Group

__all__ = [
    "refuse_capture",
    "refuse_complex",
    "refuse_misfits",
    "vectors",
    "warn_of_stuck",
    "warn_of_vectors",
]


def refuse_complex(params: list[Tensor], owner: str) -> None:
    """Raises RuntimeError if a parameter is complex."""
    if any(param.is_complex() for param in params):
        raise RuntimeError(
            f"{owner} does not decay complex parameters: put them into a group with lambda_p=0 "
            "and weight_decay=0"
        )


def refuse_capture(owner: str) -> None:
    """Raises RuntimeError if what runs now is recorded in a CUDA graph."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {owner} but "
            "param_groups' capturable is False."
        )


def refuse_misfits(
    states: Mapping[Any, Any], saved: list[Group], groups: list[Group], names: tuple[str, ...]
) -> None:
    """Raises ValueError if a state to load has another shape than its parameter.

    Args:
        states: the saved states by the keys that the saved groups list.
        saved: the saved groups; where they differ in number or size, torch refuses them.
        groups: the optimizer's groups.
        names: of the entries that have their parameter's shape.
    """
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return
    keys = chain.from_iterable(group["params"] for group in saved)
    named = chain.from_iterable(
        zip(group["params"], names_of(group), strict=True) for group in groups
    )
    for key, (param, name) in zip(keys, named, strict=True):
        for what in names:
            value = states.get(key, {}).get(what)
            if value is not None and value.shape != param.shape:
                raise ValueError(
                    f"The state to load does not fit parameter {name}: {what} has the shape "
                    f"{tuple(value.shape)}, the parameter {tuple(param.shape)}"
                )


def warn_of_stuck(
    params: list[Tensor], group: Group, checked: set[int], *, stacklevel: int
) -> None:
    """Warns of parameters that decay with p < 2 holds at 0 from the start.

    Args:
        params: some of the group's parameters.
        group: their group.
        checked: the ids of parameters that have been looked at, which this one extends.
        stacklevel: of the warning, which names the line that takes the step.
    """
    new = [param for param in params if param.numel() and id(param) not in checked]
    p, lambda_p = group["p"], group["lambda_p"]
    # A tensor is not looked at: a captured step cannot wait for it.
    stays = isinstance(lambda_p, Tensor) or (lambda_p and (isinstance(p, Tensor) or p < 2))
    if not new or not (group["hold_zeros"] or stays):
        return
    checked.update(map(id, new))
    new = [param for param in new if type(param) in PLAIN or hasattr(param, "full_tensor")]
    if not new:
        return
    moves = torch.stack([whole((param != 0).sum()).cpu() for param in new]).tolist()
    stuck = {id(param) for param, moving in zip(new, moves, strict=True) if not moving}
    names = [n for p, n in zip(group["params"], names_of(group), strict=True) if id(p) in stuck]
    if names:
        warnings.warn(
            "These parameters are entirely zero, and decay with p < 2 or hold_zeros keeps them "
            f"there: {', '.join(names)}. Leave them undecayed, for instance with "
            'param_groups(..., zero_init="exclude").',
            stacklevel=stacklevel,
        )


def warn_of_vectors(groups: list[Group], unasked: set[int], owner: str, *, stacklevel: int) -> None:
    """Warns where a strength given for a whole model decays its biases and norms beside matrices.

    Args:
        groups: the optimizer's.
        unasked: the ids of parameters of fewer than two dimensions whose group did not bring a
            lambda_p of its own; emptied by the warning.
        owner: what decays them, for the message.
        stacklevel: of the warning, which names the line that takes the step.
    """
    if not unasked:
        return
    # A tensor is not looked at: a captured step cannot wait for it.
    decaying = [g for g in groups if isinstance(g["lambda_p"], Tensor) or g["lambda_p"]]
    names = [
        name
        for group in decaying
        for param, name in zip(group["params"], names_of(group), strict=True)
        if id(param) in unasked
    ]
    if not names or all(param.ndim < 2 for group in decaying for param in group["params"]):
        return
    unasked.clear()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warnings.warn(
        f"{owner} decays biases and norms, too: {', '.join(names[:3])}{more}. To decay matrices "
        "and convolutions alone, pass param_groups(model, p=..., lambda_p=...) instead of the "
        "model's parameters; to decay all of them, give each group a lambda_p of its own.",
        stacklevel=stacklevel,
    )


def vectors(params: list[Tensor]) -> set[int]:
    """The ids of the parameters of fewer than two dimensions: biases, the scales of norms."""
    return {id(param) for param in params if param.ndim < 2}
