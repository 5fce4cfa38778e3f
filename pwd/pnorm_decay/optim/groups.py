"""Which parameters of a model decay."""

from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from pnorm_decay.optim.options import check

__all__ = ["param_groups", "split_decayed"]

NamedParameters = list[tuple[str, Parameter]]


def split_decayed(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """Splits a model's parameters into those that decay and those that do not.

    Trainable tensors of two or more dimensions (matrices, convolutions, embeddings) decay; biases,
    norms' scales and frozen parameters do not. A parameter that several modules share is listed
    once, under its first name.

    Args:
        model: any module.

    Returns:
        Two lists of (name, parameter), decayed and undecayed, each in the model's order.

    Raises:
        TypeError: `model` is no module.
        ValueError: a parameter of a lazy module is not initialised yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, not a {type(model).__name__}: which parameters decay is "
            "seen from the model itself, not from model.parameters()"
        )
    decayed: NamedParameters = []
    undecayed: NamedParameters = []
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet: do a forward pass first")
        decays = parameter.requires_grad and parameter.ndim >= 2
        (decayed if decays else undecayed).append((name, parameter))
    return decayed, undecayed


def param_groups(
    model: nn.Module, *, p: float, lambda_p: float, zero_init: str = "decay"
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: decayed, and the rest with `lambda_p = 0`.

    Args:
        model: any module; see `split_decayed` for which of its parameters decay.
        p: the norm's exponent, in (0, inf).
        lambda_p: the strength of the decay, in [0, inf).
        zero_init: what to do with tensors that are entirely zero, such as LoRA's B matrices or
            the last layer of a zero-initialised residual branch: with `p < 2` they could never
            move. "decay" leaves them decayed (the optimizer warns), "exclude" puts them into the
            undecayed group if `p < 2`.

    Returns:
        `[decayed, undecayed]`, each with `params`, their `names`, `p` and `lambda_p`; the undecayed
        one with `weight_decay = 0` and `hold_zeros = False`, too.

    Raises:
        TypeError: `model` is no module.
        ValueError: p or lambda_p is out of its range, zero_init is neither "decay" nor "exclude",
            or a parameter of a lazy module is not initialised yet.
    """
    check({"p": p, "lambda_p": lambda_p}, "param_groups")
    if zero_init not in ("decay", "exclude"):
        raise ValueError(f'Invalid zero_init: {zero_init!r} (must be "decay" or "exclude")')
    decayed, undecayed = split_decayed(model)
    if zero_init == "exclude" and p < 2:
        moves = [bool(parameter.detach().any()) for _, parameter in decayed]
        undecayed += [named for named, moving in zip(decayed, moves, strict=True) if not moving]
        decayed = [named for named, moving in zip(decayed, moves, strict=True) if moving]
    groups = [
        {
            "params": [parameter for _, parameter in named],
            "names": [name for name, _ in named],
            "p": p,
            "lambda_p": strength,
        }
        for named, strength in ((decayed, lambda_p), (undecayed, 0.0))
    ]
    groups[1] |= {"weight_decay": 0.0, "hold_zeros": False}
    return groups
