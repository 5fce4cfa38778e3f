from __future__ import annotations

import json
import math
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Mapping

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard

from conftest import REPOSITORY
from pnorm_decay.deploy import SparseFileError, load_sparse, save_sparse, sparse_files
from pnorm_decay.models import GPT, ResNet18

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [
    *FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours, theirs) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(ours[name]) == bits(tensor), name


def random_zeros(model: nn.Module, density: float) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight[torch.rand(weight.shape, generator=generator) >= density] = 0
    return model


def entropy_bound(state) -> float:
    """Bytes: H(density) bits a weight for the places, and the values."""
    total = 0.0
    for tensor in state.values():
        count, size = int((tensor != 0).sum()), tensor.numel()
        if tensor.ndim < 2 or count in (0, size):
            total += tensor.numel() * tensor.itemsize
            continue
        d = count / size
        total += (
            count * tensor.itemsize - size * (d * math.log2(d) + (1 - d) * math.log2(1 - d)) / 8
        )
    return total


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_bit_of_every_state_dict_comes_back(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    state = {}
    for index in range(data.draw(st.integers(0, 4))):
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 300]), max_size=3))
        shape = shape if math.prod(shape) < 2**17 else shape[:1]
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        # Any bits: NaNs with payloads, negative zeros, infinities and subnormals among them.
        raw = rng.integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        raw = raw.reshape(-1, dtype.itemsize)
        raw[rng.random(len(raw)) < data.draw(st.sampled_from([0, 0.3, 0.9, 0.999, 1]))] = 0
        raw = raw & 1 if dtype == torch.bool else raw
        state[f"tensor.{index}"] = torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(shape)
    save_sparse(state, path)
    assert_same(load_sparse(path), state)


@pytest.mark.parametrize("kind", ["mask", "gaps8", "gaps16"])
def test_each_kind_of_places(tmp_path, kind):
    density = {"mask": 0.5, "gaps8": 0.02, "gaps16": 0.0005}[kind]
    weight = torch.zeros(2**20)
    places = torch.randperm(2**20)[: int(density * 2**20)]
    weight[places] = torch.randn(len(places))
    # The longest gap, exact multiples of what a gap can hold, and both ends.
    for place in (0, 254, 254 + 256, 2**18, 2**18 + 65535, 2**18 + 65535 + 65536, 2**20 - 1):
        weight[place] = 1.0
    save_sparse({"w": weight}, tmp_path / "x")
    assert described(tmp_path / "x")["w"]["places"] == kind
    assert torch.equal(load_sparse(tmp_path / "x")["w"], weight)


def test_special_values_keep_their_bits(tmp_path, caplog):
    words = [0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 1, 0x80000001] + [0] * 1000
    weight = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)
    save_sparse({"w": weight}, tmp_path / "x")
    assert bits(load_sparse(tmp_path / "x")["w"]) == bits(weight)
    assert not caplog.records


def test_masks_that_leave_negative_zeros_are_told(tmp_path, caplog):
    weight = torch.randn(1000) * (torch.rand(1000) < 0.1)
    save_sparse({"w": weight}, tmp_path / "x")
    assert "'w' has" in caplog.text
    assert "zeros of negative sign" in caplog.text
    assert bits(load_sparse(tmp_path / "x")["w"]) == bits(weight)


def test_shared_tensors_stay_one_and_views_of_one_storage_do_not(tmp_path):
    base = torch.randn(6, 4)
    state = {"b": base, "a": base, "row": base[0], "transposed": base.T, "again": base[0]}
    save_sparse(state, tmp_path / "x")
    loaded = load_sparse(tmp_path / "x")
    assert_same(loaded, state)
    assert loaded["a"] is loaded["b"]
    assert loaded["row"] is loaded["again"]
    assert loaded["row"] is not loaded["b"]
    one = load_sparse(tmp_path / "x", names=["a"])
    assert list(one) == ["a"]
    assert torch.equal(one["a"], base)


def test_a_model_and_back(tmp_path):
    torch.manual_seed(0)
    model = random_zeros(GPT(65, 2, 2, 32, 16, bias=True), 0.1)
    save_sparse(model, tmp_path / "new folder" / "gpt.safetensors")
    other = GPT(65, 2, 2, 32, 16, bias=True)
    loaded = load_sparse(tmp_path / "new folder" / "gpt.safetensors", into=other)
    assert_same(loaded, dict(model.state_dict()))
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_it_is_a_safetensors_file(tmp_path):
    save_sparse({"a": torch.arange(5), "__metadata__": torch.zeros(0)}, tmp_path / "x")
    arrays = safetensors.torch.load_file(tmp_path / "x")
    assert sorted(arrays) == ["data", "index"]
    assert bits(arrays["data"]) == bits(torch.arange(5))
    assert_same(load_sparse(tmp_path / "x"), {"a": torch.arange(5), "__metadata__": torch.zeros(0)})


def test_a_tensor_without_zeros_is_never_larger_than_dense(tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, 10_000))
    save_sparse({"noise": noise}, tmp_path / "x")
    assert "places" not in described(tmp_path / "x")["noise"]
    assert (tmp_path / "x").stat().st_size < noise.nbytes + 400


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05, 0.02, 0.005])
def test_within_a_tenth_of_the_entropy_bound(tmp_path, density):
    torch.manual_seed(0)
    model = random_zeros(ResNet18(width=32), density)
    save_sparse(model, tmp_path / "x")
    save_sparse(model, tmp_path / "half", values="bf16")
    state = model.state_dict()
    assert (tmp_path / "x").stat().st_size < 1.1 * entropy_bound(state)
    half = {n: t.bfloat16() if t.ndim > 1 else t for n, t in state.items()}
    assert (tmp_path / "half").stat().st_size < 1.1 * entropy_bound(half)


def test_a_resnet18_of_99_5_percent_zeros_is_below_450_kb(tmp_path):
    model = random_zeros(ResNet18(), 0.005)
    save_sparse(model, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size < 450_000


def test_bf16_values_are_the_rounded_ones_in_their_own_dtype(tmp_path):
    state = {
        "w": torch.randn(40, 40) * (torch.rand(40, 40) < 0.1),
        "dense": torch.randn(4, 4).double(),
        "bias": torch.randn(40),
        "steps": torch.tensor(3),
    }
    save_sparse(state, tmp_path / "x", values="bf16")
    loaded = load_sparse(tmp_path / "x")
    for name in ("w", "dense"):
        assert loaded[name].dtype == state[name].dtype
        assert torch.equal(loaded[name], state[name].bfloat16().to(state[name].dtype))
    assert torch.equal(loaded["bias"], state["bias"])
    assert torch.equal(loaded["steps"], state["steps"])


def test_bf16_that_would_overflow(tmp_path):
    state = {"w": torch.full((2, 2), 3.4e38)}
    with pytest.raises(ValueError, match=r"'w'.*overflow"):
        save_sparse(state, tmp_path / "x", values="bf16")
    assert list(tmp_path.iterdir()) == []


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(1, 3))
    model[1].weight = model[0].weight
    return model


def save_sharded(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = tied()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    save_sparse(model, f"{folder}/sharded" if rank == 0 else "/nowhere/that/exists")
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_tensors_are_gathered(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, because two processes that import everything anew take several seconds.
    mp.start_processes(save_sharded, (port, str(tmp_path)), nprocs=2, start_method="fork")
    loaded = load_sparse(tmp_path / "sharded")
    assert_same(loaded, dict(tied().state_dict()))
    assert loaded["0.weight"] is loaded["1.weight"]


# ---------------------------------------------------------------------------- bad inputs


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a", lambda: 3, "'a' is no tensor but a int"),
        ("a", lambda: torch.zeros(2, 2).to_sparse(), "'a' is a torch.sparse_coo tensor"),
        ("a", lambda: torch.empty(2, device="meta"), "'a' is a meta tensor"),
        ("a", lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "a quantized"),
        (3, lambda: torch.zeros(1), "the name 3"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, name, make, message):
    with pytest.raises(TypeError, match=message):
        save_sparse({"fine": torch.zeros(3), name: make()}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_values_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="values must be None"):
        save_sparse({}, tmp_path / "x", values="fp16")


def test_an_old_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "x"
    save_sparse({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="overflow"):
        save_sparse({"a": torch.ones(3), "w": torch.full((2, 2), 3.4e38)}, path, values="bf16")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "x"
    weight = torch.zeros(40, 50)
    weight[::7, ::5] = torch.randn(6, 10)
    state = {"weight": weight, "mask": torch.rand(300) < 0.5, "bias": torch.randn(3), "n": weight}
    save_sparse(state, path)
    return path.read_bytes(), state


def test_a_file_cut_off_anywhere(small_file, tmp_path):
    content, _ = small_file
    path = tmp_path / "x"
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(SparseFileError, match=r"x: "):
            load_sparse(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(SparseFileError, match=r"x: "):
        load_sparse(path)


def test_any_changed_byte_is_found(small_file, tmp_path):
    content, state = small_file
    path = tmp_path / "x"
    found = 0
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1 << index % 8
        path.write_bytes(changed)
        try:
            loaded = load_sparse(path)
        except SparseFileError:
            found += 1
        else:  # a change of white space, or of what a header may have
            assert_same(loaded, state)
    assert found > 0.95 * len(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"PK\x03\x04" + bytes(100), "no safetensors file"),
        (struct.pack("<Q", 2**60) + b"{}", "no safetensors file"),
        (safetensors.torch.save({"a": torch.zeros(2)}), "none that save_sparse wrote"),
        (safetensors.torch.save({}, {"format": sparse_files.FORMAT, "version": "9"}), "version 9"),
    ],
    ids=["empty", "zip", "huge header", "another writer", "newer version"],
)
def test_foreign_files(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SparseFileError, match=message):
        load_sparse(tmp_path / "x")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "x")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(OSError, match="not a regular file"):
        load_sparse(tmp_path / "x")


def described(path) -> dict:
    index = safetensors.torch.load_file(path)["index"].numpy()
    return json.loads(zstandard.ZstdDecompressor().decompress(index.data))


def forge(path, index: bytes, data: bytes = b"") -> None:
    """A file with the right checksum of its index, from a stranger who means harm."""
    metadata = {
        "format": sparse_files.FORMAT,
        "version": sparse_files.VERSION,
        "index_crc32": str(zlib.crc32(index)),
    }
    arrays = {"index": index, "data": data}
    tensors = {n: torch.tensor(list(b), dtype=torch.uint8) for n, b in arrays.items()}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def as_index(specifications: object) -> bytes:
    return zstd(json.dumps(specifications).encode())


def parts_of(*frames: bytes) -> tuple[bytes, dict]:
    content = b"".join(frames)
    return content, {"crc32": zlib.crc32(content), "parts": [len(frame) for frame in frames]}


def zstd(content: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def bomb() -> bytes:
    return zstd(bytes(2**28))


FLOAT = {"at": 0, "dtype": "float32", "shape": [8]}
FOUR = [zstd(b"\1" * 2)] * 4
BAD = {
    "a huge shape": ({"shape": [2**40, 2**40]}, [zstd(b"")] * 5, "gaps8"),
    "a bomb for places": ({}, [bomb(), *FOUR], "gaps8"),
    "a bomb for a mask": ({}, [bomb(), *FOUR], "mask"),
    "bombs for values": ({}, [zstd(b"\0\0"), *[bomb()] * 4], "gaps8"),
    "planes of several sizes": ({}, [zstd(b"\0\0"), zstd(b"\1"), *FOUR[1:]], "gaps8"),
    "a place behind the end": ({}, [zstd(b"\0\7"), *FOUR], "gaps8"),
    "fewer places than values": ({}, [zstd(b"\xff\0"), *FOUR], "gaps8"),
    "a mask of another count": ({}, [zstd(b"\7"), *FOUR], "mask"),
    "too few parts": ({}, [zstd(b"\0\0"), *FOUR[1:]], "gaps8"),
    "no size in the frame": ({}, [zstd(b"\0\0", write_content_size=False), *FOUR], "gaps8"),
    "no frame at all": ({}, [b"abcdefgh", *FOUR], "gaps8"),
    "another kind": ({}, [zstd(b"\0\0"), *FOUR], "gaps99"),
    "no dtype": ({"dtype": "nn"}, [zstd(b"\0\0"), *FOUR], "gaps8"),
    "a quantized dtype": ({"dtype": "qint8"}, [zstd(b"\0\0"), FOUR[0]], "gaps8"),
    "a bool of 2": ({"dtype": "bool"}, [zstd(b"\0\0"), zstd(b"\2\2")], "gaps8"),
    "a negative size": ({"shape": [-8]}, [zstd(b"\0\0"), *FOUR], "gaps8"),
    "a fraction": ({"shape": [8.0]}, [zstd(b"\0\0"), *FOUR], "gaps8"),
    "true for a size": ({"shape": [True]}, [zstd(b"\0"), *[zstd(b"\1")] * 4], "gaps8"),
    "data that are not there": ({"at": 1}, [zstd(b"\0\6"), *FOUR], "gaps8"),
    "too long a dense tensor": ({"shape": [9]}, None, None),
    "huge parts": ({"parts": [2**62] * 5}, [zstd(b"\0\6"), *FOUR], "gaps8"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_mean_harm(tmp_path, name):
    change, frames, places = BAD[name]
    content, specification = parts_of(*(frames or [b"\0" * 32]))
    specification |= FLOAT | change | ({"places": places} if places else {})
    forge(tmp_path / "x", as_index({"w": specification}), content)
    tracemalloc.start()
    with pytest.raises(SparseFileError, match=r"x: "):
        load_sparse(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_the_forger_can_make_a_right_file(tmp_path):
    """Else the cases above would prove nothing."""
    content, specification = parts_of(zstd(b"\0\6"), *FOUR)
    forge(tmp_path / "x", as_index({"w": FLOAT | specification | {"places": "gaps8"}}), content)
    (weight,) = load_sparse(tmp_path / "x").values()
    assert weight.view(torch.int32).tolist() == [0x01010101] + [0] * 6 + [0x01010101]


INDICES = {
    "a list": as_index([]),
    "a number": as_index({"w": 3}),
    "a name of nothing": as_index({"w": "v"}),
    "nothing declared": as_index({"w": {}}),
    "its own name": as_index({"w": "w"}),
    "a ring": as_index({"a": "b", "b": "a"}),
    "no checksum": as_index({"w": FLOAT}),
    "deep": zstd(b"[" * 100_000 + b"]" * 100_000),
    "a bomb": zstd(bytes(2**28)),
    "no size": zstd(b"{}", write_content_size=False),
    "no frame": b"{}",
    "nothing": b"",
    "no text": zstd(b"\xff\xfe"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_of_another_form(tmp_path, name):
    forge(tmp_path / "x", INDICES[name], b"\0" * 32)
    with pytest.raises(SparseFileError, match="index is malformed"):
        load_sparse(tmp_path / "x")


@pytest.mark.parametrize("name", ["index", "data"])
def test_an_array_that_is_missing_or_none_of_bytes(tmp_path, name):
    save_sparse({"w": torch.zeros(0)}, tmp_path / "x")
    metadata = {"format": sparse_files.FORMAT, "version": sparse_files.VERSION}
    metadata["index_crc32"] = str(zlib.crc32(as_index({})))
    arrays = {"index": torch.tensor(list(as_index({})), dtype=torch.uint8), "data": torch.zeros(0)}
    del arrays[name]
    (tmp_path / "x").write_bytes(safetensors.torch.save(arrays, metadata))
    with pytest.raises(
        SparseFileError, match=f"no array of bytes named '{name if name == 'index' else 'data'}'"
    ):
        load_sparse(tmp_path / "x")


def test_a_few_bytes_that_declare_gigabytes(tmp_path):
    content, specification = parts_of(zstd(b""), *[zstd(b"")] * 8)
    specification |= {"at": 0, "dtype": "float64", "shape": [2**28], "places": "gaps8"}
    forge(tmp_path / "x", as_index({"w": specification}), content)
    with pytest.raises(SparseFileError, match=r"max_bytes=2147483648"):
        load_sparse(tmp_path / "x")
    save_sparse({"w": torch.zeros(8)}, tmp_path / "y")
    with pytest.raises(SparseFileError, match=r"max_bytes=32"):
        load_sparse(tmp_path / "y", max_bytes=31)
    assert load_sparse(tmp_path / "y", max_bytes=32)["w"].shape == (8,)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: GPT(65, 2, 2, 32, 16), r"GPT: 'token_embedding.weight' has shape \[9, 8\]"),
        (lambda: GPT(9, 2, 2, 8, 4), r"GPT: it has no tensor 'blocks.1.ln1.weight'"),
        (lambda: nn.Embedding(9, 8), r"Embedding: it has no tensor 'weight'"),
        (lambda: nn.Identity(), r"Identity, which has no tensor 'token_embedding.weight'"),
    ],
)
def test_a_file_of_another_architecture_leaves_the_model_alone(tmp_path, model, message):
    save_sparse(GPT(9, 1, 2, 8, 4), tmp_path / "x")
    other = model()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(SparseFileError, match=message):
        load_sparse(tmp_path / "x", into=other)
    assert_same(dict(other.state_dict()), before)


def test_one_tensor_without_the_others(small_file, tmp_path):
    content, state = small_file
    path = tmp_path / "x"
    path.write_bytes(content)
    # The other tensors may even be damaged.
    at = 8 + int.from_bytes(content[:8], "little") + described(path)["weight"]["at"]
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert torch.equal(load_sparse(path, names=["bias"])["bias"], state["bias"])
    with pytest.raises(SparseFileError, match="'weight' is damaged"):
        load_sparse(path, names=["weight"])
    with pytest.raises(KeyError, match="no tensor 'other'"):
        load_sparse(path, names=["other"])


def test_the_package_needs_neither_training_nor_omegaconf():
    program = (
        "import sys, pnorm_decay.deploy as d; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('omegaconf', 'hydra', 'pandas', "
        "'torch_pruning', 'scipy') "
        "or m.startswith(('pnorm_decay.training', 'pnorm_decay.baselines'))]; "
        "sys.exit(' '.join(bad) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr


def test_a_conjugate_of_the_same_memory_is_a_tensor_of_its_own(tmp_path):
    x = torch.randn(3, dtype=torch.complex64)
    save_sparse({"x": x, "conjugate": x.conj()}, tmp_path / "x")
    assert torch.equal(load_sparse(tmp_path / "x")["conjugate"], x.conj())


def test_a_module_takes_all_tensors_over(tmp_path):
    model = nn.Linear(2, 2)
    save_sparse(model, tmp_path / "x")
    with pytest.raises(ValueError, match="into or names"):
        load_sparse(tmp_path / "x", into=model, names=["weight"])


class Lazy(Mapping):
    """Its tensors are made when they are asked for, perhaps in memory that was used before."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.full((64, 64), float(name))

    def __iter__(self):
        return iter("01234")

    def __len__(self) -> int:
        return 5


def test_a_mapping_that_makes_its_tensors_anew(tmp_path):
    save_sparse(Lazy(), tmp_path / "file")
    assert [float(t[0, 0]) for t in load_sparse(tmp_path / "file").values()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", [[torch.ones(1)], None, torch.ones(1)])
def test_only_modules_and_mappings_are_written(tmp_path, what):
    with pytest.raises(TypeError, match="save_sparse writes a module or tensors by name, not a"):
        save_sparse(what, tmp_path / "file")


def test_what_no_tensors_can_be_loaded_into(tmp_path):
    save_sparse(nn.Linear(3, 2), tmp_path / "file")
    with pytest.raises(TypeError, match="into a module, not into a dict"):
        load_sparse(tmp_path / "file", into={})
    with pytest.raises(ValueError, match="'weight' has no memory yet"):
        load_sparse(tmp_path / "file", into=nn.Linear(3, 2, device="meta"))
    with pytest.raises(ValueError, match="'weight' is lazy"):
        load_sparse(tmp_path / "file", into=nn.LazyLinear(2))
    assert list(load_sparse(tmp_path / "file", names="bias")) == ["bias"]
