"""Only Train Once (OTO): whole channels are projected to zero while the network trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pnorm_decay.baselines.base import Loss, SparsityMethod, check, number, whole


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together from all the layers that share them.

    Attributes:
        root: one of the layers that make them.
        channels: their number.
        producers: parameters whose first dimension is the channel: convolutions, linear layers,
            batch norms. A channel whose part of all of them is zero is zero whatever comes in.
        consumers: weights whose second dimension is the channel: the layers that read it.
    """

    root: nn.Module
    channels: int
    producers: list[Tensor]
    consumers: list[Tensor]


def channel_groups(model: nn.Module, example: Tensor) -> tuple[Any, list[ChannelGroup]]:
    """The zero-invariant groups of a model, from torch-pruning's dependency graph.

    Channels that nothing reads are the model's outputs and belong to no group.

    Args:
        model: of convolutions, linear layers and batch norms, whose channels nothing reorders.
        example: a small batch of its inputs.

    Returns:
        The graph, and the groups in the graph's order.

    Raises:
        ValueError: the model cannot be traced, or has another kind of layer on such channels.
    """
    training = model.training
    name = type(model).__name__
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, example_inputs=(example,), verbose=False
        )
        found = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    except Exception as error:  # of many kinds, for whatever the tracing meets
        raise ValueError(f"torch-pruning cannot trace {name}: {error}") from error
    finally:
        model.train(training)  # the tracing leaves it in evaluation mode
    groups = [_read(graph, group, name) for group in found]
    groups = [group for group in groups if group.consumers]
    if not groups:
        raise ValueError(f"{name} has no channels that could be removed")
    return graph, groups


def _read(graph: Any, found: Any, name: str) -> ChannelGroup:
    root = found[0].dep.target.module
    channels = len(found[0].idxs)
    producers: list[Tensor] = []
    consumers: list[Tensor] = []
    for dependency, indices in found:
        layer = dependency.target.module
        if isinstance(layer, nn.Module) and not list(layer.parameters(recurse=False)):
            continue  # an activation, a sum: it keeps zeros, which OTO checks
        dense = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if not (dense or isinstance(layer, _BatchNorm)):
            raise ValueError(
                f"{name} has channels of a {type(layer).__name__}; only those of "
                "convolutions, linear layers and batch norms can be removed"
            )
        if [int(index) for index in indices] != list(range(channels)):
            raise ValueError(f"{name} reorders its channels before {layer}")
        if dense and graph.is_in_channel_pruning_fn(dependency.handler):
            consumers.append(layer.weight)
        else:
            producers += [part for part in (layer.weight, layer.bias) if part is not None]
    return ChannelGroup(root, channels, producers, consumers)


def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """A smaller copy of a model, without the channels that are zero.

    Args:
        model: see `channel_groups`.
        example: a small batch of its inputs.

    Returns:
        A network with the same outputs. A group whose channels are all zero keeps one of them.

    Raises:
        ValueError: see `channel_groups`.
    """
    small = copy.deepcopy(model)
    graph, groups = channel_groups(small, example)
    zero = [_is_zero(group).tolist() for group in groups]
    for group, zero_channels in zip(groups, zero, strict=True):
        indices = [index for index, is_zero in enumerate(zero_channels) if is_zero]
        indices = indices[: group.channels - 1]
        if indices:
            remove = graph.get_pruner_of_module(group.root).prune_out_channels
            graph.get_pruning_group(group.root, remove, indices).prune()
    return small


def _is_zero(group: ChannelGroup) -> Tensor:
    return (_rows(group, group.producers) == 0).all(1)


def _rows(group: ChannelGroup, tensors: list[Tensor]) -> Tensor:
    """The parts of some tensors that belong to each channel, as (channels, numbers)."""
    return torch.cat([tensor.detach().reshape(group.channels, -1) for tensor in tensors], 1)


class OTO(SparsityMethod):
    """Structured pruning in one training, after OTO's optimizer HESSO.

    After the warm-up come pruning periods of equal length. At the start of each, the least salient
    of the remaining channel groups are chosen, an equal share of the target; over the period's T
    steps the optimizer trains everything, and after its step t the chosen groups are multiplied by
    `(T - t - 1) / (T - t)`, so that they go to zero on a straight line and reach it exactly.
    From then on they stay there. The other groups are trained as without OTO. At the end the
    weights that read a removed channel, which nothing depends on any more, are zero too: the zeros
    of the model are then what `compact` cuts out.

    The saliency of a channel is the sum of five scores of its parameters x and their gradient g,
    each divided by its norm over all channels: `|x|`, `|x| / sqrt(size)`, `1 + cos(x, g)`,
    `|x.g|` and `(x.g)^2 / 2`.

    References: Chen et al., "Only Train Once", NeurIPS 2021; OTOv2, ICLR 2023; "HESSO: Towards
    Automatic Efficient and User Friendly Any Neural Network Training and Pruning", 2024
    (arXiv:2409.09085); scores, their equal weights and the projection are read from the authors'
    public repository. Ours: g is the loss's gradient at one step, where theirs is the optimizer's
    direction; every layer keeps at least one channel; the share of training that the periods fill
    (`end`); and the groups come from torch-pruning's graph.

    Args:
        sparsity: the fraction of all channels to be removed, in [0, 1).
        periods: pruning periods, at least 1; fewer where there are fewer steps.
        end: when the last period ends, as a fraction of the run, in (0, 1].

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(self, sparsity: float, periods: int = 10, end: float = 0.5) -> None:
        check(number(sparsity) and 0 <= sparsity < 1, "sparsity", sparsity, "in [0, 1)")
        check(whole(periods) and periods > 0, "periods", periods, "a positive whole number")
        check(number(end) and 0 < end <= 1, "end", end, "in (0, 1]")
        self.sparsity = sparsity
        self.periods = periods
        self.end = end

    def setup(self, model: nn.Module, example: Tensor, *, steps: int, warmup: int) -> None:
        super().setup(model, example, steps=steps, warmup=warmup)
        _check_zero_invariance(model, example)
        self._groups = channel_groups(model, example)[1]
        sizes = [group.channels for group in self._groups]
        self._target = round(self.sparsity * sum(sizes))
        most = sum(sizes) - len(sizes)
        check(
            self._target <= most,
            "sparsity",
            self.sparsity,
            f"at most {most / sum(sizes):.4f} for this model, so that no layer loses all channels",
        )
        self._warmup = warmup
        length = max(1, round(self.end * steps) - warmup)
        self._periods = min(self.periods, length)
        self._period_steps = length // self._periods
        device = example.device
        self._pruned = [torch.zeros(size, dtype=torch.bool, device=device) for size in sizes]
        self._chosen = [torch.zeros(size, dtype=torch.bool, device=device) for size in sizes]

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        period, step_of_period = divmod(step - self._warmup, self._period_steps)
        if 0 <= period < self._periods and step_of_period == 0:
            self._choose(round(self._target * (period + 1) / self._periods))
        for group, pruned in zip(self._groups, self._pruned, strict=True):
            for parameter in group.producers:
                if parameter.grad is not None:
                    parameter.grad[pruned] = 0

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        period, step_of_period = divmod(step - self._warmup, self._period_steps)
        if 0 <= period < self._periods:
            left = self._period_steps - step_of_period
            for group, chosen, pruned in zip(self._groups, self._chosen, self._pruned, strict=True):
                for parameter in group.producers:
                    parameter[chosen] *= (left - 1) / left
                if left == 1:
                    pruned |= chosen
        for group, pruned in zip(self._groups, self._pruned, strict=True):
            for parameter in group.producers:
                parameter[pruned] = 0

    @torch.no_grad()
    def finish(self, training_loss: Loss) -> None:
        for group, pruned in zip(self._groups, self._pruned, strict=True):
            for weight in group.consumers:
                weight[:, pruned] = 0

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self._pruned, "chosen": self._chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, masks in self.state_dict().items():
            for mask, saved in zip(masks, state[name], strict=True):
                mask.copy_(saved)

    def _choose(self, number: int) -> None:
        """Chooses the least salient of the remaining channels, so many that `number` are gone."""
        scores = torch.cat(self._saliency())
        pruned = torch.cat(self._pruned)
        owner = torch.cat(
            [torch.full_like(mask, i, dtype=torch.long) for i, mask in enumerate(self._pruned)]
        ).tolist()
        left = [int((~mask).sum()) for mask in self._pruned]
        chosen = torch.zeros_like(pruned)
        missing = number - int(pruned.sum())
        for channel in scores.masked_fill(pruned, torch.inf).argsort(stable=True).tolist():
            if missing == 0:
                break
            if not pruned[channel] and left[owner[channel]] > 1:
                chosen[channel] = True
                left[owner[channel]] -= 1
                missing -= 1
        self._chosen = list(chosen.split([group.channels for group in self._groups]))

    def _saliency(self) -> list[Tensor]:
        """Each group's scores, of shape (channels,)."""
        scores = []
        for group in self._groups:
            x = _rows(group, group.producers)
            grads = [
                torch.zeros_like(part) if part.grad is None else part.grad
                for part in group.producers
            ]
            g = _rows(group, grads)
            size, product = x.norm(dim=1), (x * g).sum(1)
            cosine = product / (size * g.norm(dim=1)).clamp(min=1e-30)
            average = size / x.shape[1] ** 0.5
            scores.append(torch.stack([size, average, 1 + cosine, product.abs(), product**2 / 2]))
        norms = torch.cat(scores, 1).norm(dim=1, keepdim=True).clamp(min=1e-30)
        return [(score / norms).sum(0) for score in scores]


@torch.no_grad()
def _check_zero_invariance(model: nn.Module, example: Tensor) -> None:
    """Cuts zeroed channels out of a copy and compares the outputs, before anything is trained.

    Raises:
        ValueError: they differ, so that the graph has missed something of this model.
    """
    trial = copy.deepcopy(model).eval()
    with torch.enable_grad():  # the tracing follows the backward graph
        groups = channel_groups(trial, example)[1]
        for group in groups:
            for parameter in group.producers:
                parameter.data[1::2] = 0
        small = compact(trial, example)
    expected, outputs = trial(example), small(example)
    scale = float(expected.abs().max())
    if not torch.allclose(outputs, expected, rtol=1e-3, atol=1e-3 * scale):
        raise ValueError(
            f"{type(model).__name__} without some zero channels does not give the same "
            "outputs: torch-pruning has not understood it"
        )
