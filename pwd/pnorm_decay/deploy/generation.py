"""Text from models/gpt.py's network, one token at a time, with a cache of keys and values."""

from __future__ import annotations

import ctypes
import math
import numbers
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pnorm_decay.deploy.inference import (
    MOST_COLUMNS,
    Matrix,
    Nonzeros,
    SparseLinear,
    _library,
    has_hooks,
    matrix_of,
    threads_for,
)
from pnorm_decay.models.gpt import GPT

__all__ = ["generate"]

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NORM_EPS = 1e-5  # as in sparse.c
DRAWS = 64  # tokens for which random numbers are drawn at a time


class _Layer(ctypes.Structure):
    """One block, as in sparse.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale1", "shift1", "scale2", "shift2")),
        *((name, Matrix) for name in ("qkv", "mixed", "up", "down")),
    )


class _Decoder(ctypes.Structure):
    """The network, as in sparse.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "width", "heads", "context", "vocabulary")),
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "positions", "scale", "shift", "layer", "cache", "memory")
        ),
    )


Step = Callable[[int, int], Tensor]  # the logits after a token, which is at this position


def generate(
    model: GPT,
    prompt: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continues a text, token by token.

    A network from `sparse_inference` does a token in one call of compiled code: in Python,
    attention and norms would take several times as long as the sparse layers. Once the text
    is as long as the network's context, the later half of it is read again from position 0.

    Args:
        model: in eval mode, whole (also from `torch.compile`) or from `sparse_inference`.
        prompt: int64 (tokens,), at least one; of a long one, the last `model.block_size` are read.
        count: how many tokens follow.
        temperature: what the logits are divided by; at 0, the likeliest token is taken.
        generator: of the random numbers, on the CPU; None for torch's own.

    Returns:
        An iterator of the tokens, each of which is made when it is asked for.

    Raises:
        TypeError: the model is no `GPT`, the prompt no tensor of whole numbers, or `count` or
            `temperature` no number.
        ValueError: the prompt is empty or holds no token of the model's, or a number is negative,
            infinite or NaN.
    """
    if not isinstance(getattr(model, "_orig_mod", model), GPT):  # torch.compile's is wrapped
        raise TypeError(f"generate writes with a GPT, not with a {type(model).__name__}")
    if not isinstance(prompt, Tensor) or prompt.dtype not in WHOLE:
        kind = prompt.dtype if isinstance(prompt, Tensor) else type(prompt).__name__
        raise TypeError(f"A prompt is a tensor of whole numbers, not of {kind}")
    vocabulary = model.token_embedding.num_embeddings
    text = prompt.tolist()
    if prompt.ndim != 1 or not text or not 0 <= min(text) <= max(text) < vocabulary:
        raise ValueError(f"A prompt is a vector of one or more tokens below {vocabulary}")
    count = operator.index(count)
    if not isinstance(temperature, numbers.Real | Tensor):
        raise TypeError(f"temperature must be a number, not a {type(temperature).__name__}")
    temperature = float(temperature)
    if count < 0 or not 0 <= temperature < math.inf:
        raise ValueError(f"count {count} and temperature {temperature} must be 0 or more, finite")
    return _tokens(model, text, count, temperature, generator)


@torch.no_grad()
def _tokens(
    model: GPT, text: list[int], count: int, temperature: float, generator: torch.Generator | None
) -> Iterator[int]:
    vocabulary, context = model.token_embedding.num_embeddings, model.block_size
    store = model.new_cache()
    step = compiled_step(model, store) or _step(model, store)
    position = context  # nothing has been read yet
    noise = torch.empty(DRAWS, vocabulary)
    for n in range(count):
        if position == context:
            window = text[-context if n == 0 else -max(context // 2, 1) :]
            tokens = torch.tensor([window], device=store.device)
            logits, position = model(tokens, store)[0, -1], len(window)
        else:
            logits, position = step(text[-1], position), position + 1
        if temperature:
            # The largest of logits with Gumbel noise is a draw from their softmax.
            if n % DRAWS == 0:
                noise.exponential_(generator=generator).log_()
            logits = logits.double().cpu()
            below = logits - logits.max()  # of which the largest, 0, never becomes infinity
            logits = below / temperature - noise[n % DRAWS]
        text.append(int(logits.argmax()))
        yield text[-1]


def _step(model: GPT, store: Tensor) -> Step:
    """A token in Python."""

    def step(token: int, position: int) -> Tensor:
        return model(torch.tensor([[token]], device=store.device), store, position)[0, -1]

    return step


def compiled_step(model: GPT, store: Tensor) -> Step | None:
    """A token in compiled code, None where the network is dense or has another form."""
    if type(model) is not GPT or not store.is_cpu or store.dtype != torch.float32:
        return None
    if not any(isinstance(layer, SparseLinear) for layer in model.modules()) or not _library():
        return None
    for module in model.modules():
        if has_hooks(module) or (isinstance(module, nn.LayerNorm) and module.eps != NORM_EPS):
            return None
    width, heads = model.token_embedding.embedding_dim, model.cache_shape[2]
    if not all(_has_known_form(_linears(block), width, heads) for block in model.blocks):
        return None
    return _CompiledStep(model, store)


def _linears(block: Any) -> list[Any]:
    """In the order of `_Layer`'s matrices."""
    return [block.attention.qkv, block.attention.proj, block.mlp.fc, block.mlp.proj]


def _has_known_form(linears: list[Any], width: int, heads: int) -> bool:
    """Whether these are a block's layers, none in bf16; `compact` may have made them narrower."""
    if not all(isinstance(layer, nn.Linear | SparseLinear) for layer in linears):
        return False
    shapes = [tuple(layer.weight.shape) for layer in linears]
    values, hidden = shapes[1][1], shapes[2][0]
    known = [(2 * width + values, width), (width, values), (hidden, width), (width, hidden)]
    is_small = values <= width and max(width, hidden) <= MOST_COLUMNS
    return shapes == known and is_small and values % heads == 0


class _CompiledStep:
    """sparse.c's `decode`, with all that it reads."""

    def __init__(self, model: GPT, store: Tensor) -> None:
        blocks: list[Any] = list(model.blocks)
        vocabulary, width = model.token_embedding.weight.shape
        _, _, heads, context, _ = model.cache_shape
        self.held: list[Any] = [store]  # what the structures point into
        self.weights = 0  # of all layers
        layers = (_Layer * len(blocks))()
        for block, layer in zip(blocks, layers, strict=True):
            for number, norm in enumerate((block.ln1, block.ln2), start=1):
                setattr(layer, f"scale{number}", self._address(norm.weight))
                setattr(layer, f"shift{number}", self._address(norm.bias))
            layer.qkv, layer.mixed, layer.up, layer.down = map(self._matrix, _linears(block))
        hidden = max(layer.up.rows for layer in layers)
        memory = torch.empty(6 * width + heads * context + hidden)
        self.decoder = _Decoder(
            *(len(blocks), width, heads, context, vocabulary),
            *map(self._address, (model.token_embedding.weight, model.position_embedding.weight)),
            *map(self._address, (model.ln_f.weight, model.ln_f.bias)),
            *(ctypes.addressof(layers), *map(self._address, (store, memory))),
        )
        self.held.append(layers)
        self.weights_a_layer = self.weights // (4 * len(blocks))
        self.logits = torch.empty(vocabulary)

    def __call__(self, token: int, position: int) -> Tensor:
        library: Any = _library()
        library.decode(
            ctypes.byref(self.decoder),
            *(ctypes.c_int64(token), ctypes.c_int64(position)),
            ctypes.c_void_p(self.logits.data_ptr()),
            threads_for(self.weights_a_layer),
        )
        return self.logits

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.held.append(tensor.detach().contiguous())
        return self.held[-1].data_ptr()

    def _matrix(self, layer: Any) -> Matrix:
        is_sparse = isinstance(layer, SparseLinear)
        nonzeros = layer.nonzeros if is_sparse else Nonzeros.of(layer.weight)
        self.weights += len(nonzeros.values)
        made, tensors = matrix_of(nonzeros, layer.weight.shape[1], layer.bias)
        self.held.append((tensors, layer.bias))
        return made
