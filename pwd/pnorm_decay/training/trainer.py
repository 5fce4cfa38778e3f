"""The training loop, the same for every model, data set and method."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pnorm_decay.baselines import Pruning
from pnorm_decay.data import Dataset
from pnorm_decay.optim import OptionScheduler, split_decayed
from pnorm_decay.sparsity import sparsity, zero_fraction, zeroed
from pnorm_decay.training import checkpoint
from pnorm_decay.training.progress import training_progress
from pnorm_decay.training.settings import ConfigError, TrainerSettings
from pnorm_decay.training.tracking import Row, Tracker

LOSS_BATCHES = 4
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        status: "finished", or "diverged" where a loss was not finite.
        metrics: the record's columns that training determines.
    """

    status: str
    metrics: dict[str, Any]


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """An Accelerator for this run, whatever an earlier run of this process asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=device.type == "cpu", mixed_precision=ACCELERATE_PRECISION[precision])


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, for one prediction a sample or one a position.

    Args:
        logits: (..., classes).
        targets: (...), int64.
        reduction: as in torch.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


def place(inputs: Tensor, channels_last: bool) -> Tensor:
    """Images in the memory format that the convolutions have; anything else as it is."""
    if channels_last and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def check_channels_last(model: nn.Module, device: torch.device) -> None:
    """Refuses a model whose channels_last gradient oneDNN computes outside its memory.

    The weight gradient of a strided 1x1 convolution of fewer input channels than a vector holds
    corrupts the heap (oneDNN issue 6035; seen with torch 2.14.1, 4 channels, AVX2).

    Raises:
        ConfigError: the model has such a convolution and the device is a CPU.
    """
    for module in model.modules():
        if device.type == "cpu" and isinstance(module, nn.Conv2d):
            pointwise = module.kernel_size == (1, 1) and max(module.stride) > 1
            if pointwise and module.in_channels < 16:
                raise ConfigError(
                    "trainer.channels_last=true: a strided 1x1 convolution of fewer than 16 "
                    "channels crashes on a CPU; use trainer.channels_last=false"
                )


@torch.inference_mode()
def evaluate(model: nn.Module, data: Dataset, settings: TrainerSettings) -> tuple[float, float]:
    """Loss (nats) and accuracy (percent) on the whole validation part."""
    model.eval()
    loss: Tensor | float = 0.0
    correct: Tensor | int = 0
    count = 0
    for inputs, targets in data.val_batches(settings.val_batch_size):
        logits = model(place(inputs, settings.channels_last))
        loss = loss + cross_entropy(logits, targets, reduction="sum")
        correct = correct + (logits.argmax(-1) == targets).sum()
        count += targets.numel()
    model.train()
    return float(loss) / count, 100 * float(correct) / count


@torch.inference_mode()
def training_loss(data: Dataset, settings: TrainerSettings, seed: int, model: nn.Module) -> float:
    """Mean loss (nats) on the first few training batches, without dropout.

    What a method chooses after training, it chooses by this, never by the validation part.
    """
    model.eval()
    loss = torch.zeros(())
    for step in range(LOSS_BATCHES):
        inputs, targets = data.train_batch(step, settings.batch_size, seed)
        loss = loss.to(inputs.device) + cross_entropy(
            model(place(inputs, settings.channels_last)), targets
        )
    model.train()
    return float(loss) / LOSS_BATCHES


def train(
    *,
    data: Dataset,
    model: nn.Module,
    optimizer: Optimizer,
    pruning: Pruning,
    schedulers: Sequence[LRScheduler | OptionScheduler],
    steps: int,
    eval_every: int,
    settings: TrainerSettings,
    accelerator: Accelerator,
    seed: int,
    run_dir: Path,
    tracker: Tracker,
) -> Outcome:
    """Trains ``model`` and evaluates it, from the run's checkpoint where there is one.

    Args:
        data: a data set that is set up on the accelerator's device.
        model: maps a batch of inputs to logits (..., classes).
        optimizer: over the model's parameters.
        pruning: what makes zeros beside the optimizer, set up for this model.
        schedulers: of the optimizer's options, stepped after every step.
        steps: the run's length.
        eval_every: steps between evaluations; the last step is always evaluated.
        settings: batch sizes, clipping, memory format, checkpoints.
        accelerator: device and precision.
        seed: of the data order and augmentation.
        run_dir: where the checkpoint and the trained weights go.
        tracker: where the metrics go.

    Returns:
        The outcome; also where the loss diverged.
    """
    trained_model = model
    model, optimizer = accelerator.prepare(model, optimizer)

    first_step, seconds_before = 0, 0.0
    loss_sum = torch.zeros((), device=accelerator.device)  # since the last evaluation
    state = checkpoint.load(run_dir / checkpoint.CHECKPOINT_FILE)
    if state is not None:
        trained_model.load_state_dict(state["model"])
        pruning.load_state_dict(state["pruning"])
        optimizer.load_state_dict(state["optimizer"])
        for scheduler, saved_schedule in zip(schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved_schedule)
        checkpoint.set_random_state(state["random"])
        tracker.restore(state["history"])
        first_step, seconds_before = state["step"], state["seconds"]

    status = "finished"
    start = saved = time.monotonic()
    last_evaluation = first_step
    model.train()
    with training_progress() as bar:
        task = bar.add_task("training", total=steps, completed=first_step, **shown(tracker))
        for step in range(first_step, steps):
            inputs, targets = data.train_batch(step, settings.batch_size, seed)
            loss = cross_entropy(model(place(inputs, settings.channels_last)), targets)
            accelerator.backward(loss)
            pruning.before_step(step)
            if settings.clip_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
            optimizer.step()
            pruning.after_step(step)
            optimizer.zero_grad()
            lr = optimizer.param_groups[0]["lr"]
            for scheduler in schedulers:
                scheduler.step()
            loss_sum += loss.detach()
            bar.update(task, completed=step + 1)

            done = step + 1
            if done % eval_every and done != steps:
                continue
            if done == steps:
                pruning.finish(partial(training_loss, data, settings, seed))
            plain_model = pruning.plain_model()
            val_loss, val_accuracy = evaluate(plain_model, data, settings)
            row: Row = {
                "step": done,
                "lr": float(lr),
                "train_loss": float(loss_sum) / (done - last_evaluation),
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "sparsity": sparsity(plain_model),
                "zero_fraction": zero_fraction(plain_model),
                "seconds": seconds_before + time.monotonic() - start,
            }
            tracker.log(row, plain_model)
            bar.update(task, **shown(tracker))
            if not (math.isfinite(row["train_loss"]) and math.isfinite(val_loss)):
                status = "diverged"
                break
            loss_sum.zero_()
            last_evaluation = done
            if time.monotonic() - saved > 60 * settings.checkpoint_minutes and done != steps:
                state = {
                    "step": done,
                    "seconds": row["seconds"],
                    "model": trained_model.state_dict(),
                    "pruning": pruning.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedulers": [scheduler.state_dict() for scheduler in schedulers],
                    "random": checkpoint.random_state(),
                    "history": tracker.history,
                }
                checkpoint.save(run_dir / checkpoint.CHECKPOINT_FILE, state)
                saved = time.monotonic()

    plain_model = pruning.plain_model()
    metrics: dict[str, Any] = {"steps": steps, "params_decayed": decayed_count(plain_model)}
    metrics["seconds"] = seconds_before + time.monotonic() - start
    if status == "finished":
        metrics |= final_metrics(tracker.history)
        metrics["val_accuracy_zeroed"] = metrics["val_accuracy"]
        # Where every small weight is exactly zero, zeroing them changes nothing.
        if metrics["sparsity"] != metrics["zero_fraction"]:
            with zeroed(plain_model):
                metrics["val_accuracy_zeroed"] = evaluate(plain_model, data, settings)[1]
    return Outcome(status, metrics)


def shown(tracker: Tracker) -> dict[str, Any]:
    """What the progress bar says of the last evaluation."""
    if not tracker.history:
        return dict.fromkeys(("loss", "accuracy", "sparsity", "lr"), "-")
    last = tracker.history[-1]
    return {
        "loss": f"{last['train_loss']:.3f}",
        "accuracy": f"{last['val_accuracy']:.2f}%",
        "sparsity": f"{last['sparsity']:.3f}",
        "lr": f"{last['lr']:.1e}",
    }


def decayed_count(model: nn.Module) -> int:
    """The number of weights that the decay acts on."""
    return sum(weight.numel() for _, weight in split_decayed(model)[0])


def final_metrics(history: list[Row]) -> dict[str, Any]:
    """The last evaluation's metrics, and the best accuracy of all of them."""
    names = ("val_accuracy", "val_loss", "train_loss", "sparsity", "zero_fraction")
    metrics: dict[str, Any] = {name: history[-1][name] for name in names}
    metrics["best_val_accuracy"] = max(row["val_accuracy"] for row in history)
    return metrics
