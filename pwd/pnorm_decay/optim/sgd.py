"""Stochastic gradient descent with p-norm weight decay."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from pnorm_decay.optim.base import (
    Flag,
    Group,
    Number,
    PNormDecayOptimizer,
    Slot,
    State,
    count_step,
    wide,
)
from pnorm_decay.optim.fused import Options, Rule


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
        reweight_every: how often s is refreshed; more than 1 adds a step count to the state.
        auxiliary_beta: how slowly s follows `|w|^(p-2)`, in [0, 1).
        maximize: whether to maximise the loss.
        foreach: True for torch's operations on lists of tensors.
        differentiable: whether autograd may differentiate through the step.
        fused: True for one pass over the memory in compiled code.

    Raises:
        ValueError: an option is out of its range; the message names it and its value.
        RuntimeError: options that exclude each other.
    """

    valid: ClassVar = {
        **PNormDecayOptimizer.valid,
        "momentum": (lambda v: v >= 0, "at least 0"),
    }
    moments = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        p: float | None = None,
        lambda_p: float | None = None,
        reweight_every: int = 1,
        auxiliary_beta: float = 0,
        maximize: bool = False,
        foreach: bool | None = None,
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
            "reweight_every": reweight_every,
            "auxiliary_beta": auxiliary_beta,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _begin(self, params: list[Tensor], group: Group) -> list[tuple[State, Number, Flag]]:
        states = [self.state[param] for param in params]
        counts = [2] * len(params)
        refreshes: list[Flag] = [True] * len(params)
        if group["momentum"] != 0:
            for index, (param, state) in enumerate(zip(params, states, strict=True)):
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(param)
                    counts[index] = 1
        if group["reweight_every"] > 1:
            for state in states:
                state.setdefault("step", torch.tensor(0.0))
            counted = count_step([state["step"] for state in states], group)
            refreshes = [refresh for _, refresh in counted]
        return list(zip(states, counts, refreshes, strict=True))

    def _uses(self, moment: str, group: Group) -> bool:
        return group["momentum"] != 0

    def _direction(self, grad: Tensor, slot: Slot, group: Group) -> Tensor:
        momentum = group["momentum"]
        if momentum == 0:
            return grad
        buffer = grad
        if slot.count != 1:
            old = wide(slot.state["momentum_buffer"])
            buffer = momentum * old + (1 - group["dampening"]) * grad
        slot.state["momentum_buffer"].copy_(buffer)
        return grad + momentum * buffer if group["nesterov"] else buffer

    def _foreach_move(self, slots: list[Slot], group: Group, alpha: Number) -> None:
        moved = [slot.param for slot in slots]
        directions = [slot.grad for slot in slots]
        if group["maximize"]:
            directions = list(torch._foreach_neg(directions))
        if group["momentum"] != 0:
            buffers = [slot.state["momentum_buffer"] for slot in slots]
            fresh = [1.0 if slot.count == 1 else 1 - group["dampening"] for slot in slots]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, torch._foreach_mul(directions, fresh))
            if group["nesterov"]:
                directions = list(torch._foreach_add(directions, buffers, alpha=group["momentum"]))
            else:
                directions = buffers
        torch._foreach_sub_(moved, torch._foreach_mul(directions, alpha))

    def _torch_step(self, params: list[Tensor], group: Group) -> None:
        buffers = [self.state[param].get("momentum_buffer") for param in params]
        sgd(
            params,
            [param.grad for param in params if param.grad is not None],
            buffers,
            foreach=group["foreach"],
            fused=group["fused"],
            weight_decay=0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                assert buffer is not None
                self.state[param]["momentum_buffer"] = buffer

    def _fused_options(self, group: Group) -> Options:
        rule = Rule.MOMENTUM if group["momentum"] else Rule.SGD
        momentum, dampening = group["momentum"], group["dampening"]
        return Options(rule=rule, beta1=momentum, beta2=dampening, nesterov=group["nesterov"])
