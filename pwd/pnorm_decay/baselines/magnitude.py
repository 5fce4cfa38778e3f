"""Iterative magnitude pruning (IMP) during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.prune import L1Unstructured

from pnorm_decay.baselines.base import SparsityMethod, check, number, whole
from pnorm_decay.optim import split_decayed

SCOPES = ("layer", "global")


class MagnitudePruning(SparsityMethod):
    """Prunes the smallest weights in equal-ratio steps while any optimizer trains the rest.

    The setting of the paper's comparison (its authors' public run logs): 40 layer-wise L1 steps
    between the end of warm-up and 70% of training. Each step keeps the same fraction of what is
    left, so that after step i of n a fraction `(1 - sparsity)^(i/n)` remains. A pruned weight stays
    0: its gradient is removed before the optimizer's step and its value after it.

    What is pruned is chosen by `torch.nn.utils.prune`'s L1Unstructured; the masks are kept here
    instead of in its reparametrisation (`weight_orig`, `weight_mask`), so that the model's
    parameters keep their names and identities: any optimizer, checkpoint or count of zeros then
    works on the effective weights, and there is nothing to remove at the end.

    Args:
        sparsity: the target, in [0, 1). The number of weights kept is `(1 - sparsity) n` rounded
            to a whole number: of every layer with scope "layer" (so that overall it is met within
            half a weight a layer), of all of them together with scope "global".
        scope: "layer" prunes every decayed tensor alike, "global" compares all weights.
        num_steps: pruning steps, at least 1; fewer where the run has fewer steps between the
            warm-up and `end`.
        end: when the last pruning step is taken, as a fraction of the run, in (0, 1].

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self, sparsity: float, scope: str = "layer", num_steps: int = 40, end: float = 0.7
    ) -> None:
        check(number(sparsity) and 0 <= sparsity < 1, "sparsity", sparsity, "in [0, 1)")
        check(scope in SCOPES, "scope", scope, " or ".join(SCOPES))
        check(
            whole(num_steps) and num_steps > 0,
            "num_steps",
            num_steps,
            "a positive whole number",
        )
        check(number(end) and 0 < end <= 1, "end", end, "in (0, 1]")
        self.sparsity = sparsity
        self.scope = scope
        self.num_steps = num_steps
        self.end = end
        self._masks: dict[str, Tensor] = {}

    def setup(self, model: nn.Module, example: Tensor, *, steps: int, warmup: int) -> None:
        super().setup(model, example, steps=steps, warmup=warmup)
        self._weights: dict[str, Parameter] = dict(split_decayed(model)[0])
        self._masks = {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in self._weights.items()
        }
        length = max(1, round(self.end * steps) - warmup)
        number = min(self.num_steps, length)
        # Run step -> the fraction that is kept from then on.
        self._kept = {
            warmup + round(i * length / number) - 1: (1 - self.sparsity) ** (i / number)
            for i in range(1, number + 1)
        }

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for name, weight in self._weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self._masks[name], 0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self._zero()
        if step in self._kept:
            names = list(self._masks)
            for scope in [names] if self.scope == "global" else [[name] for name in names]:
                self._prune(scope, self._kept[step])
            self._zero()

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self._masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, mask in self._masks.items():
            mask.copy_(state["masks"][name])

    def _zero(self) -> None:
        for name, weight in self._weights.items():
            weight.masked_fill_(~self._masks[name], 0)

    def _prune(self, names: list[str], kept_fraction: float) -> None:
        """Prunes the smallest unpruned weights of some tensors until a fraction of all is left."""
        values = torch.cat([self._weights[name][self._masks[name]] for name in names])
        size = sum(self._masks[name].numel() for name in names)
        amount = max(0, values.numel() - round(kept_fraction * size))
        chosen = L1Unstructured(amount=amount).compute_mask(values, torch.ones_like(values)).bool()
        for name in names:
            mask = self._masks[name]
            left = int(mask.sum())
            mask[mask.clone()] = chosen[:left]
            chosen = chosen[left:]
