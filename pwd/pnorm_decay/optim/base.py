"""What AdamPWD and SGDPWD share: guard rails, and a step made of a rule, a shrink, a backend."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pnorm_decay.optim import backends, op
from pnorm_decay.optim.guards import (
    refuse_capture,
    refuse_complex,
    refuse_misfits,
    vectors,
    warn_of_stuck,
    warn_of_vectors,
)
from pnorm_decay.optim.layout import Slot, check_shapes, local_part, suits_fused
from pnorm_decay.optim.options import Group, check, decays
from pnorm_decay.optim.rules import Rule, count, keeps_tensors
from pnorm_decay.optim.shrink import shrink_of

__all__ = ["PNormDecayOptimizer"]


class PNormDecayOptimizer(Optimizer):
    """A torch optimizer whose step ends in p-norm weight decay; a subclass brings the rule."""

    rule: Rule

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params must be parameters or groups of them, not a {type(params).__name__}: "
                "give param_groups(model, ...)"
            )
        self._checked_for_zeros: set[int] = set()  # ids of the parameters that have been looked at
        self._unasked: set[int] = set()  # see warn_of_vectors
        self._key = op.register(self)
        # A compiled step must not look into the groups, whose options may change.
        self.params_of_all_groups: list[Tensor] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group after checking its options.

        Args:
            param_group: as for any torch optimizer: `params`, and options of its own.

        Raises:
            ValueError: an option is out of its range; the message names it and its value.
            RuntimeError: options that exclude each other.
        """
        group = {**self.defaults, **param_group}
        for name in ("lr", "p", "lambda_p"):
            if isinstance(group[name], Tensor):
                if group[name].numel() != 1:
                    raise ValueError(f"Invalid {name}: a tensor {name} must have one element")
                if not group["exact"] or name != "p":
                    group[name] = group[name].item()
        self._check(group)
        is_asked = "lambda_p" in param_group  # before torch adds the other options to it
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len(set(params)) < len(params):
            self.param_groups.pop()
            raise ValueError("A parameter is twice in one parameter group")
        self.params_of_all_groups += params
        self._unasked |= set() if is_asked else vectors(params)

    def _check(self, group: Group) -> None:
        check(group, f"{type(self).__name__} or its group")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, this class's own or that of torch's Adam, AdamW or SGD.

        Options that the saved groups lack keep their present values. So does `weight_decay` if
        they lack `lambda_p`: the old optimizer's decay is what this one replaces.

        Args:
            state_dict: what `state_dict()` of such an optimizer returned.

        Raises:
            ValueError: the groups differ in number or size, or a state has another shape than its
                parameter.
        """
        saved_groups = [
            {k: v for k, v in saved.items() if k != "weight_decay" or "lambda_p" in saved}
            for saved in state_dict["param_groups"]
        ]
        if len(saved_groups) == len(self.param_groups):
            saved_groups = [
                {**{name: value for name, value in group.items() if name != "params"}, **saved}
                for group, saved in zip(self.param_groups, saved_groups, strict=True)
            ]
        moments = (*self.rule.moments, "auxiliary")
        refuse_misfits(state_dict["state"], saved_groups, self.param_groups, moments)
        super().load_state_dict({**state_dict, "param_groups": saved_groups})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._checked_for_zeros = set()
        self._unasked = getattr(self, "_unasked", set())  # loading a state comes here, too
        self._key = op.register(self)
        self.params_of_all_groups = [
            param for group in self.param_groups for param in group["params"]
        ]
        for group in self.param_groups:
            for name, option in inspect.signature(type(self).__init__).parameters.items():
                if option.kind is option.KEYWORD_ONLY:  # one that the saved version lacked
                    group.setdefault(name, option.default)
        for own in self.state.values():
            if "step" in own and not isinstance(own["step"], Tensor):  # of an old torch
                own["step"] = torch.tensor(float(own["step"]), dtype=torch.float32, device="cpu")

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Performs one step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, a decayed parameter is complex, a gradient or state
                has another shape than its parameter, or a step that is not capturable is captured.
            ValueError: an option has been set to a value out of its range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self.step_eagerly()
        elif op.IS_COMPILED and not self.defaults["differentiable"]:
            everything = enumerate(self.params_of_all_groups)
            places = [place for place, param in everything if param.grad is not None]
            params = [self.params_of_all_groups[place] for place in places]
            with torch.no_grad():
                op.step(params, [p.grad for p in params if p.grad is not None], places, self._key)
        else:
            torch.compiler.disable(self.step_eagerly)()
        return loss

    def step_eagerly(self) -> None:
        """The step without closure and hooks."""
        if not all(group["capturable"] for group in self.param_groups):
            refuse_capture(type(self).__name__)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._check(group)
                params = [param for param in group["params"] if param.grad is not None]
                if any(param.grad.is_sparse for param in params):
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                if params and decays(group):
                    self._decayed_step(params, group)
                elif params:
                    self._undecayed_step(params, group)

    def _undecayed_step(self, params: list[Tensor], group: Group) -> None:
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            self.rule.prepare_torch_step(state, param, group)
        slots = self._slots(params, group, self.rule.names(group))
        self.rule.torch_step(params, states, group, suits_fused=all(map(suits_fused, slots)))

    def _decayed_step(self, params: list[Tensor], group: Group) -> None:
        refuse_complex(params, type(self).__name__)
        warn_of_vectors(self.param_groups, self._unasked, type(self).__name__, stacklevel=6)
        warn_of_stuck(params, group, self._checked_for_zeros, stacklevel=6)
        alpha = group["lr"]
        if isinstance(alpha, Tensor) and not keeps_tensors(group):
            alpha = float(alpha)
        shrink = shrink_of(group, alpha)
        states = [self.state[param] for param in params]
        first = [self.rule.complete(s, p, group) for s, p in zip(states, params, strict=True)]
        for state, param in zip(states, params, strict=True):
            shrink.complete(state, param)
        slots = self._slots(params, group, (*self.rule.names(group), *shrink.names))
        steps = count(states, group) if self.rule.counts_steps(group) else [1] * len(params)
        for slot, step, is_first in zip(slots, steps, first, strict=True):
            slot.step, slot.is_first, slot.grad = step, is_first, slot.grad.resolve_neg()
        backends.run(slots, self.rule, shrink, group)

    def _slots(self, params: list[Tensor], group: Group, names: tuple[str, ...]) -> list[Slot]:
        """Views of what belongs to each parameter, after comparing their shapes."""
        slots = []
        for param in params:
            state = self.state[param]
            own = {n: local_part(state[n], param) for n in names if state.get(n) is not None}
            slot = Slot(local_part(param), local_part(param.grad, param), own)
            check_shapes(slot, group, param)
            slots.append(slot)
        return slots
