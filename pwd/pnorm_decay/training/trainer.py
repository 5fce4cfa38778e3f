"""The training loop, the same for every model, data set and method."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pnorm_decay.baselines import Pruning
from pnorm_decay.data import Dataset
from pnorm_decay.optim import OptionScheduler, TargetSparsity, split_decayed
from pnorm_decay.sparsity import sparsity, zero_fraction, zeroed
from pnorm_decay.training import checkpoint, stopping
from pnorm_decay.training.batch_norm import batch_norms, recalibrated
from pnorm_decay.training.progress import console, training_progress
from pnorm_decay.training.settings import ConfigError, TrainerSettings
from pnorm_decay.training.tracking import Row, Tracker

LOSS_BATCHES = 4
RECALIBRATION_BATCHES = 50
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
STEPS_BETWEEN_AGREEMENTS = 10  # of several processes on whether to stop or to save
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        status: "finished", or "diverged" where a loss was not finite.
        metrics: the record's columns that training determines.
        reason: why the run did not finish, or None.
    """

    status: str
    metrics: dict[str, Any]
    reason: str | None = None


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """An Accelerator for this run, whatever an earlier run of this process asked for."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that accelerate then takes
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=device.type == "cpu", mixed_precision=ACCELERATE_PRECISION[precision])


def prepare_process(threads: int) -> None:
    """Settings of the whole process: CPU threads, and what makes them faster.

    Args:
        threads: CPU threads of torch's operations.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # weights on their way to zero pass through slow denormals
    if platform.libc_ver()[0] == "glibc":
        # Every step frees and takes the same memory. Given back to the system in between, it comes
        # with page faults: a tenth of a step of ResNet18 (width 16) on two cores.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def imports_set_aside() -> Iterator[None]:
    """Has the garbage collector pass over what there is now, until the block ends, however.

    Every now and then a step would wait while all that was imported is searched.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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


def check_share(batch_size: int, processes: int) -> None:
    """Raises a ConfigError unless a batch divides evenly among a run's processes."""
    if batch_size % processes:
        raise ConfigError(
            f"trainer.batch_size={batch_size}: {processes} processes share a batch, "
            "so it must be a multiple of that"
        )


def share_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch statistics over all processes of a run, as one process would have them.

    Raises:
        ConfigError: the model has batch norms and the device is a CPU, for which torch has no
            shared ones.
    """
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if has_batch_norm and device.type == "cpu":
        raise ConfigError("a model with batch norm runs on several GPUs, but on one CPU process")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


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
        logits = model(place(inputs, settings.channels_last))
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
    schedulers: Sequence[LRScheduler | OptionScheduler | TargetSparsity],
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
        accelerator: device, precision and processes; each process takes its share of a batch.
        seed: of the data order and augmentation.
        run_dir: where the checkpoint is.
        tracker: where the metrics go.

    Returns:
        The outcome; also where the loss diverged.

    Raises:
        Stopped: the process was asked to stop, and the state is saved.
    """
    trained_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    if settings.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    share = slice(accelerator.process_index, None, accelerator.num_processes)

    parts: dict[str, Any] = {"model": trained_model, "pruning": pruning, "optimizer": optimizer}
    parts["tracker"] = tracker
    parts |= {f"scheduler_{number}": scheduler for number, scheduler in enumerate(schedulers)}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler

    step = last_evaluation = 0
    lr, seconds_before = math.nan, 0.0
    lambda_p = optimizer.param_groups[0].get("lambda_p")
    targets_of = [s.sparsity for s in schedulers if isinstance(s, TargetSparsity)]
    target = f"/{targets_of[0]:g}" if targets_of else ""
    loss_sum = torch.zeros((), device=accelerator.device)  # since the last evaluation
    checkpoint_path = run_dir / checkpoint.CHECKPOINT_FILE
    state = checkpoint.load(checkpoint_path)
    if state is not None and not parts.keys() <= state.keys():
        console.print(f"warning: {checkpoint_path} is left out: another version wrote it")
        state = None
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        loss_sum.copy_(restore_own(state, accelerator))
        step, last_evaluation = state["step"], state["last_evaluation"]
        lr, seconds_before = state["lr"], state["seconds"]
        lambda_p = state.get("lambda_p")

    def save_checkpoint() -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": step, "last_evaluation": last_evaluation}
        state |= {"lr": lr, "lambda_p": lambda_p}
        state["seconds"] = seconds_before + time.monotonic() - start
        own = {"loss_sum": loss_sum.cpu(), "random": checkpoint.random_state(accelerator.device)}
        state["processes"] = gather_object([own])
        if not accelerator.is_main_process:
            return
        try:
            checkpoint.save(checkpoint_path, state)
        except OSError as error:  # a full disk must not end a run that could still finish
            console.print(f"warning: no checkpoint written: {error}", style="yellow")

    reason = None
    start = saved = time.monotonic()
    model.train()
    with imports_set_aside(), training_progress(accelerator.is_main_process) as bar:
        task = bar.add_task("training", total=steps, completed=step, **shown(tracker, target))
        while True:
            if step != last_evaluation and (step % eval_every == 0 or step == steps):
                if step == steps:
                    # What a run is judged by is the same for every method: float32.
                    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                    pruning.finish(partial(training_loss, data, settings, seed))
                plain_model = pruning.plain_model()
                mean_loss = accelerator.reduce(loss_sum, "mean") / (step - last_evaluation)
                val_loss, val_accuracy = evaluate(plain_model, data, settings, accelerator)
                row: Row = {
                    "step": step,
                    "lr": lr,
                    **({} if lambda_p is None else {"lambda_p": lambda_p}),
                    "train_loss": float(mean_loss),
                    "val_loss": val_loss,
                    "val_accuracy": val_accuracy,
                    "sparsity": sparsity(plain_model),
                    "zero_fraction": zero_fraction(plain_model),
                    "seconds": seconds_before + time.monotonic() - start,
                }
                tracker.log(row, plain_model)
                bar.update(task, **shown(tracker, target))
                if not (math.isfinite(row["train_loss"]) and math.isfinite(val_loss)):
                    reason = f"the loss was not finite by step {step:,}"
                    break
                loss_sum.zero_()
                last_evaluation = step
            if step == steps:
                break

            inputs, targets = data.train_batch(step, settings.batch_size, seed)
            inputs, targets = place(inputs[share], settings.channels_last), targets[share]
            loss = cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            pruning.before_step(step)
            if settings.clip_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
            optimizer.step()
            pruning.after_step(step)
            optimizer.zero_grad()
            lr = float(optimizer.param_groups[0]["lr"])
            lambda_p = optimizer.param_groups[0].get("lambda_p")
            for scheduler in schedulers:
                scheduler.step()
            loss_sum += loss.detach()
            step += 1
            bar.update(task, completed=step)

            due = time.monotonic() - saved > 60 * settings.checkpoint_minutes
            stop, due = agreed(accelerator, step, stopping.requested(), due)
            if stop or due:
                save_checkpoint()
                saved = time.monotonic()
            if stop:
                raise stopping.Stopped

    plain_model = pruning.plain_model()
    metrics: dict[str, Any] = {"steps": steps, "params_decayed": decayed_count(plain_model)}
    metrics["seconds"] = seconds_before + time.monotonic() - start
    if reason is not None:
        return Outcome("diverged", metrics, reason)
    metrics |= final_metrics(tracker.history)
    metrics["val_accuracy_zeroed"] = metrics["val_accuracy"]
    # Where every small weight is exactly zero, zeroing them changes nothing.
    if metrics["sparsity"] != metrics["zero_fraction"]:
        with zeroed(plain_model):
            accuracy = evaluate(plain_model, data, settings, accelerator)[1]
        metrics["val_accuracy_zeroed"] = accuracy
    metrics["val_precision"] = "fp32"
    if batch_norms(plain_model):
        batches = (
            place(data.train_batch(step, settings.batch_size, seed)[0], settings.channels_last)
            for step in range(min(RECALIBRATION_BATCHES, steps))
        )
        with recalibrated(plain_model, batches):
            accuracy = evaluate(plain_model, data, settings, accelerator)[1]
        metrics["val_accuracy_recalibrated"] = accuracy
    return Outcome("finished", metrics)


def agreed(accelerator: Accelerator, step: int, *asked: bool) -> list[bool]:
    """What any process of a run asks for after this step; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return list(asked)
    if step % STEPS_BETWEEN_AGREEMENTS:
        return [False] * len(asked)
    wanted = torch.tensor(asked, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(wanted, "sum") > 0).tolist()


def restore_own(state: dict[str, Any], accelerator: Accelerator) -> Tensor:
    """Restores this process's random state from a checkpoint.

    Returns:
        This process's sum of losses since the last evaluation, a scalar. Where the run had another
        number of processes, the mean of theirs; the random state then stays, and with dropout the
        run does not end with the same bits.
    """
    # One process of an older version saved it so.
    own = state.get("processes") or [{key: state[key] for key in ("loss_sum", "random")}]
    if len(own) != accelerator.num_processes:
        if accelerator.is_main_process:
            console.print(
                f"warning: the run had {len(own)} processes, now {accelerator.num_processes}: "
                "dropout draws anew",
                style="yellow",
            )
        return torch.stack([process["loss_sum"] for process in own]).mean(0)
    mine = own[accelerator.process_index]
    checkpoint.set_random_state(mine["random"], accelerator.device)
    return mine["loss_sum"]


def shown(tracker: Tracker, target: str) -> dict[str, Any]:
    """What the progress bar says of the last evaluation; target stands behind the sparsity."""
    if not tracker.history:
        return dict.fromkeys(("loss", "accuracy", "lr"), "-") | {"sparsity": "-" + target}
    last = tracker.history[-1]
    return {
        "loss": f"{last['train_loss']:.3f}",
        "accuracy": f"{last['val_accuracy']:.2f}%",
        "sparsity": f"{last['sparsity']:.3f}{target}",
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
