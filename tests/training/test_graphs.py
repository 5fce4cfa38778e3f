"""Training by CUDA graphs: what surrounds a recording, on a CPU; the real one on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pnorm_decay.training.graphs import WARM_UP, GraphedPasses

TRAIN = "experiments/train.py"
TEXT = ["experiment=demo/nanogpt_pydoc", "trainer.steps=12", "trainer.eval_every=6"]
DIGITS = ["experiment=demo/resnet_digits", "trainer.epochs=null", "trainer.steps=12"]
DIGITS += ["trainer.eval_every=6", "data.crop_padding=1"]


class Pretended(GraphedPasses):
    """Records on a CPU: the replay does the passes again, in the same memory."""

    recorded = 0

    def _aside(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._passes(inputs, targets)

    def _record(self, inputs: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        self.recorded += 1
        loss = torch.empty(())

        def replay() -> None:
            self._forget()  # a graph overwrites gradients
            loss.copy_(self._passes(inputs, targets))

        return replay, loss


def test_a_recording_is_given_each_batch() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters())

    def passes(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss.detach()

    graphed = Pretended(passes, optimizer.zero_grad)
    for number in range(WARM_UP + 4):
        inputs, targets = torch.randn(5, 4), torch.randint(3, (5,))
        optimizer.zero_grad()
        expected, gradient = passes(inputs, targets), model.weight.grad
        before = inputs.clone()
        loss = graphed(inputs, targets)
        assert torch.equal(loss, expected)
        assert torch.equal(model.weight.grad, gradient)
        assert torch.equal(inputs, before)
        inputs.zero_()  # a batch is the caller's
        assert graphed.recorded == (number >= WARM_UP)


def test_a_cpu_is_refused(run_program: Any, tmp_path: Any) -> None:
    options = [*TEXT, "trainer.cuda_graphs=true", "trainer.device=cpu", f"runs_dir={tmp_path}"]
    done = run_program(TRAIN, *options, "logger=none")
    assert done.code == 2
    told = done.err.splitlines()[-1]
    assert told == "error: trainer.cuda_graphs=true: needs a run on one GPU; use false"


@pytest.mark.cuda
@pytest.mark.parametrize(
    "overrides",
    [
        TEXT,
        [*TEXT, "decay_schedule=target_sparsity"],
        [*TEXT, "optimizer=adamw", "pruning=magnitude"],
        DIGITS,
        [*DIGITS, "optimizer=adamw", "pruning=oto"],
    ],
    ids=["text", "target", "magnitude", "digits", "oto"],
)
def test_the_losses_are_those_without_a_graph(train: Any, overrides: list[str]) -> None:
    runs = []
    for choice in ("true", "false"):
        options = [*overrides, "trainer.device=cuda", f"trainer.cuda_graphs={choice}"]
        runs.append(train(*options, "logger=none", name=choice))
    graphed, plain = (run.history for run in runs)
    for name in ("train_loss", "val_loss"):
        assert [r[name] for r in graphed] == pytest.approx([r[name] for r in plain], rel=1e-3)
    assert runs[0].record["run_id"] == runs[1].record["run_id"]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_with_autocast_and_dropout_it_trains(train: Any, precision: str) -> None:
    options = [*TEXT, "model.dropout=0.1", f"trainer.precision={precision}", "trainer.steps=60"]
    run = train(*options, "trainer.device=cuda", "trainer.cuda_graphs=true", "logger=none")
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
