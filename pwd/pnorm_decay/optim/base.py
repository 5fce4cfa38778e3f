"""What AdamPWD and SGDPWD share: options, guard rails, and three implementations of one step."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pnorm_decay.decay import shrink_factor
from pnorm_decay.optim import fused

__all__ = ["Group", "PNormDecayOptimizer", "Slot"]

Group = dict[str, Any]
# Option -> (test of a valid value, how a message describes it).
Valid = dict[str, tuple[Callable[[Any], bool], str]]
Number = float | Tensor  # a tensor of one element where the step is captured or differentiated

# Elements that the foreach implementation works on at a time: on a CPU what stays in its cache,
# elsewhere what bounds the temporary memory at little cost.
CPU_PIECE = 2**19
DEVICE_PIECE = 2**24

Flag = bool | Tensor
State = dict[str, Tensor]

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Slot:
    """One tensor in one step: views of the same elements of all that belongs to it."""

    param: Tensor
    grad: Tensor
    state: State
    count: Number  # the step's number; for SGD 1 in the momentum's first step, then 2
    refresh: Flag  # whether s is refreshed in this step


class PNormDecayOptimizer(Optimizer):
    """A torch optimizer whose step ends in the division of p-norm weight decay.

    `w <- (w - alpha u) / (1 + alpha (lambda_p |w|^(p-2) + weight_decay))`, with w on the right the
    weight before the step. A subclass gives u, in the forms that the implementations need.
    """

    valid: ClassVar[Valid] = {
        "lr": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
        "p": (lambda v: 0 < v < math.inf, "positive and finite"),
        "lambda_p": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
        "weight_decay": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
        "reweight_every": (lambda v: v >= 1 and v == int(v), "an integer of at least 1"),
        "auxiliary_beta": (lambda v: 0 <= v < 1, "in [0, 1)"),
    }
    # The state beside `step` and `auxiliary`, in the order of fused.c.
    moments: ClassVar[tuple[str, ...]]

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        self._met_decay: set[int] = set()
        super().__init__(params, defaults)

    # Options and state

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group after checking its options.

        Args:
            param_group: as for any torch optimizer: `params`, and options of its own.

        Raises:
            ValueError: an option is out of its range; the message names it and its value.
            RuntimeError: options that exclude each other.
        """
        group = {**self.defaults, **param_group}
        if isinstance(group["lr"], Tensor):
            if group["lr"].numel() != 1:
                raise ValueError("Invalid lr: a tensor lr must have one element")
            group["lr"] = group["lr"].item()
        self._check(group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, this class's own or that of torch's Adam, AdamW or SGD.

        Options that the saved groups lack keep their present values. So does `weight_decay` if
        they lack `lambda_p`: the old optimizer's decay is what this one replaces.

        Args:
            state_dict: what `state_dict()` of such an optimizer returned.
        """
        saved_groups = [
            {name: value for name, value in saved.items() if keep(name, saved)}
            for saved in state_dict["param_groups"]
        ]
        if len(saved_groups) == len(self.param_groups):
            saved_groups = [
                {**{name: value for name, value in group.items() if name != "params"}, **saved}
                for group, saved in zip(self.param_groups, saved_groups, strict=True)
            ]
        super().load_state_dict({**state_dict, "param_groups": saved_groups})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._met_decay = set()

    def _check(self, group: Group) -> None:
        owner = f"{type(self).__name__} or its group"
        _check_values(group, self.valid, self.valid, owner)
        if group["fused"] and (group["foreach"] or group["differentiable"]):
            other = "foreach" if group["foreach"] else "differentiable"
            raise RuntimeError(f"`fused` and `{other}` cannot be `True` together")

    # The step

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Performs one step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a decayed parameter is complex.
            ValueError: an option has been set to a value out of its range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._check(group)
                params = [param for param in group["params"] if param.grad is not None]
                if any(param.grad.is_sparse for param in params):
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                if params and (group["lambda_p"] or group["weight_decay"]):
                    self._decayed_step(params, group)
                elif params:
                    self._torch_step(params, group)
        return loss

    def _decayed_step(self, params: list[Tensor], group: Group) -> None:
        refuse_complex(params, type(self).__name__)
        warn_of_stuck(params, group, self._met_decay)
        alpha: Number = group["lr"]
        if isinstance(alpha, Tensor) and not _keeps_tensors(group):
            alpha = float(alpha)
        kinds: dict[tuple[torch.device, torch.dtype], list[Slot]] = {}
        for slot in self._slots(params, group):
            kinds.setdefault((slot.param.device, slot.param.dtype), []).append(slot)
        for (device, dtype), slots in kinds.items():
            foreach, kernel = _implementation(group, device, dtype)
            flat = [slot for slot in slots if (foreach or kernel) and _is_flat(slot)]
            if kernel is not None:
                self._fused(flat, group, alpha, kernel)
            elif foreach:
                self._foreach(flat, group, alpha)
            if len(flat) < len(slots):
                done = {id(slot) for slot in flat}
                for slot in slots:
                    if id(slot) not in done:
                        self._reference(slot, group, alpha)

    def _slots(self, params: list[Tensor], group: Group) -> Iterator[Slot]:
        begun = self._begin(params, group)
        names = [name for name in self.moments if self._uses(name, group)]
        if group["reweight_every"] > 1 or group["auxiliary_beta"] > 0:
            names.append("auxiliary")
            for param, (state, *_) in zip(params, begun, strict=True):
                if "auxiliary" not in state:
                    state["auxiliary"] = torch.zeros_like(param)
                    local(state["auxiliary"]).copy_(shrink_factor(local(param), group["p"], 1))
        for param, (state, count, refresh) in zip(params, begun, strict=True):
            assert param.grad is not None
            tensors = {name: local(state[name]) for name in names}
            yield Slot(local(param), local(param.grad), tensors, count, refresh)

    def _begin(self, params: list[Tensor], group: Group) -> list[tuple[State, Number, Flag]]:
        """The states, with what is missing created, after counting the step; as in Slot."""
        raise NotImplementedError

    def _uses(self, moment: str, group: Group) -> bool:
        raise NotImplementedError

    def _torch_step(self, params: list[Tensor], group: Group) -> None:
        """The undecayed step, which is torch's own to the bit."""
        raise NotImplementedError

    def _direction(self, grad: Tensor, slot: Slot, group: Group) -> Tensor:
        """u, after updating the moments."""
        raise NotImplementedError

    def _foreach_move(self, slots: list[Slot], group: Group, alpha: Number) -> None:
        """`w <- w - alpha u` for a list of tensors, after updating the moments."""
        raise NotImplementedError

    def _fused_options(self, group: Group) -> fused.Options:
        raise NotImplementedError

    # The implementations

    def _reference(self, slot: Slot, group: Group, alpha: Number) -> None:
        """The paper's algorithm for one tensor, line by line."""
        w, grad = wide(slot.param), wide(slot.grad)
        u = self._direction(-grad if group["maximize"] else grad, slot, group)
        # 1 + alpha (lambda_p s + weight_decay) = (1 + step s) / scale
        scale = 1 / (1 + alpha * group["weight_decay"])
        step = alpha * group["lambda_p"] * scale
        if "auxiliary" not in slot.state:
            factor = shrink_factor(w, group["p"], step)  # 1 / (1 + step s), s = |w|^(p-2)
        else:
            q = wide(slot.state["auxiliary"])  # 1 / (1 + s)
            fresh = shrink_factor(w, group["p"], 1)
            q = torch.lerp(q, fresh, _blend(slot, group, q))
            slot.state["auxiliary"].copy_(flush_subnormal(q))
            q = wide(slot.state["auxiliary"])
            factor = (q / (q + step * (1 - q))).nan_to_num(1)  # 0 / 0 where step = 0
        w = (w - alpha * u) * (factor * scale)
        slot.param.copy_(flush_subnormal(w))

    def _foreach(self, slots: list[Slot], group: Group, alpha: Number) -> None:
        """The same with torch's operations on lists, a cache-sized piece at a time."""
        for stored in _pieces(slots):
            slots = [_widened(slot) for slot in stored]
            params = [slot.param for slot in slots]
            if "auxiliary" in slots[0].state:
                divisors = _auxiliary_divisors(slots, stored, group, alpha)
            else:
                strength, l2 = alpha * group["lambda_p"], alpha * group["weight_decay"]
                divisors = _divisors(params, group["p"], strength, l2)
            self._foreach_move(slots, group, alpha)
            torch._foreach_div_(params, divisors)
            for param in params:
                torch.hardshrink(param, _largest_subnormal(param.dtype), out=param)
            if params[0].dtype != stored[0].param.dtype:
                for name in (None, *self.moments):
                    _copy_back(slots, stored, name)

    def _fused(self, slots: list[Slot], group: Group, alpha: Number, kernel: fused.Kernel) -> None:
        """The same in one pass over the memory: fused.c."""
        options = self._fused_options(group)
        options.p, options.lambda_p = group["p"], group["lambda_p"]
        options.weight_decay, options.maximize = group["weight_decay"], group["maximize"]
        options.auxiliary_beta = group["auxiliary_beta"]
        options.reweight_every = group["reweight_every"]
        if isinstance(alpha, Tensor) and not alpha.is_cpu:
            alpha = alpha.float()
            options.device_lr = alpha.data_ptr()
        else:
            options.lr = float(alpha)
        moments = (*self.moments, None, None, None)[:3]
        records: list[int] = []
        device_counts = []  # kept until the kernel is launched
        for slot in slots:
            state, count = slot.state, slot.count
            on_device = isinstance(count, Tensor) and not count.is_cpu
            if on_device:
                count = count.float()  # type: ignore[union-attr]
                device_counts.append(count)
            records += (
                slot.param.data_ptr(),
                slot.grad.data_ptr(),
                *(state[name].data_ptr() if name in state else 0 for name in moments),
                state["auxiliary"].data_ptr() if "auxiliary" in state else 0,
                count.data_ptr() if on_device else 0,  # type: ignore[union-attr]
                0 if on_device else int(count),
                0 if on_device else int(slot.refresh),
                slot.param.numel(),
            )
        kernel(records, options)


def check_decay(group: Group) -> None:
    """Raises ValueError if the group's p or lambda_p is out of its range."""
    _check_values(group, ("p", "lambda_p"), PNormDecayOptimizer.valid, "the group")


def _check_values(group: Group, options: Iterable[str], valid: Valid, owner: str) -> None:
    for option in options:
        value, (is_valid, description) = group[option], valid[option]
        if value is None:
            raise ValueError(f"Missing {option}: give it to {owner}")
        # Looking into a tensor would make every step wait for its device.
        if not isinstance(value, Tensor) and not is_valid(value):
            raise ValueError(f"Invalid {option}: {value} (must be {description})")


def refuse_complex(params: list[Tensor], owner: str) -> None:
    """Raises RuntimeError if a parameter is complex."""
    if any(param.is_complex() for param in params):
        raise RuntimeError(
            f"{owner} does not decay complex parameters: put them into a group with lambda_p=0 "
            "and weight_decay=0"
        )


def warn_of_stuck(params: list[Tensor], group: Group, met_decay: set[int]) -> None:
    """Warns of parameters that p < 2 holds at 0 from the start.

    Args:
        params: some of the group's parameters.
        group: their group.
        met_decay: the ids of parameters that have been looked at, which this one extends.
    """
    new = [param for param in params if param.numel() and id(param) not in met_decay]
    if not new or group["p"] >= 2 or not group["lambda_p"]:
        return
    met_decay.update(map(id, new))
    moves = torch.stack([(local(param) != 0).any().cpu() for param in new]).tolist()
    names = [name for name, moving in zip(_names(new, group), moves, strict=True) if not moving]
    if names:
        warnings.warn(
            "These parameters are entirely zero, and decay with p < 2 keeps them there: "
            f"{', '.join(names)}. Leave them undecayed, for instance with "
            'param_groups(..., zero_init="exclude").',
            stacklevel=5,
        )


def keep(name: str, saved: Group) -> bool:
    """Whether a loaded group's option replaces the present one."""
    return name != "weight_decay" or "lambda_p" in saved


def local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor (DTensor) that this process holds; others unchanged."""
    if type(tensor) in (Tensor, Parameter):
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def wide(tensor: Tensor) -> Tensor:
    """The tensor for arithmetic: 16-bit types as float32.

    A copy where the step is differentiated, because the original is overwritten.
    """
    if tensor.dtype in SIXTEEN_BIT:
        return tensor.float()
    return tensor.clone() if torch.is_grad_enabled() else tensor


def flush_subnormal(w: Tensor) -> Tensor:
    """W with 0 for what is below the smallest normal number: some CPUs crawl there."""
    return w.masked_fill(w.abs() < torch.finfo(w.dtype).tiny, 0)


def _largest_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.tiny * (1 - info.eps)


def count_step(steps: list[Tensor], group: Group) -> list[tuple[Number, Flag]]:
    """Adds 1 to each step count; the new counts, and whether s is refreshed at them."""
    if steps[0].is_cpu:  # a tensor, because a number would be made one again for each count
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)
    every = group["reweight_every"]
    values = [
        step if _keeps_tensors(group) or not step.is_cpu else int(step.item()) for step in steps
    ]
    return [(value, (value - 1) % every == 0) for value in values]


def _keeps_tensors(group: Group) -> bool:
    """Whether step counts and learning rate stay tensors: no value is read on the host."""
    return group["differentiable"] or group.get("capturable", False)


def _implementation(
    group: Group, device: torch.device, dtype: torch.dtype
) -> tuple[bool, fused.Kernel | None]:
    """(foreach, fused kernel) by torch's rules; neither is the reference."""
    automatic = group["foreach"] is None and group["fused"] is None
    if group["differentiable"] or not (automatic or group["foreach"] or group["fused"]):
        return False, None
    kernel = None if group["foreach"] else fused.kernel(device, dtype)
    return kernel is None, kernel


def _is_flat(slot: Slot) -> bool:
    """Whether all tensors of the slot list their elements in one order without gaps."""
    param, others = slot.param, (slot.grad, *slot.state.values())
    contiguous = param.is_contiguous()
    for other in others:
        if other.dtype != param.dtype or other.device != param.device:
            return False
        contiguous = contiguous and other.is_contiguous()
    if contiguous:
        return True
    order = sorted(range(param.ndim), key=param.stride, reverse=True)
    return param.permute(order).is_contiguous() and all(
        other.stride() == param.stride() for other in others
    )


def _pieces(slots: list[Slot]) -> Iterator[list[Slot]]:
    """The slots in lists of about as many elements as one piece, large tensors cut."""
    limit = CPU_PIECE if slots and slots[0].param.is_cpu else DEVICE_PIECE
    batch: list[Slot] = []
    size = 0
    for slot in slots:
        for start in range(0, slot.param.numel(), limit):
            piece = _cut(slot, start, min(limit, slot.param.numel() - start))
            if batch and size + piece.param.numel() > limit:
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += piece.param.numel()
    if batch:
        yield batch


def _cut(slot: Slot, start: int, length: int) -> Slot:
    def view(tensor: Tensor) -> Tensor:
        return tensor.as_strided((length,), (1,), tensor.storage_offset() + start)

    state = {name: view(value) for name, value in slot.state.items()}
    return Slot(view(slot.param), view(slot.grad), state, slot.count, slot.refresh)


def _widened(slot: Slot) -> Slot:
    if slot.param.dtype not in SIXTEEN_BIT:
        return slot
    state = {name: value.float() for name, value in slot.state.items()}
    return Slot(slot.param.float(), slot.grad.float(), state, slot.count, slot.refresh)


def _copy_back(slots: list[Slot], stored: list[Slot], name: str | None) -> None:
    pairs = [
        (target.param, source.param) if name is None else (target.state[name], source.state[name])
        for target, source in zip(stored, slots, strict=True)
        if name is None or name in target.state
    ]
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(list(targets), list(sources))


def _blend(slot: Slot, group: Group, like: Tensor) -> Tensor:
    """The weight of the fresh value in the auxiliary state: 0 where it is not refreshed."""
    refresh = torch.as_tensor(slot.refresh, device=like.device)
    return refresh.to(like.dtype) * (1 - group["auxiliary_beta"])


def _divisors(params: list[Tensor], p: float, strength: Number, l2: Number) -> list[Any]:
    """`1 + strength |w|^(p-2) + l2` for each tensor; one number where it is the same for all w."""
    if p == 2 or (not isinstance(strength, Tensor) and strength == 0):
        return [1 + strength + l2] * len(params)
    log_strength = (
        _positive(strength).log2() if isinstance(strength, Tensor) else math.log2(strength)
    )
    divisors = list(torch._foreach_abs(params))
    torch._foreach_log2_(divisors)
    torch._foreach_mul_(divisors, min(p - 2, 1e30))
    torch._foreach_add_(divisors, log_strength)
    for divisor in divisors:
        divisor.exp2_()  # twice as fast as exp on CPUs, but torch has no _foreach_exp2
    torch._foreach_add_(divisors, 1 + l2)
    return divisors


def _auxiliary_divisors(
    slots: list[Slot], stored: list[Slot], group: Group, alpha: Number
) -> list[Any]:
    """The same with s from its state, `q = 1 / (1 + s)`, which is refreshed first."""
    auxiliaries = [slot.state["auxiliary"] for slot in slots]
    fresh = _divisors([slot.param for slot in slots], group["p"], 1.0, 0.0)
    for slot, auxiliary, divisor in zip(slots, auxiliaries, fresh, strict=True):
        q = torch.as_tensor(1 / divisor, dtype=auxiliary.dtype, device=auxiliary.device)
        auxiliary.lerp_(q, _blend(slot, group, auxiliary))
        torch.hardshrink(auxiliary, _largest_subnormal(auxiliary.dtype), out=auxiliary)
    if stored[0].param.dtype in SIXTEEN_BIT:
        _copy_back(slots, stored, "auxiliary")
        auxiliaries = [slot.state["auxiliary"].float() for slot in stored]
    strength, l2 = alpha * group["lambda_p"], alpha * group["weight_decay"]
    if not isinstance(strength, Tensor) and strength == 0:
        return [1 + l2] * len(slots)
    strength = _positive(strength) if isinstance(strength, Tensor) else strength
    divisors = list(torch._foreach_reciprocal(auxiliaries))
    torch._foreach_mul_(divisors, strength)
    torch._foreach_add_(divisors, 1 + l2 - strength)
    return divisors


def _positive(strength: Tensor) -> Tensor:
    """A strength tensor is not looked at: at 0 this one gives the same, but for no 0 * inf."""
    return strength.clamp(min=1e-37)


def _names(params: list[Tensor], group: Group) -> list[str]:
    names = group.get("names") or group.get("param_names") or []
    if len(names) != len(group["params"]):
        names = [
            f"number {index} (shape {tuple(param.shape)})"
            for index, param in enumerate(group["params"])
        ]
    by_id = {id(param): name for param, name in zip(group["params"], names, strict=True)}
    return [by_id[id(param)] for param in params]
