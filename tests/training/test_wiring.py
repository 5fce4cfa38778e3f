"""What joins the pieces: each test fails for a small, realistic change in the loop around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from conftest import SHORT
from pnorm_decay.baselines import OTO, MagnitudePruning
from pnorm_decay.data import CIFAR10, Digits, PydocTopics
from pnorm_decay.data.cache import Images
from pnorm_decay.models import GPT, ResNet18
from pnorm_decay.sparsity import zero_fraction
from pnorm_decay.training import checkpoint, evaluation, trainer
from pnorm_decay.training.evaluation import evaluate, final_metrics, training_loss
from pnorm_decay.training.machine import make_accelerator
from pnorm_decay.training.schedule import warmup_cosine
from pnorm_decay.training.settings import TrainerSettings

TRAIN = "experiments/train.py"
DIGITS = ["experiment=demo/resnet_digits", *SHORT, "logger=none"]
TEXT = ["experiment=demo/nanogpt_pydoc", "trainer.steps=6", "trainer.eval_every=3"]
TEXT += ["trainer.threads=1", "logger=none"]
STILL = ["optimizer=sgd", "optimizer.lr=0"]  # trains nothing
CPU = torch.device("cpu")


@dataclass
class Seen:
    """What went through a network of digits: its first weights, and its batches in training."""

    weights: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@pytest.fixture
def watch(monkeypatch) -> Callable[[], Seen]:
    def watch() -> Seen:
        """Of the training steps from here on; batches drawn for other ends are left out."""
        seen, last = Seen(), []

        def watched_batch(self, step, *rest):
            last[:] = original_batch(self, step, *rest)
            return tuple(last)

        def watched_forward(self, images):
            logits = original_forward(self, images)
            if not seen.weights:
                seen.weights = [parameter.detach().clone() for parameter in self.parameters()]
            if self.training and logits.requires_grad:
                inputs, targets = last
                seen.inputs.append(inputs.clone())
                seen.targets.append(targets.clone())
                seen.losses.append(nn.functional.cross_entropy(logits.double(), targets).item())
            return logits

        monkeypatch.setattr(ResNet18, "forward", watched_forward)
        monkeypatch.setattr(Digits, "train_batch", watched_batch)
        return seen

    original_forward, original_batch = ResNet18.forward, Digits.train_batch
    return watch


def alike(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_a_seed_draws_weights_and_images_and_no_other_seed_draws_the_same(train, watch):
    crops = "data.crop_padding=1"
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        runs.append(watch())
        train(*DIGITS, *STILL, crops, f"seed={seed}", name=f"runs{number}")
    first, again, other = runs
    for what in ("weights", "inputs", "targets"):
        assert alike(getattr(first, what), getattr(again, what)), what
        assert not alike(getattr(first, what), getattr(other, what)), what
    assert len(first.inputs) == 6
    assert not torch.equal(first.weights[0], other.weights[0])


def test_the_order_of_images_is_the_seeds():
    data = Digits()
    data.setup(CPU)
    orders = {tuple(data.train_batch(0, 1000, seed)[1].tolist()) for seed in range(3)}
    assert len(orders) == 3


@pytest.mark.parametrize("later", [1, 999, 1000, 1001, 2000, 5000])
def test_blocks_of_text_are_never_repeated(later):
    data = PydocTopics(block_size=8)
    data.setup(CPU)
    batches = [data.train_batch(step, 16, 0)[0] for step in (0, later)]
    assert not torch.equal(*batches)
    assert not torch.equal(data.train_batch(later, 16, 1)[0], batches[1])


def norm_of_change(before: list[Tensor], folder: Path) -> float:
    after = torch.load(folder / "model.pt", weights_only=True)
    trained = [after[name] for name, _ in ResNet18(in_channels=1, width=4).named_parameters()]
    changes = [(new - old).flatten() for new, old in zip(trained, before, strict=True)]
    return float(torch.cat(changes).norm())


@pytest.mark.parametrize("limit", [0.25, 0.5])
def test_the_gradient_is_clipped(train, watch, limit):
    plain = ["optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=1"]
    one = ["trainer.steps=1", "schedule=constant", "schedule.warmup_epochs=null"]
    seen = watch()
    done = train(*DIGITS, *plain, *one, f"trainer.clip_grad_norm={limit}")
    assert norm_of_change(seen.weights, done.folder) == pytest.approx(limit, rel=1e-3)


def test_a_step_does_its_parts_in_order(train, monkeypatch):
    order = []

    def note(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            order.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    parts = [(Accelerator, "backward"), (MagnitudePruning, "before_step")]
    parts += [(Accelerator, "clip_grad_norm_"), (torch.optim.SGD, "step")]
    parts += [(MagnitudePruning, "after_step"), (torch.optim.Optimizer, "zero_grad")]
    for owner, name in parts:
        note(owner, name)
    train(*DIGITS, "optimizer=sgd", "pruning=magnitude", "trainer.clip_grad_norm=1")
    assert order == 6 * [name for _, name in parts]


def test_every_batch_is_of_the_runs_seed(train, monkeypatch):
    seeds, original = set(), Digits.train_batch

    def watched(self, step, batch_size, seed):
        seeds.add(seed)
        return original(self, step, batch_size, seed)

    monkeypatch.setattr(Digits, "train_batch", watched)
    # In training, to choose a threshold by and for new statistics.
    train(*DIGITS, "seed=3", "optimizer=adamw", "pruning=spred")
    assert seeds == {3}


def test_checkpoints_are_written_as_often_as_asked(train, monkeypatch):
    saved, now, original = [], [0.0], Digits.train_batch

    def slow(self, *args):
        now[0] += 25
        return original(self, *args)

    monkeypatch.setattr(Digits, "train_batch", slow)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(state["step"]))
    train(*DIGITS, "trainer.checkpoint_minutes=1")
    assert saved == [3, 6]


def test_compile_and_channels_last_do_what_they_say(train, monkeypatch):
    compiled, formats, original = [], set(), ResNet18.forward

    def watched(self, images):
        for tensor in (images, self.conv1.weight):
            formats.add(tensor.is_contiguous(memory_format=torch.channels_last))
        return original(self, images)

    def compile_(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(ResNet18, "forward", watched)
    monkeypatch.setattr(torch, "compile", compile_)
    colours = ["data=cifar10", "model.width=16", "trainer.steps=1", "trainer.channels_last=true"]
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
    statistics = torch.zeros(3), torch.ones(3)
    monkeypatch.setattr(CIFAR10, "_load", lambda self: Images(*images, *images, *statistics))
    train(*DIGITS, *colours, "trainer.batch_size=20", "trainer.compile=true")
    assert len(compiled) == 1
    assert formats == {True}


def test_the_loss_is_the_mean_over_the_steps_since_the_last_evaluation(train, watch):
    seen = watch()
    done = train(*DIGITS, "trainer.steps=5", "optimizer.lr=0.01")
    assert len(seen.losses) == 5
    means = [sum(seen.losses[:3]) / 3, sum(seen.losses[3:]) / 2]
    assert [row["train_loss"] for row in done.history] == pytest.approx(means, rel=1e-4)
    assert done.record["train_loss"] == done.history[-1]["train_loss"]


def test_the_logged_lr_is_that_of_the_last_step_taken(train):
    done = train(*DIGITS, "schedule.warmup_epochs=null", "schedule.warmup_steps=2")
    factors = [warmup_cosine(step, steps=6, warmup=2, final_fraction=0.01) for step in (2, 5)]
    assert [row["lr"] for row in done.history] == pytest.approx([1e-3 * f for f in factors])


def test_the_logged_lambda_p_is_that_of_the_last_step_taken(train):
    done = train(*DIGITS, "decay_schedule=lambda_p_warmup", "decay_schedule.end=1")
    way = [1e-3 * step / 6 for step in (2, 5)]
    assert [row["lambda_p"] for row in done.history] == pytest.approx(way)


def test_accuracy_of_text_counts_every_position():
    data = PydocTopics(block_size=16)
    data.setup(CPU)
    targets = [targets for _, targets in data.val_batches(64)]
    space = int(torch.cat([t.flatten() for t in targets]).mode().values)

    class OnlySpaces(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            vocabulary = data.model_args["vocab_size"]
            return nn.functional.one_hot(torch.full_like(x, space), vocabulary).float()

    count = sum(t.numel() for t in targets)
    share = sum(int((t == space).sum()) for t in targets) / count
    settings = TrainerSettings(steps=1, val_batch_size=64)
    _, accuracy = evaluate(OnlySpaces(), data, settings, make_accelerator(CPU, "fp32"))
    assert accuracy == pytest.approx(100 * share, rel=1e-9)
    first = sum(int((t[:, 0] == space).sum()) for t in targets) / sum(len(t) for t in targets)
    assert first != pytest.approx(share, rel=1e-3)


def test_the_best_accuracy_is_that_of_any_evaluation_the_rest_that_of_the_last():
    row = {"val_loss": 1.0, "train_loss": 1.0, "sparsity": 0.0, "zero_fraction": 0.0}
    history = [row | {"val_accuracy": accuracy, "val_loss": 9.0} for accuracy in (50.0, 70.0)]
    metrics = final_metrics([*history, row | {"val_accuracy": 60.0}])
    assert (metrics["best_val_accuracy"], metrics["val_accuracy"]) == (70.0, 60.0)
    assert metrics["val_loss"] == 1.0


def test_the_zeroed_accuracy_is_that_without_the_small_weights(train, monkeypatch):
    original = ResNet18.__init__

    def with_a_tiny_head(self, *args, **options):
        original(self, *args, **options)
        with torch.no_grad():
            self.head.weight *= 1e-15  # its outputs still differ, but all of it counts as zero

    monkeypatch.setattr(ResNet18, "__init__", with_a_tiny_head)
    done = train(*DIGITS, *STILL)
    assert done.record["sparsity"] > done.record["zero_fraction"] == 0
    data = Digits()
    data.setup(CPU)
    labels = torch.cat([targets for _, targets in data.val_batches(1000)])
    all_alike = 100 * float((labels == 0).double().mean())
    assert done.record["val_accuracy_zeroed"] == pytest.approx(all_alike)
    assert done.record["val_accuracy"] != pytest.approx(all_alike)


def cut_off(monkeypatch, run_program, tmp_path, overrides, after: int = 4) -> Path:
    """The checkpoint of a run that was stopped after some of its steps."""
    original = checkpoint.save

    def save_and_stop(path: Path, state: dict[str, Any]) -> None:
        original(path, state)
        if state["step"] == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    places = [f"runs_dir={tmp_path / 'cut'}", f"results_dir={tmp_path / 'results'}"]
    assert run_program(TRAIN, *overrides, *places).code == 130
    monkeypatch.setattr(checkpoint, "save", original)
    (path,) = (tmp_path / "cut").glob("*/*/*/checkpoint.pt")
    return path


@pytest.mark.parametrize(
    "method",
    [
        [],
        ["trainer.precision=bf16"],
        ["pruning=magnitude", "optimizer=sgd"],
        ["decay_schedule=target_sparsity", "optimizer.lr=1e-2"],
    ],
    ids=["dropout", "bf16", "magnitude", "target"],
)
def test_a_text_run_with_dropout_goes_on_exactly(
    train, run_program, tmp_path, monkeypatch, method, device
):
    arguments = [*TEXT, *method, "model.dropout=0.3", "trainer.checkpoint_minutes=1e-9"]
    arguments.append(f"trainer.device={device}")
    if device.type == "cuda":  # where some operations add in any order unless told otherwise
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = train(*arguments)
        cut_off(monkeypatch, run_program, tmp_path, arguments)
        resumed = train(*arguments, name="cut")
    finally:
        torch.use_deterministic_algorithms(False)
    timing = {"seconds", "finished_at"}
    for key in whole.record.keys() - timing:
        assert resumed.record[key] == whole.record[key], key
    for row, expected in zip(resumed.history, whole.history, strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}
    models = [torch.load(done.folder / "model.pt", weights_only=True) for done in (whole, resumed)]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


def test_a_run_goes_on_with_the_evaluation_that_was_due(train, run_program, tmp_path, monkeypatch):
    arguments = [*DIGITS, "trainer.checkpoint_minutes=1e-9"]
    arguments += ["decay_schedule=lambda_p_warmup", "decay_schedule.end=1"]
    whole = train(*arguments)
    cut_off(monkeypatch, run_program, tmp_path, arguments, after=3)
    resumed = train(*arguments, name="cut")
    for row, expected in zip(resumed.history, whole.history, strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_the_seconds_of_a_run_are_those_of_all_its_parts(train, run_program, tmp_path, monkeypatch):
    arguments = [*DIGITS, "trainer.checkpoint_minutes=1e-9"]
    path = cut_off(monkeypatch, run_program, tmp_path, arguments)
    state = checkpoint.read(path)
    assert 0 < state["seconds"] < 100
    checkpoint.save(path, state | {"seconds": 5000.0})
    done = train(*arguments, name="cut")
    assert 5000 < done.record["seconds"] < 5100
    assert done.history[0]["seconds"] < 100
    assert done.history[1]["seconds"] > 5000


def test_the_loss_that_thresholds_are_chosen_by_is_without_dropout():
    data = PydocTopics(block_size=16)
    data.setup(CPU)
    torch.manual_seed(0)
    model = GPT(**data.model_args, block_size=16, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
    settings = TrainerSettings(steps=1, batch_size=8)
    losses = {training_loss(data, settings, 0, model) for _ in range(3)}
    assert len(losses) == 1
    assert model.training
    model.eval()
    batches = [data.train_batch(step, 8, 0) for step in range(evaluation.LOSS_BATCHES)]
    with torch.no_grad():
        expected = [nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
                    for x, y in batches]  # fmt: skip
    assert losses.pop() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "choice"), [(MagnitudePruning, "magnitude"), (OTO, "oto")], ids=["magnitude", "oto"]
)
def test_nothing_is_pruned_while_the_lr_warms_up(train, monkeypatch, kind, choice):
    zeros = []
    original = kind.after_step

    def watched(self, step):
        original(self, step)
        zeros.append(zero_fraction(self.plain_model()))

    monkeypatch.setattr(kind, "after_step", watched)
    warm_up = ["schedule.warmup_epochs=null", "schedule.warmup_steps=4", "trainer.steps=10"]
    train(*DIGITS, f"pruning={choice}", "pruning.sparsity=0.5", "pruning.end=0.8", *warm_up,
          "optimizer=adamw")  # fmt: skip
    assert zeros[:4] == [0] * 4
    assert zeros[4] > 0
    assert zeros[-1] >= 0.3


def test_the_warm_up_in_epochs_is_that_of_the_data_and_the_batch(train, monkeypatch):
    given = []
    original = MagnitudePruning.setup

    def watched(self, *args, **options):
        given.append(options)
        return original(self, *args, **options)

    monkeypatch.setattr(MagnitudePruning, "setup", watched)
    length = ["trainer.batch_size=479", "trainer.steps=20", "trainer.eval_every=20"]
    train(*DIGITS, "pruning=magnitude", "optimizer=adamw", "schedule.warmup_epochs=2", *length)
    assert given == [{"steps": 20, "warmup": 6}]  # 1,437 images are three batches
