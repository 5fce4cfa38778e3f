"""The training loop, the same for every model, data set and method."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from pnorm_decay.data import Dataset
from pnorm_decay.optim import TargetSparsity
from pnorm_decay.sparsity import sparsity, zero_fraction
from pnorm_decay.training import building, checkpoint, stopping
from pnorm_decay.training.batch_norm import check_one_image
from pnorm_decay.training.evaluation import (
    cross_entropy,
    decayed_count,
    evaluate,
    final_metrics,
    other_accuracies,
    training_loss,
)
from pnorm_decay.training.graphs import GraphedPasses, Passes, check_graphs
from pnorm_decay.training.machine import (
    check_channels_last,
    check_share,
    in_memory_format,
    share_batch_norm,
)
from pnorm_decay.training.progress import console, sweep_position, training_progress
from pnorm_decay.training.settings import Settings
from pnorm_decay.training.tracking import Row, Tracker

STEPS_BETWEEN_AGREEMENTS = 10  # of several processes on whether to stop or to save


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


class Training:
    """A run while it trains: what its settings describe, and how far it is.

    Args:
        settings: the run's settings.
        data: the data set.
        accelerator: device, precision and processes; each process takes its share of a batch.

    Attributes:
        model: maps inputs to logits (..., classes); wrapped for precision and processes.
        optimizer: over the model's parameters.
        method: what makes zeros beside the optimizer.
        schedulers: of the optimizer's options, stepped after every step.
        steps: the run's length.
        eval_every: steps between evaluations; the last step is always evaluated.
        step: how many steps have been taken.
        last_evaluation: how many had been at the last evaluation.
        lr: the learning rate of the last step taken; ``lambda_p`` likewise, or None.
        loss_sum: of the steps since the last evaluation, on the device.

    Raises:
        ConfigError: what the settings describe cannot be built or does not go together.
        DataError: the data set is missing or broken.
    """

    def __init__(self, settings: Settings, data: Dataset, accelerator: Accelerator) -> None:
        self.settings, self.data, self.accelerator = settings.trainer, data, accelerator
        self.seed = settings.seed
        schedule = building.build_schedule(settings)
        decay_schedule = building.build_decay_schedule(settings)
        self.method = building.build_method(settings)
        building.check_optimizer(settings.optimizer)
        check_share(self.settings.batch_size, accelerator.num_processes)
        building.set_up_data(data, accelerator.device)

        building.check_memory(settings, data)
        model = drawn_model(settings, data, accelerator)
        per_epoch = building.steps_per_epoch(data, self.settings.batch_size)
        self.steps = self.settings.total_steps(per_epoch)
        self.eval_every = self.settings.evaluation_interval(self.steps, per_epoch)
        example = in_memory_format(
            data.train_batch(0, 2, self.seed)[0], self.settings.channels_last
        )
        if self.settings.batch_size == 1:
            check_one_image(model, example[:1])
        warmup = schedule.warmup(self.steps, per_epoch)
        shortened = schedule.shortened(self.steps, per_epoch)
        if shortened and accelerator.is_main_process:
            console.print(f"{sweep_position()}warning: {shortened}", style="yellow")
        building.set_up_method(self.method, model, example, steps=self.steps, warmup=warmup)
        optimizer = building.build_optimizer(settings.optimizer, model)
        seed_process(self.seed, accelerator.process_index)
        decay_schedulers = decay_schedule.attach(optimizer, self.steps)
        lr_scheduler = schedule.attach(optimizer, self.steps, per_epoch)
        self.schedulers = [lr_scheduler, *decay_schedulers]
        targets = [s.sparsity for s in decay_schedulers if isinstance(s, TargetSparsity)]
        self.target = targets[0] if targets else None

        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if self.settings.compile:
            self.model = torch.compile(self.model)
        self._parts: dict[str, Any] = {"model": model, "pruning": self.method}
        self._parts["optimizer"] = self.optimizer
        for number, scheduler in enumerate(self.schedulers):
            self._parts[f"scheduler_{number}"] = scheduler
        if accelerator.scaler is not None:
            self._parts["scaler"] = accelerator.scaler

        self.passes: Passes = self.loss_and_gradients
        if self.settings.cuda_graphs:
            check_graphs(accelerator)
            self.passes = GraphedPasses(self.loss_and_gradients, self.optimizer.zero_grad)

        self.step = self.last_evaluation = 0
        self.lr = math.nan
        self.lambda_p = self.optimizer.param_groups[0].get("lambda_p")
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self._seconds_before, self._start = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has taken, with what it took before it was cut off."""
        return self._seconds_before + time.monotonic() - self._start

    @property
    def is_evaluated_now(self) -> bool:
        """Whether an evaluation is due before the next step."""
        due = self.step % self.eval_every == 0 or self.step == self.steps
        return due and self.step != self.last_evaluation

    def batch(self) -> tuple[Tensor, Tensor]:
        """This process's share of the next training batch: inputs and targets."""
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        inputs, targets = self.data.train_batch(self.step, self.settings.batch_size, self.seed)
        return in_memory_format(inputs[share], self.settings.channels_last), targets[share]

    def loss_and_gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The forward and the backward pass: the loss, and new gradients in the parameters."""
        loss = cross_entropy(self.model(inputs), targets)
        self.accelerator.backward(loss)
        return loss.detach()

    def advance(self, loss: Tensor) -> None:
        """Notes what the step just taken was like, and moves the schedules on."""
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.lambda_p = self.optimizer.param_groups[0].get("lambda_p")
        for scheduler in self.schedulers:
            scheduler.step()
        self.loss_sum += loss
        self.step += 1

    def evaluated(self) -> Row:
        """The metrics at this step; after the last, those of the network that the run leaves."""
        if self.step == self.steps:
            # What a run is judged by is the same for every method: float32.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.method.finish(partial(training_loss, self.data, self.settings, self.seed))
        model = self.method.plain_model()
        count = self.step - self.last_evaluation
        train_loss = float(self.accelerator.reduce(self.loss_sum, "mean") / count)
        val_loss, val_accuracy = evaluate(model, self.data, self.settings, self.accelerator)
        self.loss_sum.zero_()
        self.last_evaluation = self.step
        return {
            "step": self.step,
            "lr": self.lr,
            **({} if self.lambda_p is None else {"lambda_p": self.lambda_p}),
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "sparsity": sparsity(model),
            "zero_fraction": zero_fraction(model),
            "seconds": self.seconds,
        }

    def outcome(self, history: list[Row]) -> Outcome:
        """How the run has ended, given all its evaluations."""
        last, model = history[-1], self.method.plain_model()
        metrics: dict[str, Any] = {"steps": self.steps, "params_decayed": decayed_count(model)}
        metrics["seconds"] = self.seconds
        if not is_finite(last):
            return Outcome("diverged", metrics, f"the loss was not finite by step {self.step:,}")
        metrics |= final_metrics(history) | {"val_precision": "fp32"}
        metrics |= other_accuracies(
            model,
            self.data,
            self.settings,
            self.accelerator,
            seed=self.seed,
            steps=self.steps,
            last=last,
        )
        return Outcome("finished", metrics)

    def save(self, path: Path, tracker: Tracker) -> None:
        """Writes a checkpoint; a full disk must not end a run that could still finish.

        Every process of the run calls this; the main one writes.
        """
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state["tracker"] = tracker.state_dict()
        state |= {"step": self.step, "last_evaluation": self.last_evaluation}
        state |= {"lr": self.lr, "lambda_p": self.lambda_p, "seconds": self.seconds}
        random_state = checkpoint.random_state(self.accelerator.device)
        own = {"loss_sum": self.loss_sum.cpu(), "random": random_state}
        state["processes"] = gather_object([own])
        if not self.accelerator.is_main_process:
            return
        try:
            checkpoint.save(path, state)
        except OSError as error:
            console.print(f"warning: no checkpoint written: {error}", style="yellow")

    def load(self, path: Path, tracker: Tracker) -> None:
        """Starts the clock, and goes on from a checkpoint where there is one that can be used."""
        self._start = time.monotonic()
        state = checkpoint.load(path)
        if state is None:
            return
        if not {*self._parts, "tracker"} <= state.keys():
            console.print(f"warning: {path} is left out: another version wrote it")
            return
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        tracker.load_state_dict(state["tracker"])
        self.loss_sum.copy_(restore_own(state, self.accelerator))
        self.step, self.last_evaluation = state["step"], state["last_evaluation"]
        self.lr, self.lambda_p = state["lr"], state.get("lambda_p")
        self._seconds_before = state["seconds"]


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


def train(run: Training, run_dir: Path, tracker: Tracker) -> Outcome:
    """Trains and evaluates a run's model, from the run's checkpoint where there is one.

    Args:
        run: what is trained.
        run_dir: where the checkpoint is.
        tracker: where the metrics go.

    Returns:
        The outcome; also where the loss diverged.

    Raises:
        Stopped: the process was asked to stop, and the state is saved.
    """
    accelerator, method = run.accelerator, run.method
    path = run_dir / checkpoint.CHECKPOINT_FILE
    run.load(path, tracker)
    run.model.train()
    saved = time.monotonic()
    with imports_set_aside(), training_progress(accelerator.is_main_process) as bar:
        columns = progress_columns(tracker.history, run.target)
        task = bar.add_task("training", total=run.steps, completed=run.step, **columns)
        while True:
            if run.is_evaluated_now:
                row = run.evaluated()
                tracker.log(row, method.plain_model())
                bar.update(task, **progress_columns(tracker.history, run.target))
                if not is_finite(row):
                    break
            if run.step == run.steps:
                break

            take_step(run)
            bar.update(task, completed=run.step)

            due = time.monotonic() - saved > 60 * run.settings.checkpoint_minutes
            stop, due = agreed(accelerator, run.step, stopping.requested(), due)
            if stop or due:
                run.save(path, tracker)
                saved = time.monotonic()
            if stop:
                raise stopping.Stopped
    return run.outcome(tracker.history)


def take_step(run: Training) -> None:
    """One step of training; nothing in it waits for a GPU."""
    inputs, targets = run.batch()
    loss = run.passes(inputs, targets)
    run.method.before_step(run.step)
    if run.settings.clip_grad_norm is not None:
        run.accelerator.clip_grad_norm_(run.model.parameters(), run.settings.clip_grad_norm)
    run.optimizer.step()
    run.method.after_step(run.step)
    if not run.settings.cuda_graphs:  # which write the gradients where they were, anew
        run.optimizer.zero_grad()
    run.advance(loss)


def drawn_model(settings: Settings, data: Dataset, accelerator: Accelerator) -> nn.Module:
    """The model with the weights that the run's seed draws, on its device, in its memory format."""
    device = accelerator.device
    set_seed(settings.seed)
    model = building.build_model(settings, data).to(device)
    if accelerator.num_processes > 1:
        model = share_batch_norm(model, device)
    if settings.trainer.channels_last:
        check_channels_last(model, device)
        model = model.to(memory_format=torch.channels_last)
    return model


def seed_process(seed: int, process: int) -> None:
    """Gives each further process of a run random numbers of its own, for its dropout masks."""
    if process:  # the first goes on like the only one of a run
        set_seed(int(np.random.SeedSequence((seed, process)).generate_state(1)[0]))


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


def is_finite(row: Row) -> bool:
    """Whether an evaluation's losses are numbers to go on with."""
    return math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"])


def progress_columns(history: list[Row], target: float | None) -> dict[str, Any]:
    """What the progress bar says of the last evaluation; a target stands behind the sparsity."""
    goal = "" if target is None else f"/{target:g}"
    if not history:
        return dict.fromkeys(("loss", "accuracy", "lr"), "-") | {"sparsity": "-" + goal}
    last = history[-1]
    return {
        "loss": f"{last['train_loss']:.3f}",
        "accuracy": f"{last['val_accuracy']:.2f}%",
        "sparsity": f"{last['sparsity']:.3f}{goal}",
        "lr": f"{last['lr']:.1e}",
    }
