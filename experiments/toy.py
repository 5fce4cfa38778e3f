"""Figure 1: gradient descent on L = (w - 1)^2 / 2 + |w|^p / p, three ways.

``coupled`` adds the norm's gradient to the loss's. For p < 1 it diverges at 0, so the weight is
thrown back and forth across 0 and never settles. ``periodic`` and ``pwd`` instead take the proximal
step ``w <- (w - lr * (w - 1)) / (1 + lr * s)``, where ``s = |w|^(p-2)`` is refreshed every few
steps, or at every step, which is pWD. Both reach 0 smoothly.

    python experiments/toy.py
    python experiments/toy.py --p 0.5 --lr 0.05 --every 10 --output /tmp/figure1.csv
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pandas as pd
import torch
from rich.console import Console

from pnorm_decay import SGDPWD, auxiliary, penalty
from pnorm_decay.files import write_text
from pnorm_decay.messages import one_line

DEFAULT_OUTPUT = Path("results/toy/figure1.csv")


def data_gradient(w: torch.Tensor) -> torch.Tensor:
    """The gradient of ``(w - 1)^2 / 2``."""
    return w - 1


def coupled(w: torch.Tensor, p: float, lr: float) -> Iterator[torch.Tensor]:
    """Plain gradient descent on the whole of L; the norm's gradient at 0 itself counts as 0."""
    while True:
        yield w
        norm_gradient = torch.where(w == 0, 0.0, w.sign() * w.abs() ** (p - 1))
        w = w - lr * (data_gradient(w) + norm_gradient)


def periodic(w: torch.Tensor, p: float, lr: float, every: int) -> Iterator[torch.Tensor]:
    """The proximal step, with s held for ``every`` steps between refreshes."""
    while True:
        s = auxiliary(w, p)
        for _ in range(every):
            yield w
            w = (w - lr * data_gradient(w)) / (1 + lr * s)


def pwd(w: torch.Tensor, p: float, lr: float) -> Iterator[torch.Tensor]:
    """The package's own optimizer at lambda_p = 1."""
    parameter = torch.nn.Parameter(w.clone())
    optimizer = SGDPWD([parameter], lr=lr, p=p, lambda_p=1.0)
    while True:
        yield parameter.detach().clone()
        parameter.grad = data_gradient(parameter.detach())
        optimizer.step()


def trajectories(p: float, lr: float, steps: int, every: int, start: float) -> pd.DataFrame:
    """All three methods for ``steps`` steps in float64.

    Returns:
        ``steps + 1`` rows a method, the start included: ``method, step, w, loss`` and the settings
        ``p, lr, every`` (steps between refreshes of s; blank where there is no s).
    """
    w = torch.tensor(start, dtype=torch.float64)
    methods: dict[str, tuple[Iterator[torch.Tensor], int | None]] = {
        "coupled": (coupled(w, p, lr), None),
        "periodic": (periodic(w, p, lr, every), every),
        "pwd": (pwd(w, p, lr), 1),
    }
    rows = [
        (method, step, w.item(), (0.5 * (w - 1) ** 2 + penalty(w, p)).item(), p, lr, refresh)
        for method, (weights, refresh) in methods.items()
        for step, w in zip(range(steps + 1), weights, strict=False)
    ]
    table = pd.DataFrame(rows, columns=["method", "step", "w", "loss", "p", "lr", "every"])
    return table.astype({"every": "Int64"})


def number(
    kind: Callable[[str], float], is_allowed: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    """An argparse type: a finite number that is allowed, or one line saying what is wanted."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_allowed(value)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
        return value

    return parse


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        description="Figure 1: a p norm in the gradient never settles, pWD reaches 0.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive = number(float, lambda x: x > 0, "a number above 0")
    count = number(int, lambda n: n >= 1, "a whole number of at least 1")
    norm = number(float, lambda p: 0 < p < 2, "a number between 0 and 2, both excluded")
    parser.add_argument("--p", type=norm, default=0.8, help="the norm, 0 < p < 2")
    parser.add_argument("--lr", type=positive, default=0.1, help="the learning rate")
    parser.add_argument("--steps", type=count, default=300, help="how many steps")
    parser.add_argument("--every", type=count, default=20, help="steps between refreshes of s")
    # pWD never moves a weight that starts at exactly 0.
    start = number(float, lambda w: w != 0, "a finite number other than 0")
    parser.add_argument("--w0", type=start, default=1.0, help="where the weight starts")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="the CSV to write")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    table = trajectories(args.p, args.lr, args.steps, args.every, args.w0)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    try:
        write_text(args.output, table.to_csv(index=False, lineterminator="\n"))
    except OSError as error:
        console.print(f"error: cannot write {one_line(args.output)}: {error.strerror}")
        sys.exit(2)
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
