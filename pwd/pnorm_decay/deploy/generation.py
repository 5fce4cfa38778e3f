"""Text from models/gpt.py's network, one token at a time, with a cache of keys and values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pnorm_decay.deploy.inference import (
    Matrix,
    Nonzeros,
    SparseLinear,
    _library,
    matrix_of,
    threads_for,
)
from pnorm_decay.models.gpt import GPT

__all__ = ["generate"]

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
        *(
            (name, ctypes.c_int64)
            for name in ("layers", "width", "heads", "hidden", "context", "vocabulary")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "positions", "scale", "shift", "layer", "cache", "memory")
        ),
    )


Step = Callable[[int, int], Tensor]  # the logits after a token, which is at this position


@torch.no_grad()
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
        model: in eval mode, whole or from `sparse_inference`.
        prompt: int64 (tokens,), at least one; of a long one, the last `model.block_size` are read.
        count: how many tokens follow.
        temperature: what the logits are divided by; at 0, the likeliest token is taken.
        generator: of the random numbers, on the CPU; None for torch's own.

    Yields:
        Each token as soon as it is known.

    Raises:
        ValueError: the prompt is empty, holds no token of the model's, or a number is negative.
    """
    vocabulary, context = model.token_embedding.num_embeddings, model.block_size
    text = prompt.tolist()
    if prompt.ndim != 1 or not text or not 0 <= min(text) <= max(text) < vocabulary:
        raise ValueError(f"A prompt is a vector of one or more tokens below {vocabulary}")
    if count < 0 or not temperature >= 0:
        raise ValueError(f"count {count} and temperature {temperature} must not be negative")
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
            logits = logits.float().cpu() / temperature - noise[n % DRAWS]
        text.append(int(logits.argmax()))
        yield text[-1]


def _step(model: GPT, store: Tensor) -> Step:
    """A token in Python."""

    def step(token: int, position: int) -> Tensor:
        return model(torch.tensor([[token]], device=store.device), store, position)[0, -1]

    return step


def compiled_step(model: GPT, store: Tensor) -> Step | None:
    """A token in compiled code, None where the network is dense or has another form."""
    library: Any = _library()
    if type(model) is not GPT or not store.is_cpu or store.dtype != torch.float32 or not library:
        return None
    if not any(isinstance(layer, SparseLinear) for layer in model.modules()):
        return None
    blocks: list[Any] = list(model.blocks)
    width, vocabulary = model.token_embedding.embedding_dim, model.token_embedding.num_embeddings
    _, _, heads, context, _ = model.cache_shape
    linears: list[list[Any]] = [
        [block.attention.qkv, block.attention.proj, block.mlp.fc, block.mlp.proj]
        for block in blocks
    ]
    if not all(isinstance(layer, nn.Linear | SparseLinear) for layer in chain(*linears)):
        return None  # one of them is computed in bf16
    hidden = [layers[2].weight.shape[0] for layers in linears]
    shapes = [[tuple(layer.weight.shape) for layer in layers] for layers in linears]
    if shapes != [[(3 * width, width), (width, width), (h, width), (width, h)] for h in hidden]:
        return None
    weights: list[int] = []  # of each layer
    held: list[Any] = [store]  # what the structures point to

    def address(tensor: Tensor | None) -> int | None:
        held.append(None if tensor is None else tensor.detach().contiguous())
        return None if tensor is None else held[-1].data_ptr()

    def matrix(layer: Any) -> Matrix:
        dense = not isinstance(layer, SparseLinear)
        nonzeros = Nonzeros.of(layer.weight) if dense else layer.nonzeros
        weights.append(len(nonzeros.values))
        made, tensors = matrix_of(nonzeros, layer.weight.shape[1], layer.bias)
        held.append(tensors)
        return made

    layers = (_Layer * len(blocks))()
    for block, of_block, layer in zip(blocks, linears, layers, strict=True):
        for number, norm in enumerate((block.ln1, block.ln2), start=1):
            setattr(layer, f"scale{number}", address(norm.weight))
            setattr(layer, f"shift{number}", address(norm.bias))
        layer.qkv, layer.mixed, layer.up, layer.down = map(matrix, of_block)
    memory = torch.empty(6 * width + max(hidden) + heads * context)
    decoder = _Decoder(
        *(len(blocks), width, heads, max(hidden), context, vocabulary),
        *map(address, (model.token_embedding.weight, model.position_embedding.weight)),
        *map(address, (model.ln_f.weight, model.ln_f.bias)),
        *(ctypes.addressof(layers), address(store), address(memory)),
    )
    held += [layers, decoder]
    logits = torch.empty(vocabulary)
    arguments = ctypes.byref(decoder), ctypes.c_void_p(logits.data_ptr())

    def step(token: int, position: int) -> Tensor:
        where = ctypes.c_int64(token), ctypes.c_int64(position)
        threads = threads_for(sum(weights) // len(weights))
        library.decode(arguments[0], *where, arguments[1], threads)
        return logits

    step.held = held  # type: ignore[attr-defined]
    return step
