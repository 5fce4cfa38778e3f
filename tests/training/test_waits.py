"""No step of training waits for the device.

On a CPU a pretended device stands for a GPU: torch's `meta`, whose numbers nobody can read. On a
GPU it is torch's own check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pnorm_decay.baselines import OTO
from pnorm_decay.optim import base, target
from pnorm_decay.optim.backends import native
from pnorm_decay.training import run as running
from pnorm_decay.training import stopping
from pnorm_decay.training.trainer import Training

STEPS = 25
SHORT = 4  # into the second epoch of digits: the pretended device takes its time
FIRST = 3  # what is done once, such as building a kernel, is done in the first steps
META = torch.device("meta")
COMMON = ["trainer.epochs=null", "trainer.steps=1000", "trainer.eval_every=1000"]
COMMON += ["trainer.threads=1", "logger=none"]
DIGITS = ["experiment=demo/resnet_digits", "model.width=4", "data.crop_padding=1"]
DIGITS += ["data.flip=true", "data.rotation_degrees=5", "trainer.batch_size=400"]
TEXT = ["experiment=demo/nanogpt_pydoc", "model.dropout=0.1"]
ONCE = ["pruning.num_steps=1", "pruning.end=0.9"]  # prunes after the steps that are watched


class Copies(TorchDispatchMode):
    """Notes the steps in which anything goes from the host to the pretended device."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training, self.steps = training, set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **kwargs or {})
        source = next((x for x in reversed(args) if isinstance(x, torch.Tensor)), None)
        moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if moves and source is not None and source.device != result.device:
            self.steps.add(self.training.step)
        return result


def pretend(training: Training) -> None:
    """Moves everything that a GPU would have in its memory to the pretended device."""
    method = training.method.state_dict()
    tensors = [v for value in method.values() for v in (value.values() if isinstance(value, dict)
               else value if isinstance(value, list) else [value])]  # fmt: skip
    model = training.method._model
    for tensor in chain(model.parameters(), model.buffers(), tensors, [training.loss_sum]):
        if isinstance(tensor, torch.Tensor):
            moved = tensor.detach().to(META)
            if isinstance(tensor, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved)
            torch.utils.swap_tensors(tensor, moved)
    training.data.setup(META)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, run_program: Any, tmp_path: Any) -> Iterator[Callable]:
    """Starts a run and takes its first steps; those in which something came from the host."""
    noted: list[int] = []
    length: list[int] = []
    original_train, original_advance = running.train, Training.advance

    def train(training: Training, *rest: Any) -> Any:
        if training.accelerator.device.type == "cuda":
            return original_train(training, *rest)
        pretend(training)
        with Copies(training) as copies:
            try:
                return original_train(training, *rest)
            finally:
                noted.extend(sorted(copies.steps))

    def advance(training: Training, loss: torch.Tensor) -> None:
        original_advance(training, loss)
        if training.accelerator.device.type == "cuda" and training.step == FIRST:
            torch.cuda.set_sync_debug_mode("error")
        if training.step == length[-1]:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            raise stopping.Stopped

    def counts(census: Any) -> list[float]:
        """The weights: a tenth of them is zero, the others are of all sizes."""
        return [1000.0, 100.0, 900.0, *[900 / target.BINS] * target.BINS]

    def run(device: torch.device, number: int, *overrides: str) -> list[int]:
        length.append(number)
        if device.type == "cpu":
            kernel = native.kernel
            monkeypatch.setattr(target._Census, "read", counts)
            monkeypatch.setattr(
                native,
                "kernel",
                lambda where, dtype: (
                    (lambda *call: None) if where == META else kernel(where, dtype)
                ),
            )
            # It looks at the weights once, at the first step.
            monkeypatch.setattr(base, "warn_of_stuck", lambda *args, **options: None)
        # Once a period, it looks at the channels.
        monkeypatch.setattr(OTO, "_choose", lambda *args: None)
        monkeypatch.setattr(running, "train", train)
        monkeypatch.setattr(Training, "advance", advance)
        places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
        places.append(f"trainer.device={device.type}")
        done = run_program("experiments/train.py", *overrides, *COMMON, *places)
        assert done.code == 130, done.err  # stopped: nothing has raised
        return noted

    yield run
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("experiment", "overrides", "number"),
    [
        (DIGITS, [], 12),  # four epochs; the run of text below takes all STEPS
        (DIGITS, ["optimizer=exact", "trainer.channels_last=true", "model.width=16"], SHORT),
        (DIGITS, ["optimizer=coupled"], SHORT),
        (DIGITS, ["optimizer=proximal", "optimizer.p=0"], SHORT),
        (DIGITS, ["optimizer=adamw", "pruning=magnitude", *ONCE], SHORT),
        (DIGITS, ["optimizer=adamw", "pruning=oto"], SHORT),
        (DIGITS, ["decay_schedule=target_sparsity"], 10),  # which steers once
        (TEXT, [], STEPS),
        (TEXT, ["optimizer=adamw"], SHORT),
        (TEXT, ["optimizer=sgd"], SHORT),
        (TEXT, ["optimizer=sgd_pwd", "decay_schedule=p_ramp"], SHORT),
        (TEXT, ["optimizer=adamw", "pruning=magnitude_global", *ONCE], SHORT),
        (TEXT, ["optimizer=adamw", "pruning=spred"], SHORT),
        (TEXT, ["optimizer=adamw", "pruning=rewa"], SHORT),
        (TEXT, ["decay_schedule=target_sparsity"], STEPS),
    ],
    ids=lambda value: (
        "_".join(word.rpartition("=")[2] for word in value[:2])
        if isinstance(value, list)
        else str(value)
    ),
)
def test_no_step_waits(
    steps: Any, device: torch.device, experiment: list[str], overrides: list[str], number: int
) -> None:
    """What comes from the host comes once an epoch or, for text, every thousand steps."""
    if device.type == "cuda":
        assert steps(device, STEPS, *experiment, *overrides) == []
    else:
        epochs = range(0, number, 3) if experiment == DIGITS else [0]
        assert steps(device, number, *experiment, *overrides) == list(epochs)
