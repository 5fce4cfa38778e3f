"""Adam with p-norm weight decay."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam

from pnorm_decay.optim.fused import Options, Rule
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


class AdamPWD(PNormDecayOptimizer):
    """Adam with p-norm weight decay."""

    valid: ClassVar = {
        **PNormDecayOptimizer.valid,
        "betas": (lambda v: all(0 <= beta < 1 for beta in v), "in [0, 1)"),
        "eps": (lambda v: v >= 0, "at least 0"),
    }
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        p: float | None = None,
        lambda_p: float | None = None,
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
            "betas": (float(betas[0]), float(betas[1])),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "p": p,
            "lambda_p": lambda_p,
            "reweight_every": reweight_every,
            "auxiliary_beta": auxiliary_beta,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _state(self, param: Tensor, group: Group) -> State:
        """The parameter's state, with what is missing created: torch's own, in its dtypes."""
        state = self.state[param]
        if "step" not in state:
            on_device = group["capturable"] or group["fused"]
            device = param.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(param)
        return state

    def _uses(self, moment: str, group: Group) -> bool:
        return moment != "max_exp_avg_sq" or group["amsgrad"]

    def _begin(self, params: list[Tensor], group: Group) -> list[tuple[State, Number, Flag]]:
        states = [self._state(param, group) for param in params]
        counts = count_step([state["step"] for state in states], group)
        return [(state, *count) for state, count in zip(states, counts, strict=True)]

    def _direction(self, grad: Tensor, slot: Slot, group: Group) -> Tensor:
        beta1, beta2 = group["betas"]
        m = torch.lerp(wide(slot.state["exp_avg"], group), grad, 1 - beta1)
        v = beta2 * wide(slot.state["exp_avg_sq"], group) + (1 - beta2) * grad * grad
        slot.state["exp_avg"].copy_(m)
        slot.state["exp_avg_sq"].copy_(v)
        if group["amsgrad"]:
            v = torch.maximum(wide(slot.state["max_exp_avg_sq"], group), v)
            slot.state["max_exp_avg_sq"].copy_(v)
        m_hat = m / (1 - beta1**slot.count)
        v_hat = v / (1 - beta2**slot.count)
        return m_hat / (v_hat.sqrt() + group["eps"])

    def _foreach_move(self, slots: list[Slot], group: Group, alpha: Number) -> None:
        device = slots[0].param.device
        # Where torch has a fused Adam, a piece in the cache is passed once instead of ten times.
        native = device.type in ("cpu", "cuda")
        adam(
            [slot.param for slot in slots],
            [slot.grad for slot in slots],
            *([slot.state[name] for slot in slots if name in slot.state] for name in self.moments),
            [torch.as_tensor(slot.count - 1, dtype=torch.float32, device=device) for slot in slots],
            foreach=not native,
            fused=native,
            capturable=group["capturable"] and not native,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=alpha,
            weight_decay=0,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _torch_step(self, params: list[Tensor], group: Group) -> None:
        states = [self._state(param, group) for param in params]
        largest = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        adam(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            largest,
            [state["step"] for state in states],
            foreach=group["foreach"],
            fused=group["fused"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            has_complex=any(param.is_complex() for param in params),
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _fused_options(self, group: Group) -> Options:
        rule = Rule.AMSGRAD if group["amsgrad"] else Rule.ADAM
        beta1, beta2 = group["betas"]
        return Options(rule=rule, beta1=beta1, beta2=beta2, eps=group["eps"])
