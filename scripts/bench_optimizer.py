"""Times one optimizer step: torch's AdamW, the straightforward pWD, and ours.

The steps of all of them are interleaved, so that what else the machine does falls on all alike;
the table shows medians and their ratios to torch's fused AdamW, on the parameters of ResNet18
(width 64) and of nanoGPT: dense, and with half of the weights at 0 with gradients of 0. First steps
and peak memory are measured in processes of their own: the very first step builds the fused
kernel, a first step in a later process finds it built.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from bench_common import machine, memory, reset_peak_memory, write_rows
from pnorm_decay import AdamPWD, param_groups
from pnorm_decay.models.gpt import GPT
from pnorm_decay.models.resnet import ResNet18

console = Console(highlight=False)

EXPONENTS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
SPARSITIES = (0.0, 0.5)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet18(width=64),
    "nanogpt": lambda: GPT(
        vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.0, bias=False
    ),
}
BASELINE = "AdamW fused"
ONCE = (
    "first_step_seconds",
    "later_first_step_seconds",
    "peak_extra_megabytes",
    "peak_extra_ratio",
)


class Straightforward(torch.optim.AdamW):
    """pWD as one would write it first: clone, AdamW's step, pow, multiply."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr, weight_decay=0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before = [[param.clone() for param in group["params"]] for group in self.param_groups]
        super().step()
        for group, clones in zip(self.param_groups, before, strict=True):
            step = group["lr"] * group["lambda_p"]
            for param, old in zip(group["params"], clones, strict=True):
                x = old.abs().pow(2 - group["p"])
                param.mul_(x / (x + step) if step else 1.0)


@dataclass(frozen=True)
class Case:
    """One optimizer to time."""

    name: str
    p: float | None

    @property
    def label(self) -> str:
        return self.name if self.p is None else f"{self.name}, p = {self.p:g}"

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.p is None:
            fused = self.name == BASELINE
            return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused, foreach=not fused)
        groups = param_groups(model, p=self.p, lambda_p=1e-3)
        if self.name == "straightforward":
            return Straightforward(groups, lr=1e-3)
        options = {
            "ours, reference": {"foreach": False, "fused": False},
            "ours, foreach": {"foreach": True},
            "ours, fused": {"fused": True},
            "ours, default": {},
            "ours, hold_zeros": {"hold_zeros": True},
            "ours, exact": {"exact": True},
        }[self.name]
        return AdamPWD(groups, lr=1e-3, **options)  # type: ignore[arg-type]


def cases(exponents: Iterable[float], sparsity: float) -> list[Case]:
    """The baselines and every implementation at every p; without zeros also the slow ones."""
    slow = ("straightforward", "ours, reference", "ours, foreach")
    fast = ("ours, fused", "ours, default", "ours, hold_zeros", "ours, exact")
    ours = fast if sparsity else slow + fast
    baselines = (BASELINE,) if sparsity else (BASELINE, "AdamW foreach")
    return [
        *(Case(name, None) for name in baselines),
        *(Case(name, p) for name in ours for p in exponents if name != "ours, exact" or p <= 2),
    ]


def prepared(model_name: str, sparsity: float) -> nn.Module:
    """The model, with gradients of a realistic size, or of 0 where the weights are 0."""
    torch.manual_seed(0)
    model = MODELS[model_name]()
    for parameter in model.parameters():
        gradient = torch.randn_like(parameter) * 1e-3
        if parameter.ndim >= 2:
            kept = torch.rand_like(parameter) >= sparsity
            parameter.data *= kept
            gradient *= kept
        parameter.grad = gradient
    return model


def median_times(
    model_name: str, timed: list[Case], sparsity: float, repeats: int
) -> dict[Case, float]:
    """Seconds a step of each case: medians of interleaved steps, all on the same parameters."""
    model = prepared(model_name, sparsity)
    optimizers = {case: case.optimizer(model) for case in timed}
    times: dict[Case, list[float]] = {case: [] for case in timed}
    for repeat in track(range(-2, repeats), description=model_name, console=console):
        for case, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if repeat >= 0:  # the first steps make the state and fill the caches
                times[case].append(time.perf_counter() - start)
    return {case: statistics.median(values) for case, values in times.items()}


def in_own_process(model_name: str, case: Case, cache: str) -> tuple[float, float]:
    """(seconds of the first step, MB beyond weights and gradients at the peak) of a new process."""
    command = [sys.executable, __file__, "--child", model_name, case.name, str(case.p)]
    environment = {**os.environ, "PNORM_DECAY_CACHE": cache}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def child(model_name: str, name: str, p: str) -> None:
    """The measurement of in_own_process, in that process."""
    model = prepared(model_name, 0)
    optimizer = Case(name, None if p == "None" else float(p)).optimizer(model)
    before = reset_peak_memory()
    start = time.perf_counter()
    optimizer.step()
    seconds = time.perf_counter() - start
    for _ in range(3):
        optimizer.step()
    sys.stdout.write(f"{seconds} {(memory('VmHWM') - before) / 1e6}")


def measure(
    model_name: str, timed: list[Case], sparsity: float, repeats: int
) -> list[dict[str, Any]]:
    """One row a case. First steps and memory are those of the implementation's first case."""
    times = median_times(model_name, timed, sparsity, repeats)
    once = {} if sparsity else {case.name: case for case in reversed(timed)}
    first: dict[str, float] = {}
    later: dict[str, float] = {}
    peak: dict[str, float] = {}
    for name, case in track(once.items(), description="first steps", console=console):
        with tempfile.TemporaryDirectory() as cache:
            first[name], _ = in_own_process(model_name, case, cache)
            later[name], peak[name] = in_own_process(model_name, case, cache)
    count = sum(parameter.numel() for parameter in MODELS[model_name]().parameters())
    return [
        {
            "model": model_name,
            "parameters": count,
            "optimizer": case.name,
            "p": "" if case.p is None else case.p,
            "sparsity": sparsity,
            "milliseconds": round(times[case] * 1e3, 3),
            "ratio": round(times[case] / times[timed[0]], 3),
            **(
                {
                    "first_step_seconds": round(first[case.name], 3),
                    "later_first_step_seconds": round(later[case.name], 3),
                    "peak_extra_megabytes": round(peak[case.name], 1),
                    "peak_extra_ratio": round(peak[case.name] / peak[BASELINE], 3),
                }
                if once
                else dict.fromkeys(ONCE, "")
            ),
            **machine(),
        }
        for case in timed
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    title = "One step, {model}, {parameters:,} parameters, sparsity {sparsity:g}"
    table = Table(title=title.format(**rows[0]))
    table.add_column("optimizer", no_wrap=True)
    for column in ("ms", "ratio", "first\nstep, s", "first,\nbuilt, s", "peak,\nMB", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        case = Case(row["optimizer"], row["p"] if row["p"] != "" else None)
        table.add_row(
            case.label,
            f"{row['milliseconds']:.2f}",
            f"{row['ratio']:.2f}",
            *(str(row[name]) for name in ONCE),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--p", nargs="+", type=float, default=list(EXPONENTS))
    parser.add_argument("--repeats", type=int, default=31, help="timed steps of each optimizer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("results/bench/optimizer.csv"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} (must be at least 1)")
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    rows: list[dict[str, Any]] = []
    for model_name in arguments.models:
        for sparsity in SPARSITIES:
            timed = cases(arguments.p, sparsity)
            measured = measure(model_name, timed, sparsity, arguments.repeats)
            show(measured)
            rows += measured
    write_rows(arguments.output, rows)
    console.print(f"{arguments.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
