"""The update in float64 NumPy, written from paper.md alone; and what the optimizer tests share."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pnorm_decay import SGDPWD, AdamPWD

# Every way through the compiled step.
EXPONENTS = [0.3, 0.5, 0.8, 1, 1.2, 1.5, 2, 3]
RECIPES: list[tuple[Any, dict[str, Any]]] = [
    (AdamPWD, {}),
    (AdamPWD, {"amsgrad": True, "maximize": True, "weight_decay": 0.5}),
    (AdamPWD, {"exact": True, "weight_decay": 0.5}),
    (AdamPWD, {"hold_zeros": True}),
    (SGDPWD, {"exact": True, "hold_zeros": True, "momentum": 0.9}),
    (SGDPWD, {}),
    (SGDPWD, {"momentum": 0.9, "dampening": 0.2}),
    (SGDPWD, {"momentum": 0.9, "nesterov": True}),
]

Array = NDArray[np.float64]


def factor(w: Array, p: float, strength: float, l2: float = 0.0) -> Array:
    """1 / (1 + strength |w|^(p-2) + l2), in the form that is finite at 0."""
    if strength == 0:
        return np.full_like(w, 1 / (1 + l2))
    if p < 2:
        x = np.abs(w) ** (2 - p)
        return x / (x * (1 + l2) + strength)
    return 1 / (1 + l2 + strength * np.abs(w) ** (p - 2))


def threshold(p: float, strength: float) -> float:
    """Zuo et al. 2013: up to which |v| the exact step's result is 0 (p <= 1)."""
    if p == 1:
        return strength
    smallest = (2 * strength * (1 - p) / p) ** (1 / (2 - p))
    return smallest + strength * smallest ** (p - 1)


def proximal(v: Array, p: float, strength: float) -> Array:
    """argmin_x (x - v)^2 / 2 + strength |x|^p / p, by bisection of the derivative.

    It rises from its lowest point on (p < 1), or everywhere (p >= 1); 0 is compared with.
    """
    size = np.abs(v)
    if strength == 0:
        return v.copy()
    lowest = (strength * (1 - p)) ** (1 / (2 - p)) if p < 1 else 0.0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low = np.full_like(size, np.log(max(lowest, 1e-300)))
        high = np.maximum(np.log(size), low)
        for _ in range(64):
            middle = (low + high) / 2
            rises = np.exp(middle) - size + strength * np.exp((p - 1) * middle) > 0
            low, high = np.where(rises, low, middle), np.where(rises, middle, high)
        x = np.exp((low + high) / 2)
        stays = (x - size) ** 2 / 2 + strength * x**p / p < size**2 / 2
    # Below 1e-6 the costs cannot be told apart in float64; for p > 1 the result is never 0.
    return np.copysign(np.where(stays | ((p > 1) & (size > 0)), x, 0), v)


@dataclass
class Oracle:
    """One tensor's weights and state, and the options of its optimizer."""

    w: Array
    rule: str  # "adam" or "sgd"
    options: dict[str, Any]
    m: Array | None = None
    v: Array | None = None
    largest: Array | None = None
    q: Array | None = None
    steps: int = 0
    shrunk: Array = field(init=False)  # the factor of the last step
    moved: Array = field(init=False)  # |w| + lr |u| of the last step, what rounding scales with
    undecided: NDArray[np.bool_] = field(init=False)  # near the threshold, where rounding decides

    def step(self, g: Array) -> None:
        o = {
            "weight_decay": 0.0,
            "reweight_every": 1,
            "auxiliary_beta": 0.0,
            "maximize": False,
            "exact": False,
            "hold_zeros": False,
            **self.options,
        }
        self.steps += 1
        g = -g if o["maximize"] else g
        u = self.adam(g, o) if self.rule == "adam" else self.sgd(g, o)
        lr, lam, l2, p = o["lr"], o["lambda_p"], o["lr"] * o["weight_decay"], o["p"]
        self.moved = np.abs(self.w) + lr * np.abs(u)
        before = self.w
        if o["exact"]:
            v, strength = (self.w - lr * u) / (1 + l2), lr * lam / (1 + l2)
            self.w = proximal(v, p, strength)
            self.shrunk = np.ones_like(v)
            edge = threshold(p, strength) if p <= 1 else 0
            self.undecided = np.abs(np.abs(v) - edge) < 1e-2 * edge
        else:
            self.divide(u, o)
        if o["hold_zeros"]:
            self.w = np.where(before == 0, 0, self.w)

    def divide(self, u: Array, o: dict[str, Any]) -> None:
        lr, lam, l2, p = o["lr"], o["lambda_p"], o["lr"] * o["weight_decay"], o["p"]
        if o["reweight_every"] == 1 and o["auxiliary_beta"] == 0:
            self.shrunk = factor(self.w, p, lr * lam, l2)
        else:
            fresh = factor(self.w, p, 1.0)
            if self.q is None:
                self.q = fresh
            elif (self.steps - 1) % o["reweight_every"] == 0:
                self.q = o["auxiliary_beta"] * self.q + (1 - o["auxiliary_beta"]) * fresh
            self.shrunk = self.q / (self.q * (1 + l2) + lr * lam * (1 - self.q))
        self.undecided = np.zeros_like(self.w, bool)
        self.w = (self.w - lr * u) * self.shrunk

    def adam(self, g: Array, o: dict[str, Any]) -> Array:
        beta1, beta2 = o.get("betas", (0.9, 0.999))
        zeros = np.zeros_like(self.w)
        self.m = beta1 * (zeros if self.m is None else self.m) + (1 - beta1) * g
        self.v = beta2 * (zeros if self.v is None else self.v) + (1 - beta2) * g * g
        v = self.v
        if o.get("amsgrad"):
            self.largest = v = np.maximum(zeros if self.largest is None else self.largest, v)
        m_hat, v_hat = self.m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
        return m_hat / (np.sqrt(v_hat) + o.get("eps", 1e-8))

    def sgd(self, g: Array, o: dict[str, Any]) -> Array:
        momentum = o.get("momentum", 0)
        if not momentum:
            return g
        self.m = g if self.m is None else momentum * self.m + (1 - o.get("dampening", 0)) * g
        return g + momentum * self.m if o.get("nesterov") else self.m


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy().copy()


def make_parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Tensors of every layout, with zeros, tiny and huge weights among them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    special = random(9, 70)
    special[0] = 0
    special[1, :4] = torch.tensor([1e-30, -1e-20, 1e-5, -1e3]).to(dtype)
    tensors = [
        special,
        random(700),
        random(8, 6, 3, 3).to(memory_format=torch.channels_last),
        random(12, 20).t(),
        random(10, 10)[:, ::2],
        random(0, 3),
        random(),
    ]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def gradients(params: list[torch.nn.Parameter], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(param.shape, generator=generator).to(param.dtype) for param in params]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    for param, grad in zip(params, gradients(params, step), strict=True):
        param.grad = grad.to(memory_format=torch.preserve_format)


def train_many(
    cls: Any, dtype: torch.dtype, options: dict[str, Any], device: torch.device | None = None
) -> list[torch.nn.Parameter]:
    """A few steps of many tensors, odd sizes and more than one launch among them."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (0,), (4096,), (5, 1700), *[(2, 2)] * 50]
    params = [
        torch.nn.Parameter(torch.randn(size, generator=generator).mul(0.3).to(device, dtype))
        for size in sizes
    ]
    with torch.no_grad():
        params[0][0] = 0
    options = {"lr": 0.01, "lambda_p": 0.3, "fused": True, **options}
    group = {"params": params, "lambda_p": options["lambda_p"]}  # asked for, of the vectors too
    optimizer = cls([group], **options)
    for step in range(4):
        for param in params:
            param.grad = (param.detach() * 0.7 + 0.01 * (step - 1)).to(dtype)
        optimizer.step()
    return params
