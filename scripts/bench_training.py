"""Times the trainer against a straightforward training loop, on real data.

The straightforward loop is what one would write first: torchvision transforms on PIL images in a
DataLoader with two workers (text: a Python loop that stacks rows), fp32, contiguous images, AdamW,
`loss.item()` at every step. Ours is the run of `experiments/train.py` with AdamPWD, in the
precision that it chooses here. The two take turns, and the medians of their steps are compared.
"Outside" is our time outside forward, backward, clipping and the optimizer's step.

    PNORM_CIFAR10=... PNORM_SHAKESPEARE=... python scripts/bench_training.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench_common import machine, write_rows
from pnorm_decay.data import DataError
from pnorm_decay.data.images import ImageDataset
from pnorm_decay.data.text import TextDataset
from pnorm_decay.training import run as training_run
from pnorm_decay.training.building import build_data, build_model
from pnorm_decay.training.settings import Settings
from pnorm_decay.training.trainer import Training, train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
IMAGES, TEXT = "experiment=cpu/resnet18_cifar10", "experiment=cpu/nanogpt_shakespeare"
CASES = {
    "resnet18 width 64, batch 100": [IMAGES, "model.width=64", "trainer.batch_size=100"],
    "resnet18 width 64, batch 400": [IMAGES, "model.width=64", "trainer.batch_size=400"],
    "resnet18 width 16, batch 100": [IMAGES, "model.width=16", "trainer.batch_size=100"],
    "resnet18 width 16, batch 400": [IMAGES, "model.width=16", "trainer.batch_size=400"],
    "nanogpt, cpu scale": [TEXT],
    "nanogpt, paper scale": ["experiment=paper/nanogpt_shakespeare"],
}
WARM_UP = 2  # steps of a turn that do not count

console = Console(highlight=False)


class EnoughError(BaseException):
    """The steps to be timed are done; no Exception, which would be recorded as a failure."""


@dataclass
class Times:
    """Seconds of whole steps, and of what of them was forward, backward or optimizer step."""

    steps: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)


def composed(overrides: list[str], scratch: str) -> DictConfig:
    """The config of a run, as `experiments/train.py` would compose it."""
    places = [f"runs_dir={scratch}", "logger=none", "skip_recorded=false"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [*overrides, *places], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


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

    with tempfile.TemporaryDirectory() as scratch:
        cfg = composed([*overrides, "trainer.checkpoint_minutes=1e6"], scratch)
        with mock.patch.object(training_run, "train", timed_train):
            try:
                training_run.run(cfg)
            except EnoughError:
                return times
    raise RuntimeError("the run ended before it was timed")


class Pictures(Dataset[tuple[Tensor, int]]):
    """The training images as PIL images, transformed one by one."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pictures = [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).numpy()]
        self.labels = labels.tolist()
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


def straightforward(overrides: list[str], count: int) -> Times:
    """Steps of the straightforward loop, on the same data and model."""
    times = Times()
    with tempfile.TemporaryDirectory() as scratch:
        cfg = composed(overrides, scratch)
    settings = Settings.from_config(cfg)
    data = build_data(settings)
    data.setup(torch.device("cpu"))
    model = build_model(settings, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clip = settings.trainer.clip_grad_norm
    begun = None
    for inputs, targets in straightforward_batches(data, settings.trainer.batch_size):
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


def measure(name: str, seconds: float, rounds: int) -> dict[str, Any]:
    """One row: both loops, in turns."""
    overrides = CASES[name]
    mine, theirs = Times(), Times()
    pace = {ours: 0.0, straightforward: 0.0}
    for loop, into in track(
        [(ours, mine), (straightforward, theirs)] * rounds, description=name, console=console
    ):
        count = max(3, round(seconds / pace[loop])) if pace[loop] else 3
        got = loop(overrides, count)
        pace[loop] = statistics.median(got.steps)
        into.steps += got.steps
        into.inside += got.inside
    with tempfile.TemporaryDirectory() as scratch:
        cfg = composed(overrides, scratch)
    is_text = "block_size" in cfg.model
    samples = cfg.trainer.batch_size * (cfg.model.block_size if is_text else 1)
    step, other = statistics.median(mine.steps), statistics.median(theirs.steps)
    settings = Settings.from_config(cfg).trainer
    return {
        "case": name,
        "unit": "tokens" if is_text else "images",
        "ours_per_second": round(samples / step, 1),
        "straightforward_per_second": round(samples / other, 1),
        "ratio": round(other / step, 3),
        "outside_share": round(1 - sum(mine.inside) / sum(mine.steps), 4),
        "precision": settings.resolve_precision(settings.resolve_device()),
        "steps_timed": len(mine.steps),
        **machine(),
    }


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
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timed steps a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each loop")
    parser.add_argument("--output", type=Path, default=Path("results/bench/training.csv"))
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("--rounds must be at least 1 and --seconds positive")
    try:
        rows = [measure(name, arguments.seconds, arguments.rounds) for name in arguments.cases]
    except DataError as error:
        console.print(f"error: {error}", markup=False)
        sys.exit(2)
    show(rows)
    write_rows(arguments.output, rows)
    console.print(f"{arguments.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
