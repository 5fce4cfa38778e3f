"""Which parameters of a model decay."""

from typing import Any

from torch import nn
from torch.nn import Parameter

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
    """
    decayed: NamedParameters = []
    undecayed: NamedParameters = []
    for name, parameter in model.named_parameters():
        decays = parameter.requires_grad and parameter.ndim >= 2
        (decayed if decays else undecayed).append((name, parameter))
    return decayed, undecayed


def param_groups(model: nn.Module, *, p: float, lambda_p: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: decayed, and the rest with `lambda_p = 0`.

    Args:
        model: any module; see `split_decayed` for which of its parameters decay.
        p: the norm's exponent, in (0, inf).
        lambda_p: the strength of the decay, in [0, inf).

    Returns:
        `[decayed, undecayed]`, each with `params`, `p` and `lambda_p`.
    """
    decayed, undecayed = split_decayed(model)
    return [
        {"params": [parameter for _, parameter in decayed], "p": p, "lambda_p": lambda_p},
        {"params": [parameter for _, parameter in undecayed], "p": p, "lambda_p": 0.0},
    ]
