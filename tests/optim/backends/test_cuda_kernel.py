"""The CUDA kernel's own code, compiled for the CPU with one thread a block.

It shows that the kernel and the packing of its arguments are right; it does not replace a GPU.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optim.pwd_oracle import EXPONENTS, RECIPES, train_many
from pnorm_decay import AdamPWD
from pnorm_decay.optim.backends import native

SHIM = """
#include <cmath>
using std::exp2; using std::log2; using std::expm1;
#define __CUDACC__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
static inline void __syncthreads() {}
struct Index { unsigned x; };
static Index blockIdx, threadIdx, blockDim;
#include "SOURCE"
extern "C" void run(const Launch *launch, unsigned begin, unsigned end) {
  blockDim.x = 1;
  for (blockIdx.x = begin; blockIdx.x < end; blockIdx.x++) step_cuda(*launch);
}
"""
CPU = torch.device("cpu")


def emulation(source: Path, dtype: torch.dtype, folder: Path) -> ctypes.CDLL:
    """The kernel of a source file: `run(launch, begin, end)` does these thread blocks."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (folder / "shim.cpp").write_text(SHIM.replace("SOURCE", str(source)))
    flags = ["-O1", "-shared", "-fPIC", f"-DSTORAGE={native.STORAGE[dtype]}"]
    command = [compiler, *flags, str(folder / "shim.cpp"), "-o", str(folder / "shim.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


def kernel_of(library: ctypes.CDLL) -> native.Kernel:
    def kernel(records: list[native.Record], options: native.Options) -> None:
        for launch, blocks in native.cuda_launches(records, options):
            library.run(ctypes.byref(launch), 0, blocks)

    return kernel


@pytest.fixture(scope="module", params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.dtype, native.Kernel]:
    library = emulation(native.SOURCE, request.param, tmp_path_factory.mktemp("emulated"))
    return request.param, kernel_of(library)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize(("cls", "options"), RECIPES)
def test_it_does_what_the_cpu_kernel_does(
    emulated: tuple[torch.dtype, native.Kernel],
    monkeypatch: pytest.MonkeyPatch,
    cls: Any,
    options: dict[str, Any],
    p: float,
) -> None:
    if options.get("exact") and p > 2:
        pytest.skip("the exact step has p up to 2")
    dtype, kernel = emulated
    expected = train_many(cls, dtype, {"p": p, **options})
    calls = []
    monkeypatch.setattr(
        native, "kernel", lambda *key: lambda *call: (calls.append(key), kernel(*call))
    )
    actual = train_many(cls, dtype, {"p": p, **options})
    assert len(calls) == 4
    rounding = {"rtol": 0.02, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **rounding)


@pytest.mark.parametrize("p", [0.5, 0.8, 2])
def test_numbers_that_lie_on_the_device(
    emulated: tuple[torch.dtype, native.Kernel], monkeypatch: pytest.MonkeyPatch, p: float
) -> None:
    """Step counts, lr, p and lambda_p as the kernel reads them in a CUDA graph: behind pointers."""
    dtype, kernel = emulated
    expected = train_many(AdamPWD, dtype, {"p": p})
    calls: list[int] = []

    def counted(records: list[native.Record], options: native.Options) -> None:
        pointers = (options.device_lr, options.device_p, options.device_lambda_p)
        assert all(pointers)
        assert (options.lr, options.p, options.lambda_p) == (0, 0, 0)
        assert all(record[5] for record in records)
        calls.append(len(records))
        kernel(records, options)

    monkeypatch.setattr(native, "kernel", lambda *key: counted)
    monkeypatch.setattr(native, "is_on_host", lambda tensor: False)
    numbers = {"p": torch.tensor(p), "lr": torch.tensor(0.01), "lambda_p": torch.tensor(0.3)}
    actual = train_many(AdamPWD, dtype, {**numbers, "capturable": True})
    assert len(calls) == 4
    rounding = {"rtol": 0.02, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4}
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **({"atol": 1e-6} | rounding))


LARGE = 2**31 + 5  # more elements than a 32-bit index can tell apart


@pytest.mark.parametrize(
    ("sizes", "blocks", "first"),
    [
        ([1], [1], [[0]]),
        ([4095, 4096, 4097], [4], [[0, 1, 2]]),
        ([0, 1, 0, 0, 1], [2], [[0, 1]]),
        ([LARGE, 1, LARGE], [2 * (2**19 + 1) + 1], [[0, 2**19 + 1, 2**19 + 2]]),
        ([3] * 40, [40], [list(range(40))]),
        ([3] * 41 + [4097], [40, 3], [list(range(40)), [0, 1]]),
        ([0], [], []),
        ([], [], []),
    ],
)
def test_every_element_has_its_thread_block(
    sizes: list[int], blocks: list[int], first: list[list[int]]
) -> None:
    records = [(8, 8, 8, 8, 0, 0, 1.0, 1.0, False, size) for size in sizes]
    launches = list(native.cuda_launches(records, native.Options()))
    assert [number for _, number in launches] == blocks
    assert [list(launch.first_block[: launch.count]) for launch, _ in launches] == first
    assert all(number < 2**31 for number in blocks)  # CUDA's limit


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, LARGE])
def test_the_last_thread_blocks_reach_the_last_elements(tmp_path: Path, size: int) -> None:
    """And no further; of a large tensor, only what they touch is in memory."""
    library = emulation(native.SOURCE, torch.float32, tmp_path)
    begin = max(0, (size - 1) // 4096 - 1) * 4096  # of the last two blocks
    here = size - begin
    values = torch.linspace(-1, 1, here + 8)  # behind the tensor is another's memory
    tensors = [values.clone(), values.flip(0), torch.zeros(here + 8), torch.zeros(here + 8)]
    pointers = [tensor.data_ptr() - 4 * begin for tensor in tensors]
    options = native.Options(rule=2, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, p=0.8, lambda_p=0.3)
    options.branch = 1
    record = (*pointers, 0, 0, 1 - 0.9, 1 - 0.99, True, size)
    # Another tensor before it: the kernel finds the block's tensor, and its place there.
    other = torch.ones(3)
    before = (*[other.data_ptr()] * 4, 0, 0, 0.1, 0.01, True, 3)
    ((launch, blocks),) = native.cuda_launches([before, record], options)
    library.run(ctypes.byref(launch), 1 + begin // 4096, blocks)
    param = Parameter(values[:here].clone())
    param.grad = values.flip(0)[:here].clone()
    AdamPWD([param], lr=0.1, betas=(0.9, 0.99), p=0.8, lambda_p=0.3, foreach=False).step()
    torch.testing.assert_close(tensors[0][:here], param.detach())
    assert torch.equal(tensors[0][here:], values[here:])
    assert torch.equal(other, torch.ones(3))


WRONG = [
    ("  t->second[i] = narrow(v);", ""),
    ("integer begin = (blockIdx.x - launch.first_block[j]) * BLOCK;",
     "integer begin = (blockIdx.x - launch.first_block[j]) * (BLOCK - 1);"),
    ("w *= c.scale * factor;", "w *= factor;"),
    ("t->param[i] = flushed(w * (c.scale * factor));", "t->param[i] = flushed(w);"),
]  # fmt: skip


def test_the_first_step_finds_the_kernel_right(emulated: tuple[torch.dtype, native.Kernel]) -> None:
    dtype, kernel = emulated
    launches = []

    def counted(records: list[native.Record], options: native.Options) -> None:
        launches.append(len(records))
        kernel(records, options)

    native.compare_with_reference(counted, CPU, dtype)  # raises where they differ
    assert launches == [1] * len(native.COMPARED)


@pytest.mark.parametrize(("right", "wrong"), WRONG)
def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str
) -> None:
    """As a compiler with a defect would make it: a warning of what differs, and foreach."""
    text = native.SOURCE.read_text()
    assert text.count(right) == 1
    (tmp_path / "wrong.c").write_text(text.replace(right, wrong))
    kernel = kernel_of(emulation(tmp_path / "wrong.c", torch.float32, tmp_path))
    monkeypatch.setattr(native, "_cpu_kernel", lambda storage, device: kernel)
    native.kernel.cache_clear()
    native._warn_once.cache_clear()
    try:
        differs = r"compiled step is wrong: \d+ of 33003 torch.float32 weights differ .* for Adam"
        with pytest.warns(UserWarning, match=differs) as caught:
            ours = train_many(AdamPWD, torch.float32, {"p": 0.8})
        assert len(caught) == 1
    finally:
        native.kernel.cache_clear()
        native._warn_once.cache_clear()
    listed = train_many(AdamPWD, torch.float32, {"p": 0.8, "foreach": True, "fused": None})
    for one, other in zip(ours, listed, strict=True):
        assert torch.equal(one, other)
