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

from pnorm_decay import SGDPWD, AdamPWD
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
struct Index { long long x; };
static Index blockIdx, threadIdx, blockDim;
#include "SOURCE"
extern "C" void run(const Launch *launch, long long blocks) {
  blockDim.x = 1;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) step_cuda(*launch);
}
"""


@pytest.fixture(scope="module", params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.dtype, native.Kernel]:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder: Path = tmp_path_factory.mktemp("emulated")
    (folder / "shim.cpp").write_text(SHIM.replace("SOURCE", str(native.SOURCE)))
    flags = ["-O1", "-shared", "-fPIC", f"-DSTORAGE={native.STORAGE[request.param]}"]
    command = [compiler, *flags, str(folder / "shim.cpp"), "-o", str(folder / "shim.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))

    def kernel(records: list[native.Record], options: native.Options) -> None:
        for launch, blocks in native.cuda_launches(records, options):
            library.run(ctypes.byref(launch), ctypes.c_int64(blocks))

    return request.param, kernel


def train(cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (0,), (4096,), (5, 1700), *[(2, 2)] * 50]  # more than one launch
    params = [
        Parameter(torch.randn(size, generator=generator).mul(0.3).to(dtype)) for size in sizes
    ]
    with torch.no_grad():
        params[0][0] = 0
    optimizer = cls(params, lr=0.01, lambda_p=0.3, fused=True, **options)
    for step in range(4):
        for param in params:
            param.grad = (param.detach() * 0.7 + 0.01 * (step - 1)).to(dtype)
        optimizer.step()
    return params


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8, 1, 1.2, 1.5, 2, 3])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AdamPWD, {}),
        (AdamPWD, {"amsgrad": True, "maximize": True, "weight_decay": 0.5}),
        (AdamPWD, {"exact": True, "weight_decay": 0.5}),
        (AdamPWD, {"hold_zeros": True}),
        (SGDPWD, {"exact": True, "hold_zeros": True, "momentum": 0.9}),
        (SGDPWD, {}),
        (SGDPWD, {"momentum": 0.9, "dampening": 0.2}),
        (SGDPWD, {"momentum": 0.9, "nesterov": True}),
    ],
)
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
    expected = train(cls, dtype, {"p": p, **options})
    calls = []
    monkeypatch.setattr(
        native, "kernel", lambda *key: lambda *call: (calls.append(key), kernel(*call))
    )
    actual = train(cls, dtype, {"p": p, **options})
    assert len(calls) == 4
    rounding = {"rtol": 0.02, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **rounding)


@pytest.mark.parametrize("p", [0.5, 0.8, 2])
def test_numbers_that_lie_on_the_device(
    emulated: tuple[torch.dtype, native.Kernel], monkeypatch: pytest.MonkeyPatch, p: float
) -> None:
    """Step counts, lr, p and lambda_p behind pointers, as in a CUDA graph."""
    dtype, kernel = emulated
    expected = train(AdamPWD, dtype, {"p": p})
    calls = []

    def by_pointers(records: list[native.Record], options: native.Options) -> None:
        calls.append(records)
        numbers = torch.tensor([len(calls), options.lr, options.p, options.lambda_p])
        step, *pointers = (number.data_ptr() for number in numbers)
        options.device_lr, options.device_p, options.device_lambda_p = pointers
        options.lr = options.p = options.lambda_p = 0.5
        kernel([(*r[:5], step, 0.0, 0.0, *r[8:]) for r in records], options)

    monkeypatch.setattr(native, "kernel", lambda *key: by_pointers)
    actual = train(AdamPWD, dtype, {"p": p})
    assert len(calls) == 4
    rounding = {"rtol": 0.02, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4}
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **({"atol": 1e-6} | rounding))
