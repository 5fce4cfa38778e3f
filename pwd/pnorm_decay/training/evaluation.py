"""How good a network is: on the validation part, and on a few fixed batches of training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from pnorm_decay.data import Dataset
from pnorm_decay.optim import split_decayed
from pnorm_decay.sparsity import zeroed
from pnorm_decay.training.batch_norm import batch_norms, recalibrated
from pnorm_decay.training.machine import in_memory_format
from pnorm_decay.training.settings import TrainerSettings
from pnorm_decay.training.tracking import Row

LOSS_BATCHES = 4
RECALIBRATION_BATCHES = 50


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, for one prediction a sample or one a position.

    Args:
        logits: (..., classes).
        targets: (...), int64.
        reduction: as in torch.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: Dataset, settings: TrainerSettings, accelerator: Accelerator
) -> tuple[float, float]:
    """Loss (nats) and accuracy (percent) on the whole validation part, shared by all processes."""
    model.eval()
    # Loss, correct predictions, predictions; float64 counts exactly.
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for number, (inputs, targets) in enumerate(data.val_batches(settings.val_batch_size)):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        logits = model(in_memory_format(inputs, settings.channels_last))
        sums[0] += cross_entropy(logits, targets, reduction="sum")
        sums[1] += (logits.argmax(-1) == targets).sum()
        sums[2] += targets.numel()
    model.train()
    loss, correct, count = accelerator.reduce(sums, "sum").tolist()
    return loss / count, 100 * correct / count


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
            model(in_memory_format(inputs, settings.channels_last)), targets
        )
    model.train()
    return float(loss) / LOSS_BATCHES


def final_metrics(history: list[Row]) -> dict[str, Any]:
    """The last evaluation's metrics, and the best accuracy of all of them."""
    names = ("val_accuracy", "val_loss", "train_loss", "sparsity", "zero_fraction")
    metrics: dict[str, Any] = {name: history[-1][name] for name in names}
    metrics["best_val_accuracy"] = max(row["val_accuracy"] for row in history)
    return metrics


def other_accuracies(
    model: nn.Module,
    data: Dataset,
    settings: TrainerSettings,
    accelerator: Accelerator,
    *,
    seed: int,
    steps: int,
    last: Row,
) -> dict[str, float]:
    """A trained network's accuracy (percent) with its small weights zeroed and new statistics.

    Args:
        model: the network that a run has ended with.
        data: its data set.
        settings: of evaluation and training batches.
        accelerator: the run's.
        seed: the run's.
        steps: the run's length.
        last: the last evaluation's metrics.
    """
    accuracies = {"val_accuracy_zeroed": last["val_accuracy"]}
    # Where every small weight is exactly zero, zeroing them changes nothing.
    if last["sparsity"] != last["zero_fraction"]:
        with zeroed(model):
            accuracies["val_accuracy_zeroed"] = evaluate(model, data, settings, accelerator)[1]
    if batch_norms(model):
        batches = (
            in_memory_format(
                data.train_batch(step, settings.batch_size, seed)[0], settings.channels_last
            )
            for step in range(min(RECALIBRATION_BATCHES, steps))
        )
        with recalibrated(model, batches):
            accuracy = evaluate(model, data, settings, accelerator)[1]
        accuracies["val_accuracy_recalibrated"] = accuracy
    return accuracies


def decayed_count(model: nn.Module) -> int:
    """The number of weights that the decay acts on."""
    return sum(weight.numel() for _, weight in split_decayed(model)[0])
