"""Sparse training by reparametrised weights: spred, deep weight factorisation, ReWA."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils import parametrize

from pnorm_decay.baselines.base import Loss, SparsityMethod, check, number, whole
from pnorm_decay.optim import split_decayed

# A factor's magnitude when it is drawn, in its standard deviations before rescaling.
FACTOR_RANGE = (0.1, 2.0)
LOWEST_THRESHOLD = 1e-13  # a weight below it counts as zero anyway
BISECTIONS = 12  # of the 13 or so decades above it, which leaves hundredths of a decade


class Reparametrised(SparsityMethod):
    """Trains every decayed weight as a function of other tensors, and ends in a plain model.

    The functions are registered by `torch.nn.utils.parametrize`, so that any optimizer trains the
    tensors behind the weights and its weight decay acts on them. Beside the trained model stands a
    plain copy, which is what is evaluated (in float32) and saved.

    Nothing here makes an exact zero, so after the last step every weight below a threshold is set
    to zero: one threshold for the whole network, the largest (found by bisection, which takes the
    loss for monotone in it) that raises the loss on a few fixed training batches by no more than
    `tolerance`. The validation part has no say in it.

    Args:
        tolerance: nats, in [0, inf).

    Raises:
        ValueError: tolerance is out of its range.
    """

    NEEDS_L2_DECAY = True

    def __init__(self, tolerance: float) -> None:
        check(number(tolerance) and tolerance >= 0, "tolerance", tolerance, "at least 0")
        self.tolerance = tolerance
        self._finished = False

    def parametrization(self) -> nn.Module:
        """The function, with a `right_inverse` that initialises what is behind it."""
        raise NotImplementedError

    def setup(self, model: nn.Module, example: Tensor, *, steps: int, warmup: int) -> None:
        super().setup(model, example, steps=steps, warmup=warmup)
        self._plain = copy.deepcopy(model)
        decayed = [name for name, _ in split_decayed(model)[0]]
        every_name = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if len(every_name) != len(list(model.parameters())):
            raise ValueError("modules share a parameter, which cannot be reparametrised")
        for name in decayed:
            owner, _, leaf = name.rpartition(".")
            if not bool(model.get_parameter(name).detach().any()):
                raise ValueError(f"{name} is zero, where its factors would never move")
            function = self.parametrization()
            parametrize.register_parametrization(model.get_submodule(owner), leaf, function)

    @torch.no_grad()
    def finish(self, training_loss: Loss) -> None:
        self._copy_weights()
        weights = [weight for _, weight in split_decayed(self._plain)[0]]
        trained = [weight.clone() for weight in weights]

        def zero_below(threshold: float) -> None:
            for weight, value in zip(weights, trained, strict=True):
                weight.copy_(value.masked_fill(value.abs() < threshold, 0))

        limit = training_loss(self._plain) + self.tolerance
        low = math.log10(LOWEST_THRESHOLD)
        high = math.log10(max(float(weight.abs().max()) for weight in weights) + LOWEST_THRESHOLD)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            zero_below(10**middle)
            if training_loss(self._plain) <= limit:
                low = middle
            else:
                high = middle
        zero_below(10**low)
        self._finished = True

    def plain_model(self) -> nn.Module:
        if not self._finished:
            self._copy_weights()
        return self._plain

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for name, tensor in chain(self._plain.named_parameters(), self._plain.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            tensor.copy_(getattr(self._model.get_submodule(owner), leaf))


class Product(nn.Module):
    """The elementwise product of factors of the weight's shape."""

    def __init__(self, factors: int) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, *factors: Tensor) -> Tensor:
        return math.prod(factors[1:], start=factors[0])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Random factors whose product has the weight's root mean square, and none near 0.

        Args:
            weight: freshly initialised; only its root mean square is used.
        """
        size = weight.square().mean().sqrt() ** (1 / self.factors)
        return tuple(_bounded_normal(weight) * size for _ in range(self.factors))


def _bounded_normal(like: Tensor) -> Tensor:
    """Normal values conditioned on `|z|` in FACTOR_RANGE, scaled to a mean square of 1."""
    low, high = (math.erf(bound / math.sqrt(2)) for bound in FACTOR_RANGE)
    u = torch.rand_like(like) * 2 - 1
    z = torch.copysign(torch.erfinv(low + u.abs() * (high - low)), u)
    return z / z.square().mean().sqrt()


class Factorised(Reparametrised):
    """spred (two factors) and deep weight factorisation (more): `w = w_1 w_2 ... w_K`.

    Weight decay `lambda` on the factors is, at the factors' best for a given w, the penalty
    `lambda |w|^p / p` with p = 2/K in this project's convention: L1 for two factors.

    References: Ziyin and Wang, "spred: Solving L1 Penalty with SGD", ICML 2023; Kolb et al., "Deep
    Weight Factorization: Sparse Learning Through the Lens of Artificial Symmetries", ICLR 2025.
    The latter initialises the factors so that the product has the variance that the plain weight
    would have, drawn from a normal distribution truncated on both sides. Its interval is not known
    to us: ours is `FACTOR_RANGE`, and the values are rescaled so that the variance is exact.

    Args:
        factors: K, at least 2.
        tolerance: see `Reparametrised`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(self, factors: int, tolerance: float) -> None:
        super().__init__(tolerance)
        check(whole(factors) and factors >= 2, "factors", factors, "a whole number from 2 on")
        self.factors = factors

    @classmethod
    def exponent(cls, options: Mapping[str, Any]) -> float | None:
        factors = options["factors"]
        return 2 / factors if whole(factors) and factors >= 2 else None

    def parametrization(self) -> nn.Module:
        return Product(self.factors)


class _AdaptivePower(torch.autograd.Function):
    """Forward `sign(y) |y|^K`; backward ReWA's step direction instead of the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, power: int, order: float, eps: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.options = power, order, eps  # type: ignore[attr-defined]
        return y**power

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        power, order, eps = ctx.options
        size = y.abs()
        step = power * size**order
        if eps:
            slope = size ** (power - 1)
            step = step * slope / (slope + eps)
        return grad * step, None, None, None


class Power(nn.Module):
    """`y^K` for odd K, with ReWA's adaptive step in its backward pass."""

    def __init__(self, power: int, order: float, eps: float) -> None:
        super().__init__()
        self.power = power
        self.order = order
        self.eps = eps

    def forward(self, y: Tensor) -> Tensor:
        return _AdaptivePower.apply(y, self.power, self.order, self.eps)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The y whose power is the weight."""
        return torch.copysign(weight.abs() ** (1 / self.power), weight)


class ReWA(Reparametrised):
    """ReWA: `w = y^K`, weight decay on y, and a step of y scaled by `|y|^M / (|y|^(K-1) + eps)`.

    The loss's gradient in y is `K y^(K-1) g`, so that with the scale its step is
    `K |y|^M g * |y|^(K-1) / (|y|^(K-1) + eps)`, for eps = 0 simply `K |y|^M g`: no longer 0 around
    y = 0 as fast. This takes the gradient's place before the optimizer, so that with AdamW its
    moments are of it and the decay of y is AdamW's own, unscaled.

    Reference: Xu et al., "Theoretical Analysis of Sparse Optimization with Reparameterization,
    Weight Decay, and Adaptive Learning Rate", ICML 2026 (arXiv:2605.25134); the scale, its place
    before AdamW's moments, and K = 9, M = 2, eps = 0 with a weight decay of 1e-4 for CIFAR-10 are
    from its authors' public repository. Ours: the threshold (`Reparametrised`), and the p of
    records: where step and decay balance, `|g| = (lambda / K) |w|^((1-M)/K)`, which is the slope
    of a penalty with p = 1 + (1 - M) / K.

    Args:
        power: K, an odd whole number from 3 on, so that w takes both signs.
        order: M, in [0, K - 1).
        eps: in [0, inf).
        tolerance: see `Reparametrised`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(self, power: int, order: float, eps: float, tolerance: float) -> None:
        super().__init__(tolerance)
        odd = whole(power) and power >= 3 and power % 2 == 1
        check(odd, "power", power, "an odd whole number from 3 on")
        check(number(order) and 0 <= order < power - 1, "order", order, f"in [0, {power - 1})")
        check(number(eps) and eps >= 0, "eps", eps, "at least 0")
        self.power = power
        self.order = order
        self.eps = eps

    @classmethod
    def exponent(cls, options: Mapping[str, Any]) -> float | None:
        power, order = options["power"], options["order"]
        return 1 + (1 - order) / power if whole(power) and power > 0 and number(order) else None

    def parametrization(self) -> nn.Module:
        return Power(self.power, self.order, self.eps)
