"""Stochastic gradient descent with p-norm weight decay."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pnorm_decay.optim.base import PNormDecayOptimizer
from pnorm_decay.optim.rules import SGDRule


class SGDPWD(PNormDecayOptimizer):
    """SGD with p-norm weight decay.

    `w <- (w - lr u) / (1 + lr (lambda_p |w|^(p-2) + weight_decay))`, with the w on the right the
    weight before the step and u the gradient or its momentum as in `torch.optim.SGD`, to which
    it is equal to the bit if `lambda_p` and `weight_decay` are 0. Unlike there, `weight_decay` is
    decoupled: it is not added to the gradient.

    See `AdamPWD` for how to choose p and lambda_p, and for the options not explained here. With
    SGD, u is a gradient and not of order 1: lambda_p wants to be that much smaller.

    Args:
        params: parameters, or groups of them; every option below but `differentiable` can be
            given per group.
        lr: learning rate, in [0, inf); a float, or a tensor of one element.
        momentum: momentum factor, at least 0.
        dampening: dampening of the momentum.
        weight_decay: the L2 part of the elastic net, in [0, inf).
        nesterov: whether the momentum is Nesterov's.
        p: the norm's exponent, in (0, inf).
        lambda_p: the strength of the decay, in [0, inf). p and lambda_p can be left out where
            every group brings its own, as those of `param_groups` do.
        exact: the exact proximal step, for p in (0, 2].
        hold_zeros: whether a weight that is exactly 0 stays 0 whatever p and lambda_p are.
        reweight_every: how often s is refreshed; more than 1 adds a step count to the state.
        auxiliary_beta: how slowly s follows `|w|^(p-2)`, in [0, 1).
        maximize: whether to maximise the loss.
        foreach: True for torch's operations on lists of tensors.
        capturable: whether the step may be captured in a CUDA graph.
        differentiable: whether autograd may differentiate through the step.
        fused: True for one pass over the memory in compiled code.

    Raises:
        ValueError: an option is out of its range; the message names it and its value.
        RuntimeError: options that exclude each other.
    """

    rule = SGDRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        p: float | Tensor | None = None,
        lambda_p: float | Tensor | None = None,
        exact: bool = False,
        hold_zeros: bool = False,
        reweight_every: int = 1,
        auxiliary_beta: float = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "p": p,
            "lambda_p": lambda_p,
            "exact": exact,
            "hold_zeros": hold_zeros,
            "reweight_every": reweight_every,
            "auxiliary_beta": auxiliary_beta,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)
