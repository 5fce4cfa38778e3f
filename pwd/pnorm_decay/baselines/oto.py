"""Only Train Once (OTO): whole channels are projected to zero while the network trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pnorm_decay.baselines.base import Loss, SparsityMethod, check, number, whole
from pnorm_decay.deploy import ChannelGroup, CompactError, channel_groups


def _rows(group: ChannelGroup, tensors: list[Tensor]) -> Tensor:
    """The parts of some tensors that belong to each channel, as (channels, numbers)."""
    return torch.cat([tensor.detach().reshape(group.channels, -1) for tensor in tensors], 1)


def _along(channels: Tensor, parameter: Tensor) -> Tensor:
    """Flags of channels, (channels,), so that they broadcast over a parameter's first dimension."""
    return channels.view(-1, *[1] * (parameter.ndim - 1))


class OTO(SparsityMethod):
    """Structured pruning in one training, after OTO's optimizer HESSO.

    After the warm-up come pruning periods of equal length. At the start of each, the least salient
    of the remaining channel groups are chosen, an equal share of the target; over the period's T
    steps the optimizer trains everything, and after its step t the chosen groups are multiplied by
    `(T - t - 1) / (T - t)`, so that they go to zero on a straight line and reach it exactly.
    From then on they stay there. The other groups are trained as without OTO. At the end the
    weights that read a removed channel, which nothing depends on any more, are zero too: the zeros
    of the model are then what `pnorm_decay.deploy.compact` cuts out.

    The saliency of a channel is the sum of five scores of its parameters x and their gradient g,
    each divided by its norm over all channels: `|x|`, `|x| / sqrt(size)`, `1 + cos(x, g)`,
    `|x.g|` and `(x.g)^2 / 2`.

    References: Chen et al., "Only Train Once", NeurIPS 2021; OTOv2, ICLR 2023; "HESSO: Towards
    Automatic Efficient and User Friendly Any Neural Network Training and Pruning", 2024
    (arXiv:2409.09085); scores, their equal weights and the projection are read from the authors'
    public repository. Ours: g is the loss's gradient at one step, where theirs is the optimizer's
    direction; every layer keeps at least one channel; the share of training that the periods fill
    (`end`); and the groups are those of `pnorm_decay.deploy.channel_groups`.

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
        try:
            self._groups = channel_groups(model, example)
        except CompactError as error:
            raise ValueError(str(error)) from error
        _check_zero_invariance(model, example)
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
                    parameter.grad.masked_fill_(_along(pruned, parameter), 0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        period, step_of_period = divmod(step - self._warmup, self._period_steps)
        if 0 <= period < self._periods:
            left = self._period_steps - step_of_period
            for group, chosen, pruned in zip(self._groups, self._chosen, self._pruned, strict=True):
                for parameter in group.producers:
                    # By the mask itself: how many channels it has, a GPU would be waited for.
                    shrunk = parameter * ((left - 1) / left)
                    parameter.copy_(torch.where(_along(chosen, parameter), shrunk, parameter))
                if left == 1:
                    pruned |= chosen
        for group, pruned in zip(self._groups, self._pruned, strict=True):
            for parameter in group.producers:
                parameter.masked_fill_(_along(pruned, parameter), 0)

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
    """Zeroes channels of a copy, then what reads them, before anything is trained.

    Raises:
        ValueError: the outputs differ, so that a channel whose weights are zero is not.
    """
    trial = copy.deepcopy(model).eval()
    groups = channel_groups(trial, example)
    for group in groups:
        for parameter in group.producers:
            parameter[1::2] = 0
    expected = trial(example)
    for group in groups:
        for weight in group.consumers:
            weight[:, 1::2] = 0
    if not torch.equal(trial(example), expected):
        raise ValueError(
            f"{type(model).__name__} does not give the same outputs without some of its "
            "zero channels: what follows them makes something of zeros"
        )
