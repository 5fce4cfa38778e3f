"""What decay cannot do: a refusal and a warning."""

import warnings

import torch
from torch import Tensor

from pnorm_decay.optim.layout import PLAIN, names_of, whole
from pnorm_decay.optim.options import Group

__all__ = ["refuse_complex", "warn_of_stuck"]


def refuse_complex(params: list[Tensor], owner: str) -> None:
    """Raises RuntimeError if a parameter is complex."""
    if any(param.is_complex() for param in params):
        raise RuntimeError(
            f"{owner} does not decay complex parameters: put them into a group with lambda_p=0 "
            "and weight_decay=0"
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
