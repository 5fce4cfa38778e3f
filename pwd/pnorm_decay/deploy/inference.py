"""Inference that leaves the zeros out: linear layers and convolutions of their other weights alone.

`sparse_inference` measures layer by layer whether that is faster. The loops are in sparse.c.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import operator
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from pnorm_decay.compiler import shared_library
from pnorm_decay.deploy.copies import copied, fresh, restore_buffers

__all__ = ["SparseConv2d", "SparseLinear", "sparse_inference"]

SOURCE = Path(__file__).with_name("sparse.c")
FEWEST_ZEROS = 0.4  # a layer with a smaller share of zeros is not tried
LANES = 16  # as in sparse.c
GAP = LANES * LANES  # behind the copy of the input: as far as sums of WIDEST may read
MOST_COLUMNS = 1 << 16  # of a Matrix: its places have 16 bits
CHUNK = 128  # tokens done at a time
PART = 1 << 18  # elements of a part of the input, to stay in the cache: 1 MiB
WEIGHTS_A_THREAD = 100_000  # at least, in the product with one vector
PLANS = 8  # what is derived from a layer's weights and input sizes, and kept
TEXT = "one call a token"  # the name of this form
SECONDS, FEWEST_RUNS, MOST_RUNS = 0.4, 5, 40  # for a comparison

logger = logging.getLogger(__name__)
Integers = Sequence[int]  # of (height, width)


class Geometry(ctypes.Structure):
    """One convolution's sizes and strides, as in sparse.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("images", "channels", "height", "width"),
            *("of_image", "of_channel", "of_row", "of_column"),
            *("outputs", "out_height", "out_width"),
            *("to_image", "to_channel", "to_row", "to_column"),
            *("stride_rows", "stride_columns", "pad_rows", "pad_columns"),
            *("row_phases", "column_phases", "rows", "columns"),
            *("chunk", "band", "is_linear", "scratch"),
        )
    )


class Matrix(ctypes.Structure):
    """A matrix for one vector at a time, as in sparse.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("ends", "values", "places", "order", "bias")),
    )


class Nonzeros(NamedTuple):
    """The weights of a layer that are not 0, row by row, a row being what makes one output.

    Attributes:
        values: float32 (weights,).
        places: where in its row each of them is, int32 (weights,).
        ends: how many weights there are up to the end of each row, int64 (rows,).
    """

    values: Tensor
    places: Tensor
    ends: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Nonzeros:
        """Those of a dense weight (outputs, ...), NaN among them."""
        flat = weight.detach().flatten(1)
        rows, places = (flat != 0).nonzero(as_tuple=True)
        ends = torch.bincount(rows, minlength=len(flat)).cumsum(0)
        return cls(flat[rows, places], places.int(), ends)

    def rows(self) -> Tensor:
        """The row of each weight, int64 (weights,)."""
        counts = self.ends.diff(prepend=self.ends.new_zeros(1))
        return torch.repeat_interleave(counts)

    def dense(self, *shape: int) -> Tensor:
        """The dense weight again."""
        flat = self.values.new_zeros(shape[0], math.prod(shape[1:]))
        flat[self.rows(), self.places.long()] = self.values
        return flat.view(shape)


class _Sparse(nn.Module):
    """What the two layers share: weights that are not 0, as buffers, and the shape of all."""

    values: Tensor
    places: Tensor
    ends: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        for name, tensor in Nonzeros.of(weight)._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def nonzeros(self) -> Nonzeros:
        return Nonzeros(self.values, self.places, self.ends)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each access."""
        return self.nonzeros.dense(*self.shape)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # In inference mode tensors count no versions, by which `_plan` would see the change.
        _PLANS.pop(self.values, None)

    def extra_repr(self) -> str:
        return f"{self.shape}, {len(self.values)} weights"


class SparseLinear(_Sparse):
    """A linear layer for inference, of those weights that are not 0.

    Fast for fp32 on a CPU; anything else, and an input that needs a gradient or holds NaN or
    infinity, gets what the dense layer gives, slowly.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _is_traced():
            return torch.ops.pnorm_decay.sparse_linear(x, *self.nonzeros, self.bias, self.shape[1])
        return _linear(x, self.nonzeros, self.bias, self.shape[1])


class SparseConv2d(_Sparse):
    """A convolution for inference, of those weights that are not 0, with what follows it.

    As `SparseLinear`. The output lies in the order channels, height, width, images.

    Args:
        conv: the dense one, with zeros as padding.
        padding: on both sides, (height, width).
    """

    relu = False

    def __init__(self, conv: nn.Conv2d, padding: Integers) -> None:
        super().__init__(conv.weight, conv.bias)
        self.settings = Settings(conv.stride, padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution plus `residual`, of the output's shape, and ReLU where `relu` is set."""
        rest = self.bias, residual, self.relu, self.shape
        if _is_traced():
            return torch.ops.pnorm_decay.sparse_conv2d(x, *self.nonzeros, *rest, *self.settings)
        return _convolution(x, self.nonzeros, *rest, self.settings)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.settings}{', ReLU' * self.relu}"


class Settings(NamedTuple):
    """Those of a convolution."""

    stride: Integers
    padding: Integers
    dilation: Integers
    groups: int


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@cache
def _library() -> ctypes.CDLL | None:
    """The loops, None where they cannot be built, after a warning."""
    try:
        return shared_library(SOURCE)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"Sparse layers are computed densely. {error}", stacklevel=3)
        return None


def _is_fast(values: Tensor, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether sparse.c takes a layer's weights and inputs."""
    return (
        values.is_cpu
        and values.dtype == torch.float32
        and _is_plain(x)
        and (residual is None or _is_plain(residual))
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and _library() is not None
    )


def _is_plain(x: Tensor) -> bool:
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    is_read = x.is_cpu and x.dtype == torch.float32 and x.numel() > 0 and not x.is_neg()
    return is_read and not needs_gradient


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# What is derived from a layer's weights, by the tensor of their values.
_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_memory = threading.local()


def _plan(nonzeros: Nonzeros, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returned for the same weights and key."""
    versions = tuple(tensor._version if not tensor.is_inference() else 0 for tensor in nonzeros)
    plans = _PLANS.setdefault(nonzeros.values, {})
    if (versions, key) not in plans:
        while len(plans) >= PLANS:
            plans.pop(next(iter(plans)), None)
        plans[versions, key] = make()
    return plans[versions, key]


def _scratch(elements: int) -> int:
    """The address of this thread's memory of that many floats at least."""
    memory = getattr(_memory, "tensor", None)
    if memory is None or memory.numel() < elements:
        memory = _memory.tensor = torch.empty(elements)
    return memory.data_ptr()


def _linear(x: Tensor, nonzeros: Nonzeros, bias: Tensor | None, columns: int) -> Tensor:
    if x.ndim and x.shape[-1] == columns and _is_fast(nonzeros.values, x):
        flat = x.reshape(-1, columns).contiguous()
        out = x.new_empty(*x.shape[:-1], len(nonzeros.ends))
        product = _product if len(flat) == 1 and columns <= MOST_COLUMNS else _products
        if product(flat, nonzeros, bias, out):
            return out
    return F.linear(x, nonzeros.dense(len(nonzeros.ends), columns), bias)


def _product(x: Tensor, nonzeros: Nonzeros, bias: Tensor | None, out: Tensor) -> bool:
    """A linear layer of one token; False where the input holds NaN or infinity."""
    matrix, _ = _plan(nonzeros, "matrix", lambda: matrix_of(nonzeros, x.shape[1], bias))
    library: Any = _library()
    matrix.bias = _address(bias)
    where = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
    return not library.multiply(ctypes.byref(matrix), *where, threads_for(len(nonzeros.values)))


def threads_for(weights: int) -> int:
    """How many threads pay for so many multiply-adds: starting and meeting takes them a while."""
    return min(torch.get_num_threads(), 1 + weights // WEIGHTS_A_THREAD)


def matrix_of(nonzeros: Nonzeros, columns: int, bias: Tensor | None) -> tuple[Matrix, list[Tensor]]:
    """The weights in slices of rows of about one length, and the tensors that hold them."""
    values, places, ends = nonzeros
    rows = len(ends)
    counts = ends.diff(prepend=ends.new_zeros(1))
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(rows)
    lengths = counts[order[::LANES]]  # a slice's first row is its longest
    slice_ends = lengths.cumsum(0)
    row = nonzeros.rows()
    nth = torch.arange(len(values)) - (ends - counts)[row]
    at = ((slice_ends - lengths)[rank[row] // LANES] + nth) * LANES + rank[row] % LANES
    filled = int(lengths.sum()) * LANES
    tensors = [
        slice_ends,
        values.new_zeros(filled).index_copy_(0, at, values),
        torch.zeros(filled, dtype=torch.int16).index_copy_(0, at, places.to(torch.int16)),
        F.pad(order, (0, -rows % LANES), value=-1).int(),
    ]
    where = [tensor.data_ptr() for tensor in tensors]
    return Matrix(rows, columns, *where, _address(bias)), tensors


def _products(x: Tensor, nonzeros: Nonzeros, bias: Tensor | None, out: Tensor) -> bool:
    """A linear layer of several tokens (tokens, columns); False where one is not finite."""
    (tokens, columns), rows = x.shape, len(nonzeros.ends)
    share = -(-tokens // torch.get_num_threads())  # of a thread
    chunk = min(tokens, CHUNK, _up(share))
    sizes = (tokens, columns, 1, 1), (columns, 1, 1, 1), (rows, 1, 1), (rows, 1, 1, 1)
    geometry = Geometry(*chain(*sizes), 1, 1, 0, 0, 1, 1, 1, 1, chunk, 1, True)
    geometry.scratch = _up(columns * chunk) + GAP + LANES * _up(chunk)
    weights = _plan(nonzeros, "places", lambda: _placed(nonzeros, nonzeros.places))
    return _convolve(geometry, weights, nonzeros.ends, bias, x, None, out, False)


def _up(count: int) -> int:
    """Rounded up to a multiple of LANES."""
    return -(-count // LANES) * LANES


def _placed(nonzeros: Nonzeros, places: Tensor) -> Tensor:
    """Values and places side by side, as the struct Weight."""
    return torch.stack([nonzeros.values.view(torch.int32), places.int()], 1)


def _convolve(
    geometry: Geometry,
    weights: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
    relu: bool,
) -> bool:
    """sparse.c's loop; False where the input holds NaN or infinity."""
    g, threads = geometry, torch.get_num_threads()
    tasks = -(-g.images // g.chunk) * -(-g.out_height // g.band)
    parts = 1 if tasks % threads == 0 or tasks > 4 * threads else threads
    library: Any = _library()
    return not library.convolve(
        ctypes.byref(geometry),
        *map(ctypes.c_void_p, map(_address, (weights, ends, bias, x, residual, out))),
        ctypes.c_void_p(_scratch(threads * g.scratch)),
        relu,
        ctypes.c_int64(parts),
        min(threads, tasks * parts),
    )


def _convolution(
    x: Tensor,
    nonzeros: Nonzeros,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shape: Sequence[int],
    settings: Settings,
) -> Tensor:
    fits = x.ndim == 4 and x.shape[1] == shape[1] * settings.groups
    if fits and _is_fast(nonzeros.values, x, residual):
        out = _empty_output(x, shape, settings)
        if residual is not None and residual.stride() != out.stride():
            residual = torch.empty_like(out).copy_(residual)
        geometry = _plan(
            nonzeros, (x.shape, x.stride()), lambda: _geometry(x, out, shape, settings)
        )
        key = geometry.rows, geometry.columns
        weights = _plan(nonzeros, key, lambda: _arranged(nonzeros, geometry, shape, settings))
        if _convolve(geometry, weights, nonzeros.ends, bias, x, residual, out, relu):
            return out
    dense = F.conv2d(x, nonzeros.dense(*shape), bias, *settings)
    dense = dense if residual is None else dense + residual
    return dense.relu() if relu else dense


def _empty_output(x: Tensor, shape: Sequence[int], settings: Settings) -> Tensor:
    """Room for (images, channels, height, width), the images innermost."""
    pixels = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            x.shape[2:], shape[2:], *settings[:3], strict=True
        )
    ]
    if min(pixels) < 1:
        raise ValueError(f"An image {tuple(x.shape[2:])} is too small for a kernel {shape[2:]}")
    return x.new_empty(shape[0], *pixels, x.shape[0]).permute(3, 0, 1, 2)


def _geometry(x: Tensor, out: Tensor, shape: Sequence[int], settings: Settings) -> Geometry:
    chunk = min(len(x), LANES)
    phases, extra = [], []
    for kernel, stride, dilation in zip(shape[2:], settings.stride, settings.dilation, strict=True):
        phases.append(1 + max(k * dilation % stride for k in range(kernel)))
        extra.append((kernel - 1) * dilation // stride)
    columns = out.shape[3] + extra[1]
    row = x.shape[1] * phases[0] * phases[1] * columns * chunk
    bands = -(-out.shape[2] // max(PART // row - extra[0], 1))
    band = -(-out.shape[2] // bands)
    strides = (x.stride(0) if len(x) > 1 else 1, *x.stride()[1:])
    sizes = x.shape, strides, out.shape[1:], out.stride(), settings.stride, settings.padding
    copied = row * (band + extra[0])
    scratch = _up(copied) + GAP + band * _up(out.shape[3] * chunk)
    rest = *phases, band + extra[0], columns, chunk, band, False, scratch
    return Geometry(*chain(*sizes), *rest)


def _arranged(
    nonzeros: Nonzeros, geometry: Geometry, shape: Sequence[int], settings: Settings
) -> Tensor:
    """The weights, with their places in a part of the input."""
    outputs, inputs, _, kernel_width = shape
    stride, dilation, g = settings.stride, settings.dilation, geometry
    places = nonzeros.places.long()
    channel, tap = places // math.prod(shape[2:]), places % math.prod(shape[2:])
    channel = channel + nonzeros.rows() // (outputs // settings.groups) * inputs
    row, column = tap // kernel_width * dilation[0], tap % kernel_width * dilation[1]
    line = (channel * g.row_phases + row % stride[0]) * g.rows + row // stride[0]
    line = line * g.column_phases + column % stride[1]
    return _placed(nonzeros, line * g.columns + column // stride[1])


# In a compiled or exported graph, a layer is one of these operations. torch 2.4 does not read their
# schemas from annotations like these.
@torch.library.custom_op(
    "pnorm_decay::sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor places, Tensor ends, Tensor? bias, int columns) "
    "-> Tensor",
)
def _linear_op(
    x: Tensor, values: Tensor, places: Tensor, ends: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    return _linear(x, Nonzeros(values, places, ends), bias, columns)


@_linear_op.register_fake
def _(
    x: Tensor, values: Tensor, places: Tensor, ends: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(ends))


@torch.library.custom_op(
    "pnorm_decay::sparse_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor places, Tensor ends, Tensor? bias, Tensor? residual, "
    "bool relu, int[] shape, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
)
def _convolution_op(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    nonzeros, settings = Nonzeros(values, places, ends), Settings(stride, padding, dilation, groups)
    out = _convolution(x, nonzeros, bias, residual, relu, shape, settings)
    promised = _empty_output(x, shape, settings)
    return out if out.stride() == promised.stride() else promised.copy_(out)


@_convolution_op.register_fake
def _(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return _empty_output(x, shape, Settings(stride, padding, dilation, groups))


class InBfloat16(nn.Module):
    """A module computed in bf16; what comes in and out keeps its type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.bfloat16()

    def forward(self, *args: Any, **names: Any) -> Any:
        args, names = _to(torch.bfloat16, (args, names))
        return _to(torch.float32, self.module(*args, **names))


class InParts(nn.Module):
    """A module that reads a batch 16 items at a time, so that what lies between stays in the cache.

    Args:
        module: from one tensor to one tensor, items first, where no item matters to another. It
            gets whole whatever is not one tensor without a name.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **names: Any) -> Any:
        if _is_traced() or names or len(args) != 1 or len(args[0]) <= LANES:
            return self.module(*args, **names)
        return torch.cat([self.module(part) for part in args[0].split(LANES)])


def _call(model: nn.Module, args: tuple[Any, ...]) -> Any:
    return model(*fresh(args))


def _to(dtype: torch.dtype, values: Any) -> Any:
    """Floating-point tensors, as another type."""
    return tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values
    )


def sparse_inference(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, allow_bf16: bool = False
) -> nn.Module:
    """A copy of a model for inference, in which sparse layers are those of their non-zeros alone.

    Each `nn.Linear` and `nn.Conv2d` with at least 40 % of zeros is timed within the model, at the
    example's shape and with the present number of threads, dense and sparse, and the faster one
    stays. Where torch.fx can trace a model with convolutions, a batch norm that follows one is
    folded into it, and sparse ones take over the addition and the ReLU behind them. The
    whole is then timed against the dense model, `channels_last` too, and the fastest is returned;
    of more than 16 images it may read 16 at a time, where that leaves the outputs as they are.
    For this repository's `GPT` and one token as example, what counts is `generate`'s time.
    Logged (INFO, `pnorm_decay.deploy`) is what was faster where.

    What comes back is to be called as the model is. It may be of another class: a
    `torch.fx.GraphModule`, or a wrapper. Nothing is traced, nor folded, where a module has hooks.
    Of branches in the model's code, a traced one may have only those that the example takes. The
    outputs are equal up to rounding, NaN and infinity included. The weights of the sparse layers
    are buffers; nothing in the copy needs gradients. `torch.compile` and `torch.export` see one
    operation a layer; a program that was exported runs where this module has been imported.

    Args:
        model: on the CPU, in fp32; it is not changed. Layers in other types stay as they are, and
            so do subclasses, layers with hooks or NaN weights, and paddings other than zeros.
        example: what the model is called with, or a tuple of arguments. Another shape later on
            gives the same outputs, but may be slower than dense.
        allow_bf16: also try dense layers in bf16, and the whole dense model; where that is faster
            than all else, numbers have 8 bits there. Text is always written in fp32.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model is not on the CPU, cannot be copied, or does not take the example.
        RuntimeError: a sparse layer's output is not the dense one's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparse_inference takes a module, not a {type(model).__name__}")
    if any(not tensor.is_cpu for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("sparse_inference is for models on the CPU; call model.cpu() first.")
    args = example if isinstance(example, tuple) else (example,)
    given = copied(model).eval().requires_grad_(False)
    with torch.no_grad():
        try:
            expected = given(*fresh(args))
        except Exception as error:  # of any kind, for whatever the model does
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"The model does not take the example: {reason}") from error
        restore_buffers(given, model)
        if _library() is None:
            return given
        base = _folded(given, args, expected)
        candidates = {name: sparse for name, layer in _eligible(base) if (sparse := _sparse(layer))}
        if not candidates:
            warnings.warn(
                "Nothing is gained: no linear layer or convolution in fp32 has 40 % of zeros (but "
                "for those with hooks, such as masks of torch.nn.utils.prune, NaN or infinity).",
                stacklevel=2,
            )
            return given
        forms = {"dense": given} | _sparse_forms(base, candidates, args, expected, allow_bf16)
        # `generate` reads the GPT itself, not what wraps it in bf16.
        forms |= _dense_forms(base, allow_bf16 and TEXT not in forms)
        seconds = _alternate(
            {
                name: _text_step(form, args) or partial(_call, form, args)
                for name, form in forms.items()
            }
        )
    for name, taken in seconds.items():
        logger.info("The whole, %s: %.3f ms", name, 1e3 * taken)
    best = min(seconds, key=lambda name: seconds[name])
    whole = forms[best]
    restore_buffers(whole.module if isinstance(whole, InParts | InBfloat16) else whole, model)
    if not any(isinstance(module, _Sparse) for module in forms[best].modules()):
        warnings.warn(
            f"Nothing is gained by leaving zeros out: {best} is fastest here.", stacklevel=2
        )
    return forms[best]


def _sparse_forms(
    base: nn.Module,
    candidates: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    expected: Any,
    allow_bf16: bool,
) -> dict[str, nn.Module]:
    """The model with sparse layers where they are faster, whole and in parts; {} if none is."""
    everything = _with(base, candidates)
    if _text_step(everything, args):  # no layer runs alone
        _check("The model", _call(everything, args), expected, 1e-3)
        return {TEXT: everything}
    has_parts = _has_parts(candidates, args, expected)
    measured = (args[0][:LANES],) if has_parts else args
    chosen = _faster_layers(base, candidates, measured, allow_bf16)
    if not chosen:
        return {}
    mixed, tolerance = _fused(_with(base, chosen), measured), 0.1 if allow_bf16 else 1e-3
    _check("The model", _call(mixed, args), expected, tolerance)
    in_parts = InParts(mixed)
    if has_parts and _is_equal(_call(in_parts, args), expected, tolerance):
        return {"mixed": mixed, "mixed, 16 at a time": in_parts}
    return {"mixed": mixed}


def _dense_forms(base: nn.Module, allow_bf16: bool) -> dict[str, nn.Module]:
    """What torch offers besides the model as it is."""
    forms: dict[str, nn.Module] = {}
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in base.modules())
    if has_convolutions:
        forms |= {"dense folded": base, "dense channels_last": _channels_last(base)}
    if allow_bf16:
        forms["dense bf16"] = InBfloat16(copy.deepcopy(base))
    if allow_bf16 and has_convolutions:
        forms["dense channels_last bf16"] = InBfloat16(_channels_last(base))
    return forms


def _text_step(model: nn.Module, args: tuple[Any, ...]) -> Callable[[], object] | None:
    """What `generate` does for a token in compiled code; None where it does not, or for more."""
    from pnorm_decay.deploy.generation import compiled_step  # it imports this module
    from pnorm_decay.models.gpt import GPT

    if not isinstance(model, GPT) or len(args) != 1 or args[0].numel() != 1:
        return None
    step = compiled_step(model, model.new_cache())
    return step and partial(step, int(args[0]), 0)


def _has_parts(layers: Mapping[str, nn.Module], args: tuple[Any, ...], expected: Any) -> bool:
    """Whether the example is a large batch, and there are convolutions that could read parts."""
    return (
        any(isinstance(layer, SparseConv2d) for layer in layers.values())
        and len(args) == 1
        and all(isinstance(x, Tensor) and x.ndim > 0 for x in (args[0], expected))
        and len(args[0]) == len(expected) > LANES
    )


def _folded(model: nn.Module, args: tuple[Any, ...], expected: Any) -> nn.Module:
    """The model with batch norms folded into convolutions, itself where that cannot be done."""
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if not has_convolutions or any(map(has_hooks, model.modules())):
        return model
    try:
        folded = fuse(model).requires_grad_(False)
        # torch's folding is wrong where two batch norms follow one convolution.
        _check("The folded model", _call(folded, args), expected, 1e-3)
    except Exception as error:  # what a model's own code does with torch.fx's proxies
        logger.info("Nothing is folded: %s", error)
        return model
    return folded


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its `forward`."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _eligible(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        if name and type(layer) in (nn.Linear, nn.Conv2d) and not has_hooks(layer):
            weight = layer.weight
            zeros = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
            # NaN times the zeros of the padding is NaN; what torch's convolution does is its own.
            is_plain = weight.dtype == torch.float32 and bool(weight.isfinite().all())
            if zeros >= FEWEST_ZEROS and is_plain:
                yield name, layer


def _sparse(layer: Any) -> _Sparse | None:
    """The sparse form of a dense layer, None where there is none."""
    if isinstance(layer, nn.Linear):
        return SparseLinear(layer.weight, layer.bias)
    padding = layer.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        sums = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = None if any(total % 2 for total in sums) else tuple(t // 2 for t in sums)
    if padding is None or layer.padding_mode != "zeros":
        return None
    return SparseConv2d(layer, padding)


def _with(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a model with other layers in places."""
    model = copy.deepcopy(model)
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return model


def _channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def _faster_layers(
    base: nn.Module, sparse: Mapping[str, nn.Module], args: tuple[Any, ...], allow_bf16: bool
) -> dict[str, nn.Module]:
    """Those layers that are faster than the model's own."""
    forms: dict[str, Mapping[str, nn.Module]] = {"sparse": sparse}
    if allow_bf16:
        dense = {name: base.get_submodule(name) for name in sparse}
        forms["bf16"] = {name: InBfloat16(copy.deepcopy(layer)) for name, layer in dense.items()}
    models = {"dense": base} | {form: _with(base, layers) for form, layers in forms.items()}
    with _checked(models["sparse"], sparse):
        _call(models["sparse"], args)
    times: dict[str, dict[str, list[float]]] = {form: {} for form in models}

    def timed(form: str) -> Callable[[], object]:
        def run() -> None:
            with _timed(models[form], sparse) as seconds:
                _call(models[form], args)
            for name, taken in seconds.items():
                times[form].setdefault(name, []).append(taken)

        return run

    _alternate({form: timed(form) for form in models})
    chosen = {}
    for name in times["dense"]:
        least = {form: _least(times[form][name]) for form in models}
        best = min(least, key=lambda form: least[form])
        listed = ", ".join(f"{form} {1e6 * taken:.0f}" for form, taken in least.items())
        logger.info("%s: %s microseconds", name, listed)
        if best != "dense":
            chosen[name] = forms[best][name]
    return chosen


def _alternate(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least seconds of some functions that take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for count in range(1 + MOST_RUNS):
        if count > FEWEST_RUNS and time.perf_counter() - begun > SECONDS * len(runs):
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if count:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: _least(taken) for name, taken in times.items()}


def _least(times: list[float]) -> float:
    """What else the machine does can only add to a time."""
    return min(times)


@contextmanager
def _timed(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, float]]:
    """Inside the block, the seconds that each of these layers takes are added up."""
    seconds: dict[str, float] = {}
    begun: dict[str, float] = {}
    handles = []
    for name in names:

        def before(layer: nn.Module, inputs: Any, name: str = name) -> None:
            begun[name] = time.perf_counter()

        def after(layer: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - begun[name]

        layer = model.get_submodule(name)
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _checked(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside the block, each of these sparse layers is compared with its dense form."""
    handles = []
    for name in names:

        def compare(layer: Any, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            if isinstance(layer, SparseLinear):
                expected = F.linear(*inputs, layer.weight, layer.bias)
            else:
                expected = F.conv2d(*inputs, layer.weight, layer.bias, *layer.settings)
            _check(f"The sparse layer {name}", output, expected, 1e-4)

        handles.append(model.get_submodule(name).register_forward_hook(compare))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_equal(outputs: Any, expected: Any, tolerance: float) -> bool:
    """Whether outputs differ by no more than a share of the largest one."""
    for ours, theirs in zip(tree_leaves(outputs), tree_leaves(expected), strict=True):
        if isinstance(theirs, Tensor) and theirs.is_floating_point() and theirs.numel():
            sizes = theirs[theirs.isfinite()].abs()
            allowed = tolerance * float(sizes.max()) if sizes.numel() else 0.0
            if ours.shape != theirs.shape or not torch.allclose(
                ours, theirs, rtol=tolerance, atol=allowed, equal_nan=True
            ):
                return False
    return True


def _check(what: str, outputs: Any, expected: Any, tolerance: float) -> None:
    """Raises RuntimeError where outputs are not equal."""
    if not _is_equal(outputs, expected, tolerance):
        raise RuntimeError(f"{what} differs from the dense one by more than rounding.")


def _fused(model: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    """The model, its sparse convolutions with the addition and the ReLU that follow them."""
    if not isinstance(model, fx.GraphModule):
        return model
    ShapeProp(model).propagate(*fresh(args))
    calls = [node.target for node in model.graph.nodes if node.op == "call_module"]
    place = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in list(model.graph.nodes):
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, SparseConv2d) or calls.count(node.target) > 1:
            continue
        follower = _only_user(node)
        other = _other_summand(node, follower)
        if follower is not None and other is not None and place[other] < place[follower]:
            with model.graph.inserting_before(follower):
                joined = model.graph.call_module(node.target, (*node.args, other))
            joined.meta, place[joined] = follower.meta, place[follower]
            follower.replace_all_uses_with(joined)
            model.graph.erase_node(follower)
            model.graph.erase_node(node)
            node, follower = joined, _only_user(joined)
        if follower is not None and _is_relu(model, follower):
            layer.relu = True
            follower.replace_all_uses_with(node)
            model.graph.erase_node(follower)
    model.graph.lint()
    model.recompile()
    return model


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_")


def _other_summand(node: fx.Node, addition: fx.Node | None) -> fx.Node | None:
    """What a plain addition adds to a node, of the same shape; None where it is something else."""
    if addition is None or addition.target not in ADDITIONS or addition.kwargs:
        return None
    others = [part for part in addition.args if part is not node]
    if len(addition.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    shapes = [getattr(part.meta.get("tensor_meta"), "shape", None) for part in (node, others[0])]
    return others[0] if shapes[0] == shapes[1] else None


def _is_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) is nn.ReLU
    return node.target in RELUS
