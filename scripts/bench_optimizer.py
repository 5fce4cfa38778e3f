"""Times one optimizer step: torch's AdamW, the straightforward pWD, and ours.

The steps of all of them are interleaved, so that what else the machine does falls on all alike;
the table shows medians and their ratios to torch's fused AdamW, on the parameters of ResNet18
(width 64) and of nanoGPT: dense, and with half of the weights at 0 with gradients of 0. First steps
and peak memory are measured in processes of their own: the very first step builds the fused
kernel, a first step in a later process finds it built.

With --device cuda the table also has torch's fused AdamW with capturable, the time until a step
returns to Python and the kernels that it launches. A time is then that of ten steps in a row, with
the wait for their end; first steps and peak memory are measured in this process.

    python scripts/bench_optimizer.py --device cuda --output optimizer_cuda.csv
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

from bench_common import (
    device_and_output,
    kernel_launches,
    machine,
    memory,
    reset_peak_memory,
    synchronize,
    thread_count,
    write_rows,
)
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
TINY: dict[str, Callable[[], nn.Module]] = {"tiny": lambda: nn.Linear(30, 20)}
BASELINE = "AdamW fused"
IN_A_ROW = 10  # steps on a GPU between two waits for it
ONCE = (
    "first_step_seconds",
    "later_first_step_seconds",
    "peak_extra_megabytes",
    "peak_extra_ratio",
)


class Straightforward(torch.optim.AdamW):
    """pWD as one would write it first: clone, AdamW's step, pow, multiply."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        p: float = 2.0,
        lambda_p: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=0)
        for group in self.param_groups:
            group.setdefault("p", p)
            group.setdefault("lambda_p", lambda_p)

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
            fused = self.name.startswith(BASELINE)
            capturable = self.name.endswith("capturable")
            return torch.optim.AdamW(
                model.parameters(), lr=1e-3, fused=fused, foreach=not fused, capturable=capturable
            )
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
            "ours, capturable": {"capturable": True},
        }[self.name]
        return AdamPWD(groups, lr=1e-3, **options)  # type: ignore[arg-type]


def cases(exponents: Iterable[float], sparsity: float, on_gpu: bool = False) -> list[Case]:
    """The baselines and every implementation at every p; without zeros also the slow ones."""
    slow: tuple[str, ...] = ("straightforward", "ours, reference", "ours, foreach")
    fast: tuple[str, ...] = ("ours, fused", "ours, default", "ours, hold_zeros", "ours, exact")
    ours = fast if sparsity else slow + fast
    baselines: tuple[str, ...] = (BASELINE,) if sparsity else (BASELINE, "AdamW foreach")
    if on_gpu and not sparsity:
        ours = (*ours, "ours, capturable")
        baselines = (*baselines, f"{BASELINE}, capturable")
    return [
        *(Case(name, None) for name in baselines),
        *(Case(name, p) for name in ours for p in exponents if name != "ours, exact" or p <= 2),
    ]


def prepared(model_name: str, sparsity: float, device: torch.device) -> nn.Module:
    """The model, with gradients of a realistic size, or of 0 where the weights are 0."""
    torch.manual_seed(0)
    model = MODELS[model_name]()
    for parameter in model.parameters():
        gradient = torch.randn_like(parameter) * 1e-3
        if parameter.ndim >= 2:
            kept = torch.rand_like(parameter) >= sparsity
            parameter.data *= kept
            gradient *= kept
        parameter.data = parameter.data.to(device)
        parameter.grad = gradient.to(device)
    return model


@dataclass(frozen=True)
class Timing:
    """Medians for one optimizer, a step.

    Attributes:
        seconds: until the step is done.
        host_seconds: until it returns to Python; on a CPU the same.
        kernels: that it launches on a GPU, else None.
    """

    seconds: float
    host_seconds: float
    kernels: float | None


def timings(
    model_name: str, timed: list[Case], sparsity: float, repeats: int, device: torch.device
) -> dict[Case, Timing]:
    """Medians of interleaved steps of each case, all on the same parameters."""
    model = prepared(model_name, sparsity, device)
    optimizers = {case: case.optimizer(model) for case in timed}
    count = IN_A_ROW if device.type == "cuda" else 1
    times: dict[Case, list[tuple[float, float]]] = {case: [] for case in timed}
    for repeat in track(range(-2, repeats), description=model_name, console=console):
        for case, optimizer in optimizers.items():
            start = time.perf_counter()
            for _ in range(count):
                optimizer.step()
            returned = time.perf_counter() - start
            synchronize(device)
            if repeat >= 0:  # the first steps make the state and fill the caches
                done = time.perf_counter() - start
                times[case].append((done / count, returned / count))
    kernels = {
        case: kernel_launches(optimizer.step, device) if device.type == "cuda" else None
        for case, optimizer in optimizers.items()
    }
    return {
        case: Timing(
            statistics.median(done for done, _ in values),
            statistics.median(returned for _, returned in values),
            kernels[case],
        )
        for case, values in times.items()
    }


def first_step_on_gpu(model_name: str, case: Case, device: torch.device) -> tuple[float, float]:
    """(seconds of the first step, MB beyond weights and gradients at the peak) on a GPU."""
    model = prepared(model_name, 0, device)
    optimizer = case.optimizer(model)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    optimizer.step()
    synchronize(device)
    seconds = time.perf_counter() - start
    for _ in range(3):
        optimizer.step()
    return seconds, (torch.cuda.max_memory_allocated(device) - before) / 1e6


def in_own_process(model_name: str, case: Case, cache: str) -> tuple[float, float]:
    """(seconds of the first step, MB beyond weights and gradients at the peak) of a new process."""
    command = [sys.executable, __file__, "--child", model_name, case.name, str(case.p)]
    environment = {**os.environ, "PNORM_DECAY_CACHE": cache}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def child(model_name: str, name: str, p: str) -> None:
    """The measurement of in_own_process, in that process."""
    model = prepared(model_name, 0, torch.device("cpu"))
    optimizer = Case(name, None if p == "None" else float(p)).optimizer(model)
    before = reset_peak_memory()
    start = time.perf_counter()
    optimizer.step()
    seconds = time.perf_counter() - start
    for _ in range(3):
        optimizer.step()
    sys.stdout.write(f"{seconds} {(memory('VmHWM') - before) / 1e6}")


def once(
    model_name: str, timed: list[Case], device: torch.device, own_processes: bool
) -> dict[str, dict[str, float | str]]:
    """What ``ONCE`` names, by implementation, measured with its first case."""
    found: dict[str, dict[str, float | str]] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as empty:
        for case in track(timed, description="first steps", console=console):
            if case.name in found or not own_processes:
                continue
            later: float | str = ""
            if device.type == "cuda":
                first, peak = first_step_on_gpu(model_name, case, device)
            else:
                cache = f"{empty}/{len(found)}"
                first, _ = in_own_process(model_name, case, cache)
                seconds, peak = in_own_process(model_name, case, cache)
                later = round(seconds, 3)
            peaks[case.name] = peak
            ratio = round(peak / peaks[BASELINE], 3) if peaks[BASELINE] else ""
            values = (round(first, 3), later, round(peak, 1), ratio)
            found[case.name] = dict(zip(ONCE, values, strict=True))
    return found


def measure(
    model_name: str,
    timed: list[Case],
    sparsity: float,
    repeats: int,
    device: torch.device,
    own_processes: bool = True,
) -> list[dict[str, Any]]:
    """One row a case. First steps and memory are those of the implementation's first case."""
    first = {} if sparsity else once(model_name, timed, device, own_processes)
    times = timings(model_name, timed, sparsity, repeats, device)
    count = sum(parameter.numel() for parameter in MODELS[model_name]().parameters())
    return [
        {
            "model": model_name,
            "parameters": count,
            "optimizer": case.name,
            "p": "" if case.p is None else case.p,
            "sparsity": sparsity,
            "milliseconds": round(times[case].seconds * 1e3, 3),
            "ratio": round(times[case].seconds / times[timed[0]].seconds, 3),
            **(
                {
                    "host_milliseconds": round(times[case].host_seconds * 1e3, 3),
                    "kernel_launches": times[case].kernels,
                }
                if device.type == "cuda"
                else {}
            ),
            **first.get(case.name, dict.fromkeys(ONCE, "")),
            **machine(device),
        }
        for case in timed
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    title = "One step, {model}, {parameters:,} parameters, sparsity {sparsity:g}"
    table = Table(title=title.format(**rows[0]))
    table.add_column("optimizer", no_wrap=True)
    more = {"host_milliseconds": "host,\nms", "kernel_launches": "kernels"}
    extra = {name: title for name, title in more.items() if name in rows[0]}
    columns = ("ms", "ratio", *extra.values(), "first\nstep, s", "first,\nbuilt, s", "peak,\nMB")
    for column in (*columns, "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        case = Case(row["optimizer"], row["p"] if row["p"] != "" else None)
        table.add_row(
            case.label,
            f"{row['milliseconds']:.2f}",
            f"{row['ratio']:.2f}",
            *(str(row[name]) for name in (*extra, *ONCE)),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--p", nargs="+", type=float, default=list(EXPONENTS))
    parser.add_argument("--repeats", type=int, default=31, help="timed steps of each optimizer")
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads())
    parser.add_argument(
        "--output", type=Path, help="(default on a CPU: results/bench/optimizer.csv)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, to see that the benchmark runs here"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} (must be at least 1)")
    recorded = Path("results/bench/optimizer.csv")
    device, output = device_and_output(parser, arguments, recorded)
    if arguments.tiny:
        MODELS.update(TINY)
        arguments.models = list(TINY)
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    rows: list[dict[str, Any]] = []
    # Compiled code of earlier processes would make the first steps of this one look quick.
    with tempfile.TemporaryDirectory() as cache:
        if device.type == "cuda":
            os.environ["PNORM_DECAY_CACHE"] = cache
        for model_name in arguments.models:
            for sparsity in SPARSITIES:
                timed = cases(arguments.p, sparsity, device.type == "cuda")
                measured = measure(
                    model_name, timed, sparsity, arguments.repeats, device, not arguments.tiny
                )
                show(measured)
                rows += measured
                if arguments.output:  # what there is, should it be stopped
                    write_rows(output, rows)
    write_rows(output, rows)
    console.print(f"{output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
