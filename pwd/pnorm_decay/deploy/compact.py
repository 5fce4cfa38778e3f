"""A smaller network with the same outputs: without the units that cannot matter."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from pnorm_decay.deploy.copies import copied, fresh, restore_buffers
from pnorm_decay.deploy.trace import PINNED, Axis, Reader, Trace

TOLERANCE = 1e-5

logger = logging.getLogger(__name__)


class CompactError(ValueError):
    """A network cannot be made smaller, or its channels cannot be followed."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together from all the layers that share them.

    Attributes:
        channels: their number.
        producers: parameters whose first dimension is the channel: convolutions, linear layers,
            batch norms.
        consumers: weights whose second dimension is the channel: the layers that read it.
    """

    channels: int
    producers: list[Tensor]
    consumers: list[Tensor]


@dataclass(frozen=True)
class Compaction:
    """What `compact` did; `str` says it in words.

    Attributes:
        parameters: numbers in the parameters, before and after.
        layers: (before, after) units of every layer that lost some, by the name of its weight.
        kept: how many units that no weight enters stay, by the reason.
        computed: layers that stay as they are, because their weight is computed from others.
    """

    parameters: tuple[int, int]
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    computed: tuple[str, ...] = ()

    def __str__(self) -> str:
        before, after = self.parameters
        lines = ["Nothing could be removed."]
        if self.layers:
            lines = [f"{after:,} of {before:,} parameters are left."]
            lines += [f"{name}: {left} of {had} units" for name, (had, left) in self.layers.items()]
        elif not (self.kept or self.computed):
            lines.append("Every unit has weights that come in, and every unit is read.")
        for reason, number in self.kept.items():
            units = (
                "unit that no weight enters stays"
                if number == 1
                else "units that no weight enters stay"
            )
            lines.append(f"{number} {units}: {reason}")
        if self.computed:
            lines.append(
                f"The weight of {', '.join(self.computed)} is computed in every call, so that its "
                "units stay; torch.nn.utils.prune.remove makes a mask permanent."
            )
        return "\n".join(lines)


def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """A smaller copy of a network, without the units that cannot matter.

    Removed are channels of convolutions, neurons of linear layers and value dimensions of
    attention which no weight enters, or which no weight reads, in the end. A unit that no weight
    enters may still be a constant, the bias of its layer or batch norm: that becomes part of the
    bias of the layers that read it where this is exact (linear layers and convolutions without
    padding); else the unit stays. Infinities and NaNs that would come of 0 * infinity inside the
    network are not considered. What depends on the inputs' size, such as an embedding of
    positions, is taken as it is at the example's; of branches, the one that the example takes.

    Args:
        model: any module that makes tensors of one tensor. What is not understood stays as it is.
        example: a small batch of its inputs, on the model's device.

    Returns:
        A copy with the same outputs in evaluation mode, checked on the example to 1e-5 of the
        largest (in float32, on CUDA in float64). Its attribute `compaction`, a `Compaction`, says
        what was removed, or why nothing. A layer that would lose all units keeps one. `torch.save`
        keeps the copy; its state dict fits no network of the old sizes.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model cannot be copied.
        CompactError: the model does not take the example, puts out no tensor (in tuples, lists,
            dictionaries or what else torch.utils._pytree knows), is random, or its outputs would
            change; the layer is named where it is known. The model is as it was in any case.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compact takes a module, not a {type(model).__name__}")
    expected = _outputs(copied(model), example)
    # Code may count on a number of channels: then what goes through such code stays.
    for strictness in (0, 1, 2):
        small = copied(model)
        compaction = _compact(small, example, strictness, model)
        try:
            difference = _difference(expected, _outputs(copied(small), example))
        except CompactError:
            if strictness == 2:
                raise
        else:
            if difference <= TOLERANCE:
                break
    else:
        again = _outputs(copied(model), example)
        if not compaction.layers or _difference(expected, again) > TOLERANCE:
            raise CompactError(
                f"{type(model).__name__} gives other outputs when it is called again, so that they "
                "cannot be compared: it draws random numbers or keeps a state"
            )
        raise CompactError(
            f"{type(model).__name__} without the units of {', '.join(compaction.layers)} gives "
            f"outputs that differ by {difference:.1e} of the largest: how its layers are connected "
            "was not understood"
        )
    small.compaction = compaction  # type: ignore[assignment]
    logger.log(logging.INFO if compaction.layers else logging.WARNING, "%s", compaction)
    return small


def channel_groups(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """The channels of a model that can be removed, layers that share them together.

    Channels of the model's input and output belong to no group, nor do those that only a part of
    a layer has, that something reorders, or that go into what mixes them (a layer norm, a softmax).

    Args:
        model: any module that makes tensors of one tensor.
        example: a small batch of its inputs, on the model's device.

    Returns:
        The groups, in the order of execution.

    Raises:
        CompactError: the model does not take the example, or has no such channels.
    """
    trace = _trace(model, example)
    roots = trace.roots()
    pinned = set(roots[torch.cat([labels for labels, _ in trace.pins])].tolist()) | {PINNED}
    together: dict[tuple[int, ...], list[Axis]] = {}
    for axis in trace.axes.values():
        together.setdefault(tuple(roots[axis.labels].tolist()), []).append(axis)
    seen = Counter(root for channels in together for root in set(channels))
    groups = []
    for channels, axes in together.items():
        whole = all(axis.dim == int(axis.is_input) for axis in axes)
        alone = all(seen[root] == 1 and root not in pinned for root in channels)
        if whole and alone and len(set(channels)) == len(channels):
            producers = [axis.tensor for axis in axes if not axis.is_input]
            producers = [tensor for tensor in producers if isinstance(tensor, nn.Parameter)]
            consumers = [axis.tensor for axis in axes if axis.is_input]
            if producers and consumers:
                groups.append(ChannelGroup(len(channels), producers, consumers))
    if not groups:
        raise CompactError(f"{type(model).__name__} has no channels that could be removed")
    return groups


# ---------------------------------------------------------------------------- running


def _trace(model: nn.Module, example: Tensor, strictness: int = 0) -> Trace:
    trace = Trace(model, strictness)
    _run(model, example, trace.run)
    return trace


def _run(model: nn.Module, example: Tensor, run: Callable[[Tensor], Any]) -> list[Tensor]:
    """The tensors that a model makes of an example in evaluation mode."""
    _check_example(example)
    entered = [""]
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        for name, module in model.named_modules()
    ]
    try:
        with _Evaluation(model), torch.no_grad():
            outputs = run(fresh(example))
    except Exception as error:  # of any kind, for whatever the model does
        where = f" in {entered[-1]}" if entered[-1] else ""
        raise CompactError(
            f"{type(model).__name__} does not take an example of shape {tuple(example.shape)}: "
            f"{type(error).__name__}{where}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    numbers = (Tensor, int, float, complex)
    return [torch.as_tensor(leaf) for leaf in tree_leaves(outputs) if isinstance(leaf, numbers)]


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    """What a model makes of an example, in arithmetic that can be compared."""
    _check_example(example)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    wider = torch.float64 if example.is_cuda else torch.float32  # CUDA may round to TF32
    if example.is_cuda or dtypes & {torch.float16, torch.bfloat16}:
        model = copy.deepcopy(model).to(wider)
        example = example.to(wider) if example.is_floating_point() else example
    outputs = _run(model, example, model)
    if not outputs:
        raise CompactError(
            f"{type(model).__name__} puts out no tensor: wrap it in a module that returns its "
            "outputs as tensors, alone or in a tuple, list or dictionary"
        )
    return outputs


def _check_example(example: Any) -> None:
    if not isinstance(example, Tensor) or not example.numel():
        raise CompactError("the example must be a tensor that is not empty")


class _Evaluation:
    """Inside the block a model is in evaluation mode; on leaving, its modules are as they were."""

    def __init__(self, model: nn.Module) -> None:
        self._were = {module: module.training for module in model.modules()}
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: Any) -> None:
        for module, training in self._were.items():
            module.training = training


def _difference(expected: list[Tensor], outputs: list[Tensor]) -> float:
    """The largest difference, as a fraction of the largest output; infinity for NaNs elsewhere."""
    worst = 0.0
    for one, other in zip(expected, outputs, strict=True):
        if one.shape != other.shape:
            return torch.inf
        one, other = one.double(), other.double()
        finite = one.isfinite()
        if not torch.equal(one[~finite].nan_to_num(0), other[~finite].nan_to_num(0)):
            return torch.inf
        if finite.any():
            distance = float((one - other)[finite].abs().max())
            worst = max(worst, distance / max(float(one[finite].abs().max()), 1e-30))
    return worst


# ---------------------------------------------------------------------------- removing


def _compact(model: nn.Module, example: Tensor, strictness: int, original: nn.Module) -> Compaction:
    """Takes the units out of the model itself, a copy of the original, which has not run."""
    trace = _trace(model, example, strictness)
    restore_buffers(model, original)
    roots = trace.roots()
    needed = _needed(trace, roots)[roots]
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    before = sum(parameter.numel() for parameter in model.parameters())
    layers = {}
    for reader in trace.readers.values():
        left = int(needed[reader.outputs].sum())
        if left < len(reader.outputs):
            layers[names[id(reader.weight)]] = len(reader.outputs), left
        _fold(model, reader, ~needed[reader.inputs])
    _cut(model, trace, needed)
    after = sum(parameter.numel() for parameter in model.parameters())
    kept = _reasons(trace, roots, needed)
    return Compaction((before, after), layers, kept, tuple(trace.computed))


def _needed(trace: Trace, roots: Tensor) -> Tensor:
    """Which channels the outputs depend on, by representative, and those kept for the form."""
    needed = torch.zeros(len(roots), dtype=torch.bool)
    needed[PINNED] = True
    for labels, _ in trace.pins:
        needed[roots[labels]] = True
    axes = [roots[axis.labels] for axis in trace.axes.values()]
    while True:
        before = int(needed.sum())
        for reader in trace.readers.values():
            read = reader.nonzero[needed[roots[reader.outputs]]].any(0) & ~reader.folds
            needed[roots[reader.inputs[read]]] = True
        if int(needed.sum()) > before:
            continue
        for labels in axes:  # no layer without units
            if len(labels) and not needed[labels].any():
                needed[labels[0]] = True
        for grid in trace.grids:
            _keep_rectangle(roots[grid], needed)
        if int(needed.sum()) == before:
            return needed


def _keep_rectangle(grid: Tensor, needed: Tensor) -> None:
    """As many channels of each row of a grid, such as each head, as the one with the most needs."""
    most = int(needed[grid].sum(1).max())
    for row in grid:
        spare = row[~needed[row]]
        needed[spare[: most - int(needed[row].sum())]] = True


def _fold(model: nn.Module, reader: Reader, removed: Tensor) -> None:
    """Adds what removed constants contribute to a layer to its bias."""
    constants = removed & reader.folds & (reader.values != 0)
    if not constants.any():
        return
    weight, bias = reader.weight.detach(), reader.bias
    if reader.out_dim:
        weight = weight.transpose(0, 1)
    chosen = weight[:, constants.to(weight.device)].unsqueeze(-1).flatten(2).double().sum(2)
    added = chosen @ reader.values[constants].to(chosen)
    if bias is None:
        reader.bias = nn.Parameter(added.to(weight.dtype), reader.weight.requires_grad)
        for module in model.modules():
            if getattr(module, "weight", None) is reader.weight:
                module.bias = reader.bias
    else:
        bias.data.copy_(bias.double() + added)


def _cut(model: nn.Module, trace: Trace, needed: Tensor) -> None:
    """Replaces every tensor along whose axes channels go, and corrects its layer's sizes."""
    keep: dict[int, dict[int, Tensor]] = {}
    for axis in trace.axes.values():
        if not needed[axis.labels].all():
            keep.setdefault(id(axis.tensor), {})[axis.dim] = needed[axis.labels].nonzero()[:, 0]
    for reader in trace.readers.values():  # biases that have been made
        rows = needed[reader.outputs]
        if reader.bias is not None and not rows.all():
            keep.setdefault(id(reader.bias), {})[0] = rows.nonzero()[:, 0]
    smaller: dict[int, Tensor] = {}
    for module in model.modules():
        changed = False
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in keep:
                    if id(tensor) not in smaller:
                        smaller[id(tensor)] = _without(tensor, keep[id(tensor)])
                    tensors[name] = smaller[id(tensor)]  # type: ignore[assignment]
                    changed = True
        if changed:
            _correct_sizes(module)


def _without(tensor: Tensor, keep: dict[int, Tensor]) -> Tensor:
    part = tensor.detach()
    for dim, indices in keep.items():
        part = part.index_select(dim, indices.to(part.device))
    if not isinstance(tensor, nn.Parameter):
        return part
    return nn.Parameter(part, requires_grad=tensor.requires_grad)


def _correct_sizes(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = map(int, module.weight.shape)
    elif isinstance(module, _ConvNd) and not module.transposed:
        if module.groups > 1 and module.weight.shape[1] == 1:
            module.groups = module.weight.shape[0] // (module.out_channels // module.groups)
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, _NormBase) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif hasattr(module, "nf"):  # transformers' Conv1D
        module.nf = int(module.weight.shape[1])  # type: ignore[index, assignment]


def _reasons(trace: Trace, roots: Tensor, needed: Tensor) -> dict[str, int]:
    """Why units that no weight enters stay, counted."""
    reasons: Counter[str] = Counter()
    pinned = [(set(roots[labels].tolist()), reason) for labels, reason in trace.pins]
    pinned += [
        (set(roots[g].flatten().tolist()), "as many as other heads need") for g in trace.grids
    ]
    other = "constants that what reads them cannot take into its bias"
    for reader in trace.readers.values():
        dead = reader.outputs[~reader.nonzero.any(1) & needed[reader.outputs]]
        for root in roots[dead].tolist():
            reasons[next((reason for labels, reason in pinned if root in labels), other)] += 1
    return dict(reasons)
