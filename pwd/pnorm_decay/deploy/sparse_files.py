"""Sparse files: a state dict in about as many bytes as its zeros leave, without a bit lost.

A sparse file is a safetensors file of two arrays of bytes: `data`, and `index`, which says where in
`data` each tensor lies. A tensor that gains nothing lies there as it is. Of another there are the
places and the values of what is not zero, as zstandard frames: the places as a bit a number or as
the gaps between them (of one byte or two, whose largest number goes on to the next), whichever is
smaller, and the values as byte planes, because signs and exponents compress and the last bits of
mantissas do not. "Zero" means all bits zero: -0.0 is a value, and a bit for each zero's sign is
what many of them cost.

The index is JSON in a zstandard frame, because the names and shapes of a hundred small tensors take
more than a sparse network's weights:

    {"layer.weight": {"at": 0, "dtype": "float32", "shape": [64, 64, 3, 3], "crc32": 123,
                      "places": "gaps8", "parts": [812, 640, 640, 640, 551]},
     "layer.bias": {"at": 3283, "dtype": "float32", "shape": [64], "crc32": 123},
     "head.weight": "layer.weight"}

`parts` are the frames' lengths in bytes, the places' and then the values', lowest byte first. The
third is one tensor under two names.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pnorm_decay.files import atomic_write, regular_size
from pnorm_decay.optim.layout import PLAIN, local_part, whole

FORMAT = "pnorm_decay.sparse"
VERSION = "1"
# On random zeros the higher levels gain at most 1 % and take ten to a hundred times as long.
LEVEL = 1
INDEX_LEVEL = 19
SPECIFICATION_BYTES = 24  # about what the places and parts of a tensor take in the index
MOST_GAPS = 0.4  # above this density a bit a number is always smaller than a gap a value
MOST_NEGATIVE_ZEROS = 0.01
FREE_BYTES = 2**30
MOST_EXPANSION = 1000
FREE_INDEX_BYTES = 2**20
MOST_INDEX_BYTES = 2**26
GAPS: dict[str, np.dtype[Any]] = {"gaps8": np.dtype("u1"), "gaps16": np.dtype("<u2")}

Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)


class SparseFileError(ValueError):
    """A file is no sparse file, is damaged, or does not fit the model."""


def save_sparse(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    values: str | None = None,
) -> None:
    """Writes a state dict as a sparse file, tensor by tensor and atomically.

    Of DTensors, every process has to call it; each tensor is gathered as it is written, and the
    process of rank 0 alone writes.

    Args:
        model_or_state_dict: a module, or tensors of any dtype and shape by name. Names of the same
            tensor stay names of one tensor.
        path: the file; its folder is made where it is missing.
        values: None keeps every bit; "bf16" rounds float32 and float64 tensors of two or more
            dimensions to bfloat16, of which the file then holds two bytes a value. They are
            loaded in their own dtype. -0.0 becomes 0.0.

    Raises:
        ValueError: `values` is something else, or rounding to bfloat16 would overflow.
        TypeError: this is no module and no mapping, or an entry is no tensor, or one of a kind
            without plain memory: quantized, sparse layouts, meta tensors and tensor subclasses
            other than DTensor.
        OSError: the file cannot be written; what was at `path` stays.
    """
    if values not in (None, "bf16"):
        raise ValueError(f'values must be None or "bf16", got {values!r}')
    tensors: Any = model_or_state_dict
    if isinstance(tensors, nn.Module):
        tensors = tensors.state_dict()
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"save_sparse writes a module or tensors by name, not a {type(tensors).__name__}"
        )
    tensors = dict(tensors)  # a mapping may make its tensors anew whenever it is asked
    for name, tensor in tensors.items():
        _check_plain(name, tensor)
    if any(type(tensor) not in PLAIN for tensor in tensors.values()):
        import torch.distributed

        if torch.distributed.get_rank() > 0:
            for tensor in tensors.values():
                whole(tensor)
            return
    # The header stands first and is known last; the temporary file is as small as the result.
    with atomic_write(Path(path)) as file, tempfile.TemporaryFile(dir=Path(path).parent) as data:
        index = _write_data(data, tensors, values == "bf16")
        file.write(_header(data.tell(), index))
        data.seek(0)
        shutil.copyfileobj(data, file)
        file.write(index)


def load_sparse(
    path: str | Path,
    into: nn.Module | None = None,
    *,
    names: Iterable[str] | None = None,
    max_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Reads a sparse file, which may come from a stranger: nothing in it is executed.

    What the file declares is checked before memory is taken for it, and each tensor against its
    checksum. The checksum finds damage; it does not prove who wrote the file.

    Args:
        path: a file that `save_sparse` wrote.
        into: a module that takes the tensors over, in its own dtypes; all of its names and shapes
            must be the file's.
        names: the tensors to read, or the one, without reading the others; default all.
        max_bytes: the most bytes of memory that the tensors may take together. By default 1 GiB or
            a thousand times the file's size, whichever is more.

    Returns:
        The tensors by name, in their order, dtype and shape, on the CPU.

    Raises:
        SparseFileError: the file is no sparse file, cut off, changed or larger than allowed, or it
            does not fit the module, whose first such tensor is named.
        KeyError: `names` has a name that the file has not.
        ValueError: both `into` and `names` are given, or `into` has no memory yet: it is on the
            meta device or has lazy layers.
        TypeError: `into` is no module.
        OSError: the file cannot be read.
    """
    if into is not None and names is not None:
        raise ValueError("load_sparse takes into or names: a module takes all tensors over")
    if into is not None:
        _check_takes_tensors(into)
    names = [names] if isinstance(names, str) else names
    path = Path(path)
    size = regular_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            entries = _entries(file)
            if into is not None:
                _check_fit(entries, into)
            chosen = list(entries) if names is None else list(names)
            if unknown := [name for name in chosen if name not in entries]:
                raise KeyError(f"{path} has no tensor {unknown[0]!r}")
            needed = dict.fromkeys(entries[name].stored_as for name in chosen)
            if max_bytes is None:
                max_bytes = max(FREE_BYTES, MOST_EXPANSION * size)
            declared = sum(entries[name].bytes for name in needed)
            if declared > max_bytes:
                raise SparseFileError(
                    f"its {size:,} bytes declare tensors of {declared:,} bytes; "
                    f"pass max_bytes={declared} if you trust it"
                )
            data = _bytes(file, "data")
            loaded = {name: _read(data, name, entries[name]) for name in needed}
    except (KeyError, OSError):
        raise
    except SafetensorError as error:
        raise SparseFileError(f"{path}: cut off or no safetensors file: {error}") from error
    except SparseFileError as error:
        raise SparseFileError(f"{path}: {error}") from error
    state = {name: loaded[entries[name].stored_as] for name in chosen}
    if into is not None:
        into.load_state_dict(state)
    return state


@dataclass(frozen=True)
class Entry:
    """What a file declares of a tensor; `stored_as` is its name or, of a shared one, the first."""

    stored_as: str
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: torch.dtype
    crc32: int
    places: str | None
    parts: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Of its part of the data, in bytes."""
        return sum(self.parts) if self.places else self.numbers * self.stored.itemsize

    @property
    def bytes(self) -> int:
        """Of memory while and after it is read."""
        loaded, stored = self.dtype.itemsize, self.stored.itemsize
        return self.numbers * (loaded if self.dtype == self.stored else loaded + stored)


def _check_takes_tensors(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"load_sparse loads into a module, not into a {type(module).__name__}")
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} is lazy; call the module on an example first")
        if tensor.is_meta:
            raise ValueError(
                f'{name!r} has no memory yet; call module.to_empty(device="cpu") first'
            )


def _check_plain(name: Any, tensor: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"the name {name!r} is no string")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} is no tensor but a {type(tensor).__name__}")
    local = local_part(tensor)
    if type(local) not in PLAIN:
        raise TypeError(f"{name!r} is a {type(tensor).__name__}, which has no plain memory")
    if local.is_quantized or local.is_meta or local.layout != torch.strided:
        kind = "quantized" if local.is_quantized else "meta" if local.is_meta else local.layout
        raise TypeError(f"{name!r} is a {kind} tensor, which has no plain memory")


# ---------------------------------------------------------------------------- writing


def _write_data(data: BinaryIO, tensors: Mapping[str, Tensor], round_values: bool) -> bytes:
    """Writes every tensor's bytes and returns the index of them."""
    specifications: dict[str, Any] = {}
    first_names: dict[Any, str] = {}
    for name, tensor in tensors.items():
        local = local_part(tensor)
        identity = (
            *(local.data_ptr(), local.shape, local.stride(), local.dtype, local.device),
            *(local.is_conj(), local.is_neg()),
        )
        tensor = whole(tensor)  # a shared one too, as the other processes do
        if local.numel() and identity in first_names:
            specifications[name] = first_names[identity]
            continue
        first_names[identity] = name
        at = data.tell()
        specification, content = _pack(name, tensor, round_values)
        data.write(content)
        specifications[name] = {"at": at, **specification}
    described = json.dumps(specifications, separators=(",", ":")).encode()
    return zstandard.ZstdCompressor(level=INDEX_LEVEL).compress(described)


def _header(data_bytes: int, index: bytes) -> bytes:
    """What a safetensors file begins with."""
    end = data_bytes + len(index)
    header = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "index_crc32": str(zlib.crc32(index)),
        },
        "data": {"dtype": "U8", "shape": [data_bytes], "data_offsets": [0, data_bytes]},
        "index": {"dtype": "U8", "shape": [len(index)], "data_offsets": [data_bytes, end]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pack(name: str, tensor: Tensor, round_values: bool) -> tuple[dict[str, Any], Any]:
    """A tensor's specification and its bytes."""
    dtype = tensor.dtype
    specification: dict[str, Any] = {"dtype": _name(dtype), "shape": list(tensor.shape)}
    if round_values and tensor.ndim >= 2 and dtype in (torch.float32, torch.float64):
        rounded = tensor.to(torch.bfloat16) + 0.0  # -0.0 would cost a bit a zero
        if bool((rounded.isinf() & ~tensor.isinf()).any()):
            raise ValueError(f"{name!r} has values that overflow in bfloat16")
        tensor = rounded
        specification["stored"] = _name(tensor.dtype)
    words = _words(tensor)
    if tensor.is_floating_point():
        negative_zeros = int((words == 1 << (8 * words.itemsize - 1)).sum())
        if negative_zeros > MOST_NEGATIVE_ZEROS * words.size:
            logger.warning(
                f"{name!r} has {negative_zeros:,} zeros of negative sign, which take a bit or two "
                "each to keep: a tensor + 0.0 has none, and the same values"
            )
    content: Any = words.data
    packed = _compress(words)
    if packed is not None:
        places, parts = packed
        content = b"".join(parts)
        specification |= {"places": places, "parts": [len(part) for part in parts]}
    specification["crc32"] = zlib.crc32(content)
    return specification, content


def _words(tensor: Tensor) -> Array:
    """A tensor's elements as little-endian unsigned integers, (n,); complex128 as two each."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    width = min(tensor.dtype.itemsize, 8)
    words = flat.view(torch.uint8).numpy().view(f"u{width}")
    return words if sys.byteorder == "little" else words.byteswap().view(f"<u{width}")


def _compress(words: Array) -> tuple[str, list[bytes]] | None:
    """The kind of places, and the frames of places and values; None where dense is smaller."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    there = words != 0
    positions = np.flatnonzero(there)
    planes = [compressor.compress(plane.data) for plane in _planes(words[positions])]
    candidates = {"mask": [compressor.compress(np.packbits(there).data)]}
    if positions.size <= MOST_GAPS * words.size:
        for kind, dtype in GAPS.items():
            gaps = _gaps(positions, dtype)
            candidates[kind] = [compressor.compress(plane.data) for plane in _planes(gaps)]
    kind = min(candidates, key=lambda kind: sum(map(len, candidates[kind])))
    parts = candidates[kind] + planes
    return (kind, parts) if sum(map(len, parts)) + SPECIFICATION_BYTES < words.nbytes else None


def _gaps(positions: Array, dtype: np.dtype[Any]) -> Array:
    """The zeros before each position; the largest number of the dtype stands for so many more."""
    most = _most(dtype)
    rounds, rest = np.divmod(np.diff(positions, prepend=-1) - 1, most)
    gaps = np.full(len(positions) + int(rounds.sum()), most, dtype)
    gaps[np.cumsum(rounds + 1) - 1] = rest
    return gaps


def _most(dtype: np.dtype[Any]) -> int:
    """The largest number of an unsigned dtype."""
    return 256**dtype.itemsize - 1


def _planes(words: Array) -> list[Array]:
    """The words' first bytes, their second bytes, and so on."""
    parts = words.view(np.uint8).reshape(len(words), words.itemsize)
    return [np.ascontiguousarray(plane) for plane in parts.T]


# ---------------------------------------------------------------------------- reading


def _bytes(file: Any, name: str) -> Tensor:
    """One of the two arrays; they lie in the file's memory map and are read where they are used."""
    content = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
    if content is None or content.dtype != torch.uint8 or content.ndim != 1:
        raise SparseFileError(f"damaged: it has no array of bytes named {name!r}")
    return content


def _entries(file: Any) -> dict[str, Entry]:
    """What a file declares, checked as far as it can be without reading the tensors."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise SparseFileError("a safetensors file, but none that save_sparse wrote")
    if metadata.get("version") != VERSION:
        raise SparseFileError(
            f"its format has version {metadata.get('version')}, this package reads {VERSION}"
        )
    index = _bytes(file, "index").numpy().data
    if metadata.get("index_crc32") != str(zlib.crc32(index)):
        raise SparseFileError("damaged: its index has a wrong checksum")
    try:
        size = zstandard.frame_content_size(index)
        most = min(MOST_INDEX_BYTES, FREE_INDEX_BYTES + MOST_EXPANSION * len(index))
        if not 0 < size <= most:
            raise ValueError(f"an index of {size} bytes")
        specifications = json.loads(zstandard.ZstdDecompressor().decompress(index))
        alone = {n: _entry(n, s) for n, s in specifications.items() if isinstance(s, dict)}
        return {
            name: alone[name if isinstance(specification, dict) else specification]
            for name, specification in specifications.items()
        }
    except (
        ValueError, KeyError, TypeError, AttributeError, RecursionError, zstandard.ZstdError
    ) as error:  # fmt: skip
        raise SparseFileError("its index is malformed") from error


def _entry(name: str, specification: dict[str, Any]) -> Entry:
    places = specification.get("places")
    numbers = [specification["at"], specification["crc32"]]
    numbers += [*specification["shape"], *specification.get("parts", [])]
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise ValueError("not a size")
    if places not in (None, "mask", *GAPS):
        raise ValueError("not a kind of places")
    return Entry(
        stored_as=name,
        at=specification["at"],
        dtype=_dtype(specification["dtype"]),
        shape=tuple(specification["shape"]),
        stored=_dtype(specification.get("stored", specification["dtype"])),
        crc32=specification["crc32"],
        places=places,
        parts=tuple(specification.get("parts", [])),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    quantized = name.startswith("q")
    if not isinstance(dtype, torch.dtype) or _name(dtype) != name or quantized:
        raise ValueError(f"no dtype: {name}")
    return dtype


def _check_fit(entries: Mapping[str, Entry], model: nn.Module) -> None:
    state = model.state_dict()
    kind = type(model).__name__
    for name, tensor in state.items():
        if name not in entries:
            raise SparseFileError(f"does not fit {kind}: it has no tensor {name!r}")
        if entries[name].shape != tuple(tensor.shape):
            raise SparseFileError(
                f"does not fit {kind}: {name!r} has shape {list(entries[name].shape)}, "
                f"the model's has {list(tensor.shape)}"
            )
    if extra := [name for name in entries if name not in state]:
        raise SparseFileError(f"does not fit {kind}, which has no tensor {extra[0]!r}")


def _read(data: Tensor, name: str, entry: Entry) -> Tensor:
    try:
        _check(entry.at + entry.length <= len(data))
        content = data[entry.at : entry.at + entry.length]
        _check(zlib.crc32(content.numpy().data) == entry.crc32)
        if entry.places is None:  # a copy, because the file may change
            tensor = _tensor(content.clone().numpy(), entry)
        else:
            tensor = _decompress(content.numpy(), entry)
        if entry.stored == torch.bool:  # torch takes it for granted
            _check(bool((tensor.view(torch.uint8) <= 1).all()))
        return tensor.to(entry.dtype)
    except (ValueError, RuntimeError, zstandard.ZstdError) as error:
        raise SparseFileError(f"the tensor {name!r} is damaged") from error


def _tensor(content: Array, entry: Entry) -> Tensor:
    """The tensor whose little-endian bytes these are."""
    if not content.size:  # NumPy's empty arrays have strides that torch does not view
        return torch.empty(entry.shape, dtype=entry.stored)
    if sys.byteorder != "little":
        content = content.view(f"u{min(entry.stored.itemsize, 8)}").byteswap().view(np.uint8)
    return torch.from_numpy(content).view(entry.stored).reshape(entry.shape)


def _decompress(data: Array, entry: Entry) -> Tensor:
    width = min(entry.stored.itemsize, 8)
    words = entry.numbers * entry.stored.itemsize // width
    assert entry.places is not None
    place_parts = 1 if entry.places == "mask" else GAPS[entry.places].itemsize
    ends = list(itertools.accumulate(entry.parts, initial=0))
    _check(len(entry.parts) == place_parts + width)
    frames = [data.data[start:end] for start, end in itertools.pairwise(ends)]
    sizes = [zstandard.frame_content_size(frame) for frame in frames]
    count = sizes[-1]
    _check(0 <= count <= words and set(sizes[place_parts:]) == {count})
    _check(len(set(sizes[:place_parts])) == 1)
    if entry.places == "mask":
        _check(sizes[0] == -(-words // 8))
    else:
        most = _most(GAPS[entry.places])
        _check(count <= sizes[0] <= count + words // most)
    decompressor = zstandard.ZstdDecompressor()
    planes = [np.frombuffer(decompressor.decompress(frame), np.uint8) for frame in frames]
    values = _join(planes[place_parts:], np.dtype(f"<u{width}"))
    if entry.places == "mask":
        # Positions are several times as fast as the mask itself as an index.
        positions = np.flatnonzero(np.unpackbits(planes[0], count=words).view(bool))
    else:
        gaps = _join(planes[:place_parts], GAPS[entry.places])
        is_last = gaps != most
        positions = np.cumsum(gaps + is_last, dtype=np.int64)[is_last] - 1
    _check(len(positions) == count and (count == 0 or int(positions[-1]) < words))
    out = np.zeros(words, values.dtype)
    out[positions] = values
    return _tensor(out.view(np.uint8), entry)


def _join(planes: list[Array], dtype: np.dtype[Any]) -> Array:
    """The words that `_planes` took apart."""
    joined = np.empty((planes[0].size, len(planes)), np.uint8)
    for index, plane in enumerate(planes):
        joined[:, index] = plane
    return joined.reshape(-1).view(dtype)


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError("not what was declared")
