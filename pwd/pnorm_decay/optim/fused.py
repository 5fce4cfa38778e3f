"""Builds and calls fused.c: one pass over parameter, gradient and moments, on CPU and on CUDA.

On the CPU the system's C compiler builds it in well under a second, once for each storage type;
on CUDA the run-time compiler that torch ships does. Both results are kept in a folder of the
user's (`$PNORM_DECAY_CACHE`, else `pnorm_decay` in `$XDG_CACHE_HOME` or `~/.cache`) under a hash
of everything they depend on.
"""

import ctypes
import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

__all__ = ["Kernel", "Options", "Rule", "kernel"]

SOURCE = Path(__file__).with_name("fused.c")
STORAGE = {torch.float64: 64, torch.float32: 32, torch.float16: 16, torch.bfloat16: 17}

# No -ffast-math: it would let the compiler assume that there is no NaN, and with some compilers
# it switches the whole process to flushing subnormal numbers.
CPU_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]

# As in fused.c.
TENSOR_FIELDS = 10
CUDA_TENSORS = 40
CUDA_BLOCK = 4096
CUDA_THREADS = 512


class Rule(IntEnum):
    """How the direction comes from the gradient, as in fused.c."""

    SGD, MOMENTUM, ADAM, AMSGRAD = range(4)


Records = list[int]
Kernel = Callable[[Records, "Options"], None]


class Options(ctypes.Structure):
    """The options of one group, as in fused.c."""

    _fields_ = (
        *(
            (name, ctypes.c_double)
            for name in (
                "lr",
                "beta1",
                "beta2",
                "eps",
                "p",
                "lambda_p",
                "weight_decay",
                "auxiliary_beta",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("device_lr", "rule", "maximize", "nesterov", "reweight_every")
        ),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("options", Options),
        ("count", ctypes.c_int64),
        ("first_block", ctypes.c_int64 * CUDA_TENSORS),
        ("tensors", ctypes.c_int64 * (TENSOR_FIELDS * CUDA_TENSORS)),
    )


@cache
def kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The compiled update for tensors of one device and type.

    Args:
        device: where the tensors are.
        dtype: their type.

    Returns:
        A function of the records of the tensors (`TENSOR_FIELDS` integers each, the struct Tensor
        of fused.c) and of `Options`; None where there is none for this device or type, after a
        warning if it could be had by installing something.
    """
    if device.type not in ("cpu", "cuda") or dtype not in STORAGE or torch.version.hip:
        return None
    build = _cpu_kernel if device.type == "cpu" else _cuda_kernel
    try:
        return build(STORAGE[dtype], device)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        _warn_once(
            f"p-norm weight decay runs without its fused step on {device.type}, several times "
            f"slower, because that could not be built. {error}"
        )
        return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _cpu_kernel(storage: int, device: torch.device) -> Kernel:
    compiler = shlex.split(os.environ.get("CC", "")) or [
        name for name in ("cc", "gcc", "clang") if shutil.which(name)
    ]
    if not compiler or not shutil.which(compiler[0]):
        raise OSError("Install a C compiler with OpenMP (Debian, Ubuntu: apt install gcc).")
    if not os.environ.get("CC"):
        compiler = compiler[:1]
    command = [*compiler, *CPU_FLAGS, f"-DSTORAGE={storage}"]
    # The predefined macros name the compiler's version and what this processor can do.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])

    def build(target: Path) -> None:
        _run([*command, "-shared", "-fPIC", str(SOURCE), "-o", str(target), "-lm"])

    library = ctypes.CDLL(str(_cached(".so", build, *command, macros)))

    def step(records: Records, options: Options) -> None:
        library.step_cpu(
            (ctypes.c_int64 * len(records))(*records),
            ctypes.c_int64(len(records) // TENSOR_FIELDS),
            ctypes.byref(options),
            torch.get_num_threads(),
        )

    return step


def _cuda_kernel(storage: int, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability()
        cubin = cuda_binary(storage, f"sm_{major}{minor}")
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _succeed(driver.cuModuleLoadData(ctypes.byref(module), cubin))
        _succeed(driver.cuModuleGetFunction(ctypes.byref(function), module, b"step_cuda"))

    def step(records: Records, options: Options) -> None:
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for arguments, blocks in cuda_launches(records, options):
                pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
                sizes = (blocks, 1, 1, CUDA_THREADS, 1, 1, 0)
                _succeed(driver.cuLaunchKernel(function, *sizes, stream, pointers, None))

    return step


def cuda_launches(records: Records, options: Options) -> Iterator[tuple[_Launch, int]]:
    """The kernel launches of one step: each one's argument and its number of thread blocks."""
    tensors = [records[i : i + TENSOR_FIELDS] for i in range(0, len(records), TENSOR_FIELDS)]
    filled = [tensor for tensor in tensors if tensor[-1]]
    for start in range(0, len(filled), CUDA_TENSORS):
        part = filled[start : start + CUDA_TENSORS]
        ends = list(itertools.accumulate(-(-numel // CUDA_BLOCK) for *_, numel in part))
        launch = _Launch(options, len(part))
        launch.first_block[: len(part)] = [0, *ends[:-1]]
        launch.tensors[: len(part) * TENSOR_FIELDS] = list(itertools.chain.from_iterable(part))
        yield launch, ends[-1]


def cuda_binary(storage: int, architecture: str) -> bytes:
    """Compiles fused.c with NVRTC, which needs no GPU.

    Args:
        storage: the storage type's number in fused.c.
        architecture: the GPU's, such as `sm_90`.

    Returns:
        The cubin.

    Raises:
        OSError: NVRTC is not installed.
        RuntimeError: the source does not compile; the message is the compiler's.
    """
    nvrtc = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    flags = [f"-arch={architecture}", f"-DSTORAGE={storage}"]

    def build(target: Path) -> None:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), SOURCE.read_bytes(), b"fused.cu", 0, None, None
        )
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), options)
        kind = "ProgramLog" if failed else "CUBIN"
        getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        output = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, output)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise RuntimeError(output.value.decode())
        target.write_bytes(output.raw)

    return _cached(".cubin", build, *flags, *(str(part.value) for part in version)).read_bytes()


def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "0").partition(".")[0]
    for name in (f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"Install NVIDIA's run-time compiler (pip install nvidia-cuda-nvrtc-cu{major}).")


def _cached(suffix: str, build: Callable[[Path], None], *key: str) -> Path:
    """The file that `build` makes from fused.c, from the cache where it is there already."""
    digest = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *(part.encode() for part in key)]))
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("PNORM_DECAY_CACHE") or Path(base) / "pnorm_decay")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # not writable: build for this process alone
        folder = scratch = Path(tempfile.mkdtemp())
    target = folder / f"fused-{digest.hexdigest()[:32]}{suffix}"
    try:
        if not target.exists():
            # Renaming is atomic, so that processes that build at the same time do no harm.
            build(scratch / target.name)
            (scratch / target.name).replace(target)
    finally:
        if scratch != folder:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(
            f"Install a C compiler with OpenMP (Debian, Ubuntu: apt install gcc); {command[0]} "
            f"failed: {done.stderr.strip()[-500:]}"
        )
    return done.stdout


def _succeed(code: int) -> None:
    if code:
        raise RuntimeError(f"The CUDA driver returned error {code}.")
