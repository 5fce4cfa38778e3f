"""Where the direction u comes from: Adam's moments or SGD's momentum, with torch's own state."""

from abc import ABC, abstractmethod
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from pnorm_decay.optim.layout import Slot, State, widened
from pnorm_decay.optim.options import Group, Number

__all__ = ["AdamRule", "Rule", "SGDRule", "count", "keeps_tensors"]

SGD, MOMENTUM, ADAM, AMSGRAD = range(4)  # fused.c's enum Rule


def keeps_tensors(group: Group) -> bool:
    """Whether step counts and learning rate stay tensors: no value is read on the host."""
    return group["differentiable"] or group["capturable"]


def count(states: list[State], group: Group) -> list[Number]:
    """Adds 1 to each step count; the new counts, as numbers where they lie on the host."""
    steps = [state["step"] for state in states]
    if steps[0].is_cpu:  # a tensor, because a number would be made one again for each count
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)
    as_tensors = keeps_tensors(group)
    return [step if as_tensors or not step.is_cpu else int(step.item()) for step in steps]


class Rule(ABC):
    """One way from the gradient to u. The state is torch's, in the parameter's dtype."""

    moments: ClassVar[tuple[str, ...]]  # every name that its state can have beside `step`

    @abstractmethod
    def names(self, group: Group) -> tuple[str, ...]:
        """The moments that the group's options call for."""

    def counts_steps(self, group: Group) -> bool:
        """Whether the state has a step count."""
        return True

    def complete(self, state: State, param: Tensor, group: Group) -> bool:
        """Creates what the state lacks; whether that was all of it."""
        missing = [name for name in self.names(group) if state.get(name) is None]
        for name in missing:
            state[name] = torch.zeros_like(param)
        if "step" not in state and self.counts_steps(group):
            on_device = group["capturable"] or group["fused"]
            device = param.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return len(missing) == len(self.names(group))

    @abstractmethod
    def direction(self, grad: Tensor, slot: Slot, group: Group) -> Tensor:
        """u, after updating the moments: the definition."""

    @abstractmethod
    def foreach_move(self, slots: list[Slot], group: Group, alpha: Number) -> None:
        """`w <- w - alpha u` for a list of tensors, after updating the moments."""

    @abstractmethod
    def prepare_torch_step(self, state: State, param: Tensor, group: Group) -> None:
        """Creates what torch's step takes to be there."""

    @abstractmethod
    def torch_step(
        self, params: list[Tensor], states: list[State], group: Group, *, suits_fused: bool
    ) -> None:
        """The step of a group that decays nothing: torch's own, to the bit.

        With nothing asked for, where it is right, torch's fused step: on a CPU it is several times
        faster than torch's own choice.
        """

    @abstractmethod
    def native_options(self, group: Group) -> dict[str, Any]:
        """The fields of fused.c's Options that belong to the rule."""


def torch_options(group: Group, suits_fused: bool) -> dict[str, Any]:
    """What torch's functions are told of the implementation and of the learning rate."""
    foreach, fused, lr = group["foreach"], group["fused"], group["lr"]
    if foreach is None and fused is None and not group["differentiable"]:
        fused = True if suits_fused else None
    if foreach and isinstance(lr, Tensor) and not group["capturable"]:
        lr = float(lr)
    return {"foreach": foreach, "fused": fused, "lr": lr, "weight_decay": 0}


class AdamRule(Rule):
    """`m_hat / (sqrt(v_hat) + eps)`."""

    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def names(self, group: Group) -> tuple[str, ...]:
        return self.moments if group["amsgrad"] else self.moments[:2]

    def direction(self, grad: Tensor, slot: Slot, group: Group) -> Tensor:
        beta1, beta2 = group["betas"]
        m = torch.lerp(widened(slot.state["exp_avg"]), grad, 1 - beta1)
        v = beta2 * widened(slot.state["exp_avg_sq"]) + (1 - beta2) * grad * grad
        slot.state["exp_avg"].copy_(m)
        slot.state["exp_avg_sq"].copy_(v)
        if group["amsgrad"]:
            v = torch.maximum(widened(slot.state["max_exp_avg_sq"]), v)
            slot.state["max_exp_avg_sq"].copy_(v)
        m_hat = m / (1 - beta1**slot.step)
        v_hat = v / (1 - beta2**slot.step)
        return m_hat / (v_hat.sqrt() + group["eps"])

    def foreach_move(self, slots: list[Slot], group: Group, alpha: Number) -> None:
        device = slots[0].param.device
        # Where torch has a fused Adam, a piece in the cache is passed once instead of ten times.
        native = device.type in ("cpu", "cuda")
        # torch counts the step itself: it gets a copy of each count, made in one operation.
        if isinstance(slots[0].step, Tensor):
            counts = torch.stack([torch.as_tensor(slot.step) for slot in slots]).to(device) - 1
        else:  # filled, because a copy from the host would wait for the device
            runs = [
                (step, len(list(run))) for step, run in groupby(float(slot.step) for slot in slots)
            ]
            counts = torch.cat([torch.full((n,), step - 1.0, device=device) for step, n in runs])
        self._adam(
            [slot.param for slot in slots],
            [slot.grad for slot in slots],
            [slot.state for slot in slots],
            list(counts.float().unbind()),
            group,
            foreach=not native,
            fused=native,
            capturable=group["capturable"] and not native,
            lr=alpha,
            weight_decay=0,
        )

    def prepare_torch_step(self, state: State, param: Tensor, group: Group) -> None:
        self.complete(state, param, group)

    def torch_step(
        self, params: list[Tensor], states: list[State], group: Group, *, suits_fused: bool
    ) -> None:
        self._adam(
            params,
            [param.grad for param in params if param.grad is not None],
            states,
            [state["step"] for state in states],
            group,
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            has_complex=any(param.is_complex() for param in params),
            **torch_options(group, suits_fused),
        )

    def _adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        counts: list[Tensor],
        group: Group,
        **options: Any,
    ) -> None:
        adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            counts,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            maximize=group["maximize"],
            **options,
        )

    def native_options(self, group: Group) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        rule = AMSGRAD if group["amsgrad"] else ADAM
        return {"rule": rule, "beta1": beta1, "beta2": beta2, "eps": group["eps"]}


class SGDRule(Rule):
    """The gradient, or its momentum."""

    moments = ("momentum_buffer",)

    def names(self, group: Group) -> tuple[str, ...]:
        return self.moments if group["momentum"] != 0 else ()

    def counts_steps(self, group: Group) -> bool:
        return group["reweight_every"] > 1

    def direction(self, grad: Tensor, slot: Slot, group: Group) -> Tensor:
        momentum = group["momentum"]
        if momentum == 0:
            return grad
        buffer = grad
        if not slot.is_first:
            old = widened(slot.state["momentum_buffer"])
            buffer = momentum * old + (1 - group["dampening"]) * grad
        slot.state["momentum_buffer"].copy_(buffer)
        return grad + momentum * buffer if group["nesterov"] else buffer

    def foreach_move(self, slots: list[Slot], group: Group, alpha: Number) -> None:
        moved = [slot.param for slot in slots]
        directions = [slot.grad for slot in slots]
        if group["maximize"]:
            directions = list(torch._foreach_neg(directions))
        if group["momentum"] != 0:
            buffers = [slot.state["momentum_buffer"] for slot in slots]
            shares = [1.0 if slot.is_first else 1 - group["dampening"] for slot in slots]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, torch._foreach_mul(directions, shares))
            if group["nesterov"]:
                directions = list(torch._foreach_add(directions, buffers, alpha=group["momentum"]))
            else:
                directions = buffers
        torch._foreach_sub_(moved, torch._foreach_mul(directions, alpha))

    def prepare_torch_step(self, state: State, param: Tensor, group: Group) -> None:
        pass  # torch makes the buffer of the first gradient

    def torch_step(
        self, params: list[Tensor], states: list[State], group: Group, *, suits_fused: bool
    ) -> None:
        buffers = [state.get("momentum_buffer") for state in states]
        sgd(
            params,
            [param.grad for param in params if param.grad is not None],
            buffers,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **torch_options(group, suits_fused),
        )
        if group["momentum"] != 0:
            for state, buffer in zip(states, buffers, strict=True):
                assert buffer is not None
                state["momentum_buffer"] = buffer

    def native_options(self, group: Group) -> dict[str, Any]:
        return {
            "rule": MOMENTUM if group["momentum"] else SGD,
            "beta1": group["momentum"],
            "beta2": group["dampening"],
            "nesterov": group["nesterov"],
        }
