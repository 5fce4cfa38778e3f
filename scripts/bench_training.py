"""Times the trainer against a straightforward training loop, on real data.

The straightforward loop is what one would write first: torchvision transforms on PIL images in a
DataLoader with two workers (text: a Python loop that stacks rows), fp32, contiguous images, AdamW,
`loss.item()` at every step. Ours is the run of `experiments/train.py` with AdamPWD, in the
precision that it chooses here. The two take turns, and the medians of their steps are compared.
"Outside" is our time outside forward, backward, clipping and the optimizer's step.

With --device cuda it is the trainer with AdamPWD, with torch's fused AdamW (capturable or not) and
with a straightforward pWD, and the straightforward loop where there is torchvision; a time is then
that of many steps with one wait at the end, and the kernels a step and the peak memory are told.
What stands behind `--` goes to every case as it is, for instance `-- trainer.compile=true`.

    PNORM_CIFAR10=... PNORM_SHAKESPEARE=... python scripts/bench_training.py
    python scripts/bench_training.py --device cuda --output training_cuda.csv
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from bench_common import composed, device_and_output, kernels_of, machine, synchronize, write_rows
from pnorm_decay.data import DataError
from pnorm_decay.data.images import ImageDataset
from pnorm_decay.data.text import TextDataset
from pnorm_decay.training import run as training_run
from pnorm_decay.training.building import build_data, build_model
from pnorm_decay.training.errors import USER_ERRORS, print_error
from pnorm_decay.training.settings import Settings
from pnorm_decay.training.trainer import Training, train

IMAGES, TEXT = "experiment=cpu/resnet18_cifar10", "experiment=cpu/nanogpt_shakespeare"
CASES = {
    "resnet18 width 64, batch 100": [IMAGES, "model.width=64", "trainer.batch_size=100"],
    "resnet18 width 64, batch 400": [IMAGES, "model.width=64", "trainer.batch_size=400"],
    "resnet18 width 16, batch 100": [IMAGES, "model.width=16", "trainer.batch_size=100"],
    "resnet18 width 16, batch 400": [IMAGES, "model.width=16", "trainer.batch_size=400"],
    "nanogpt, cpu scale": [TEXT],
    "nanogpt, paper scale": ["experiment=paper/nanogpt_shakespeare"],
}
GPU_CASES = {
    "resnet18, paper scale": ["experiment=paper/resnet18_cifar10"],
    "nanogpt, paper scale": ["experiment=paper/nanogpt_shakespeare"],
}
# What the trainer trains with on a GPU; the first is what the others are compared with.
OPTIMIZERS = {
    "AdamW fused": ["optimizer=adamw", "+optimizer.fused=true"],
    "AdamW fused, capturable": [
        "optimizer=adamw",
        "+optimizer.fused=true",
        "+optimizer.capturable=true",
    ],
    "AdamPWD": ["optimizer=pwd"],
    "straightforward pWD": [
        "optimizer=pwd",
        "optimizer._target_=bench_optimizer.Straightforward",
        "optimizer.method=straightforward",
    ],
}
LOOP = "straightforward loop, AdamW"
WARM_UP = 2  # steps of a turn that do not count
GPU_WARM_UP = 20  # likewise on a GPU, where libraries choose their kernels in them
PROFILED = 3  # steps of which the kernels are counted

CPU = torch.device("cpu")

console = Console(highlight=False)


class EnoughError(BaseException):
    """The steps to be timed are done; no Exception, which would be recorded as a failure."""


@dataclass
class Times:
    """What was measured of a loop.

    Attributes:
        steps: seconds of whole steps.
        inside: of them, what was forward, backward or optimizer step.
        kernels: that a step launches on a GPU.
        peak_bytes: of a GPU's memory.
    """

    steps: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    kernels: float | None = None
    peak_bytes: int | None = None


def cut_off(overrides: list[str], timed_train: Any) -> None:
    """Does a run with another training loop, which ends it by an ``EnoughError``."""
    with tempfile.TemporaryDirectory() as scratch:
        cfg = composed([*overrides, *places(scratch), "trainer.checkpoint_minutes=1e6"])
        with mock.patch.object(training_run, "train", timed_train):
            try:
                training_run.run(cfg)
            except EnoughError:
                return
    raise RuntimeError("the run ended before it was timed")


def places(scratch: str) -> list[str]:
    """Where a run goes that leaves nothing."""
    return [f"runs_dir={scratch}", "logger=none", "skip_recorded=false"]


def ours(overrides: list[str], count: int) -> Times:
    """Steps of the trainer, cut off after some."""
    times = Times()

    def timed_train(training: Training, *places: Any) -> Any:
        data: Any = training.data
        accelerator = training.accelerator
        # Forward begins, backward ends, clipping ends, optimizer's step begins and ends.
        moments: list[float] = []
        begun: list[float] = []
        original_batch, original_backward = data.train_batch, accelerator.backward
        original_clip = accelerator.clip_grad_norm_

        def now(*_: Any) -> None:
            moments.append(time.perf_counter())

        def train_batch(*key: Any) -> Any:
            begun.append(time.perf_counter())
            if len(begun) > 1 + WARM_UP:
                times.steps.append(begun[-1] - begun[-2])
                times.inside.append(moments[-1] - moments[-2] + moments[-3] - moments[0])
            if len(times.steps) == count:
                raise EnoughError
            moments.clear()
            return original_batch(*key)

        def backward(*key: Any, **options: Any) -> None:
            original_backward(*key, **options)
            now()

        def clip(*key: Any) -> None:
            original_clip(*key)
            now()

        data.train_batch, accelerator.backward = train_batch, backward
        accelerator.clip_grad_norm_ = clip
        training.model.register_forward_pre_hook(now)
        training.optimizer.optimizer.register_step_pre_hook(now)
        training.optimizer.optimizer.register_step_post_hook(now)
        return train(training, *places)

    cut_off(overrides, timed_train)
    return times


def ours_on_gpu(overrides: list[str], count: int, device: torch.device) -> Times:
    """Steps of the trainer on a GPU, timed as a whole, as a wait a step would slow them down."""
    times = Times()

    def timed_train(training: Training, *places: Any) -> Any:
        data: Any = training.data
        original_batch = data.train_batch
        begun = 0
        start = 0.0
        on_gpu = device.type == "cuda"
        profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

        def train_batch(*key: Any) -> Any:
            nonlocal begun, start
            begun += 1
            if begun == 1 + GPU_WARM_UP:
                synchronize(device)
                start = time.perf_counter()
            elif begun == 1 + GPU_WARM_UP + count:
                synchronize(device)
                times.steps = [(time.perf_counter() - start) / count] * count
                if not on_gpu:
                    raise EnoughError
                profiler.start()
            elif begun == 1 + GPU_WARM_UP + count + PROFILED:
                synchronize(device)
                profiler.stop()
                times.kernels = round(kernels_of(profiler.events()) / PROFILED, 1)
                raise EnoughError
            return original_batch(*key)

        data.train_batch = train_batch
        return train(training, *places)

    with on_peak_memory(times, device):
        cut_off(overrides, timed_train)
    return times


@contextlib.contextmanager
def on_peak_memory(times: Times, device: torch.device) -> Iterator[None]:
    """Notes the most memory of a GPU that a block takes."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield
    times.peak_bytes = torch.cuda.max_memory_allocated(device)


class Pictures(Dataset[tuple[Tensor, int]]):
    """The training images as PIL images, transformed one by one."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pictures = [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).numpy()]
        self.labels = labels.tolist()
        from torchvision import transforms  # which a machine with a GPU may lack

        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def straightforward_batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as one would make them first."""
    if isinstance(data, ImageDataset):
        loaded = data._images
        pictures = Pictures(loaded.train_images, loaded.train_labels)
        loader = DataLoader(pictures, batch_size, shuffle=True, drop_last=True, num_workers=2)
        yield from itertools.chain.from_iterable(itertools.repeat(loader))
    assert isinstance(data, TextDataset)
    tokens, block = data._tokens.train, data.block_size
    while True:
        starts = torch.randint(len(tokens) - block, (batch_size,))
        x = torch.stack([tokens[i : i + block] for i in starts])
        y = torch.stack([tokens[i + 1 : i + 1 + block] for i in starts])
        yield x, y


def straightforward(overrides: list[str], count: int, device: torch.device = CPU) -> Times:
    """Steps of the straightforward loop, on the same data and model."""
    times = Times()
    settings = Settings.from_config(composed([*overrides, *places("none")]))
    data = build_data(settings)
    data.setup(CPU)
    model = build_model(settings, data).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clip = settings.trainer.clip_grad_norm
    begun = None
    for inputs, targets in straightforward_batches(data, settings.trainer.batch_size):
        inputs, targets = inputs.to(device), targets.to(device)
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        loss.item()
        now = time.perf_counter()
        if begun is not None:
            times.steps.append(now - begun)
        begun = now
        if len(times.steps) == WARM_UP + count:
            break
    times.steps = times.steps[WARM_UP:]
    return times


def in_turns(loops: dict[str, Any], name: str, seconds: float, rounds: int) -> dict[str, Times]:
    """Has loops take turns; each is a function of how many steps it does."""
    found: dict[str, Times] = {}
    for label in track([*loops] * rounds, description=name, console=console):
        so_far = found.get(label)
        if so_far is None:
            first = loops[label](3)
            pace = statistics.median(first.steps)
        else:
            pace = statistics.median(so_far.steps)
        got = loops[label](max(3, round(seconds / pace)))
        if so_far is not None:
            got.steps, got.inside = so_far.steps + got.steps, so_far.inside + got.inside
        found[label] = got
    return found


def described(overrides: list[str]) -> tuple[str, int, str]:
    """What a case is counted in, how many of them a step takes, and the trainer's precision."""
    cfg: DictConfig = composed([*overrides, *places("none")])
    is_text = "block_size" in cfg.model
    samples = cfg.trainer.batch_size * (cfg.model.block_size if is_text else 1)
    settings = Settings.from_config(cfg).trainer
    precision = settings.resolve_precision(settings.resolve_device())
    return "tokens" if is_text else "images", samples, precision


def measure(overrides: list[str], name: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """The row of a case on a CPU: both loops, in turns."""
    overrides = [*overrides, "trainer.device=cpu"]
    both = {"ours": partial(ours, overrides), "theirs": partial(straightforward, overrides)}
    found = in_turns(both, name, seconds, rounds)
    mine, theirs = found["ours"], found["theirs"]
    unit, samples, precision = described(overrides)
    step, other = statistics.median(mine.steps), statistics.median(theirs.steps)
    row = {
        "case": name,
        "unit": unit,
        "ours_per_second": round(samples / step, 1),
        "straightforward_per_second": round(samples / other, 1),
        "ratio": round(other / step, 3),
        "outside_share": round(1 - sum(mine.inside) / sum(mine.steps), 4),
        "precision": precision,
        "steps_timed": len(mine.steps),
        **machine(),
    }
    return [row]


def measure_optimizers(
    overrides: list[str], name: str, seconds: float, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row an optimizer in the trainer, and one of the straightforward loop."""
    # An evaluation would count as a part of the steps.
    never = "trainer.eval_every=1000000"
    overrides = [never, *overrides, f"trainer.device={device.type}"]
    loops = {
        label: partial(ours_on_gpu, [*overrides, *words], device=device)
        for label, words in OPTIMIZERS.items()
    }
    found = in_turns(loops, name, seconds, rounds)
    unit, samples, precision = described(overrides)
    if unit == "tokens" or importlib.util.find_spec("torchvision"):
        loop = {LOOP: partial(straightforward, overrides, device=device)}
        with on_peak_memory(memory := Times(), device):
            found |= in_turns(loop, f"{name}, loop", seconds, 1)
        found[LOOP].peak_bytes = memory.peak_bytes
    baseline = statistics.median(found[next(iter(OPTIMIZERS))].steps)
    return [
        {
            "case": name,
            "loop": label,
            "unit": unit,
            "per_second": round(samples / statistics.median(times.steps), 1),
            "step_ratio": round(statistics.median(times.steps) / baseline, 3),
            "kernel_launches": times.kernels,
            "peak_megabytes": None if times.peak_bytes is None else round(times.peak_bytes / 1e6),
            "precision": "fp32" if label == LOOP else precision,
            "steps_timed": len(times.steps),
            **machine(device),
        }
        for label, times in found.items()
    ]


def show_optimizers(rows: list[dict[str, Any]]) -> None:
    """The table of a GPU on the terminal."""
    table = Table(title=f"One training step, {rows[0]['case']}")
    for column in ("", "per second", "step, ratio", "kernels", "peak, MB"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        numbers = (row["kernel_launches"], row["peak_megabytes"])
        told = ("" if number is None else f"{number:,.0f}" for number in numbers)
        speed = f"{row['per_second']:,.0f} {row['unit']}"
        table.add_row(row["loop"], speed, f"{row['step_ratio']:.2f}", *told)
    console.print(table)


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title="One training step")
    for column in ("", "ours, per s", "straightforward", "ratio", "outside fwd, bwd, step"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['ours_per_second']:,.0f} {row['unit']}",
            f"{row['straightforward_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{100 * row['outside_share']:.1f} %",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    every = dict.fromkeys([*CASES, *GPU_CASES])
    parser.add_argument("--cases", nargs="+", choices=every, metavar="CASE", help="only these")
    parser.add_argument(
        "--optimizers", action="store_true", help="on a CPU, too, what --device cuda compares"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of timed steps a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each loop")
    parser.add_argument(
        "--output", type=Path, help="(default on a CPU: results/bench/training.csv)"
    )
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments, overrides = parser.parse_args(words[:end]), words[end + 1 :]
    if arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("--rounds must be at least 1 and --seconds positive")
    recorded = Path("results/bench/training.csv")
    device, output = device_and_output(parser, arguments, recorded)
    by_optimizer = device.type == "cuda" or arguments.optimizers
    cases = GPU_CASES if by_optimizer else CASES
    rows: list[dict[str, Any]] = []
    try:
        for name in arguments.cases or cases:
            case = [*(CASES | GPU_CASES)[name], *overrides]
            if by_optimizer:
                now = measure_optimizers(case, name, arguments.seconds, arguments.rounds, device)
                show_optimizers(now)
            else:
                now = measure(case, name, arguments.seconds, arguments.rounds)
            rows += now
            if arguments.output:  # what there is, should it be stopped
                write_rows(output, rows)
    except (DataError, *USER_ERRORS) as error:
        print_error(error)
        sys.exit(2)
    if not by_optimizer:
        show(rows)
    write_rows(output, rows)
    console.print(f"{output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
