"""Forward and backward pass as one CUDA graph: hundreds of operations, started as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from pnorm_decay.training.settings import ConfigError

WARM_UP = 3  # steps before the recording: libraries set themselves up in their first calls

Passes = Callable[[Tensor, Tensor], Tensor]


def check_graphs(accelerator: Accelerator) -> None:
    """Raises a ConfigError where a run's passes cannot be recorded."""
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        raise ConfigError("trainer.cuda_graphs=true: needs a run on one GPU; use false")


class GraphedPasses:
    """Does what a function of a batch does; from the fourth batch on, as a recording of it.

    The recipe is that of torch's notes on CUDA graphs. The first calls run on a stream of their
    own. What is recorded reads and writes the same memory ever after: a batch is copied into it,
    and the gradients stay where they are, so that nobody may set them to None from then on.

    Args:
        passes: forward and backward pass of a batch (inputs, targets): leaves gradients where there
            are none, and returns the loss, detached.
        forget_gradients: sets all gradients to None.
    """

    def __init__(self, passes: Passes, forget_gradients: Callable[[], object]) -> None:
        self._passes, self._forget = passes, forget_gradients
        self._calls = 0
        self._batch: tuple[Tensor, Tensor] | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, of the same shape each time; the next call overwrites it."""
        if self._batch is None:
            self._forget()
            self._calls += 1
            if self._calls <= WARM_UP:
                return self._aside(inputs, targets)
            self._batch = (inputs.clone(), targets.clone())
            self._replay, self._loss = self._record(*self._batch)
        for kept, new in zip(self._batch, (inputs, targets), strict=True):
            kept.copy_(new)
        self._replay()
        return self._loss

    def _aside(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The passes on a stream other than the current one, which waits for them."""
        if self._calls == 1:
            self._stream = torch.cuda.Stream(inputs.device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._passes(inputs, targets)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _record(self, inputs: Tensor, targets: Tensor) -> tuple[Callable[[], None], Tensor]:
        """What does the passes again with what these tensors then hold; and its loss."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            loss = self._passes(inputs, targets)
        return graph.replay, loss
