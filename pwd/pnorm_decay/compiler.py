"""Compiles the package's C sources, for the CPU and for CUDA, and keeps what comes of it.

On the CPU the system's C compiler does it in about a second; on CUDA the run-time compiler
that torch ships does. The results are kept in a folder of the user's (`$PNORM_DECAY_CACHE`, else
`pnorm_decay` in `$XDG_CACHE_HOME` or `~/.cache`) under a hash of everything they depend on, and
end in a checksum of their own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from pnorm_decay.files import atomic_write

__all__ = ["cuda_code", "cuda_function", "shared_library"]

# No -ffast-math: it would let the compiler assume that there is no NaN, and with some compilers
# it switches the whole process to flushing subnormal numbers.
CPU_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
CHECKSUM = 32  # bytes of it at the end of a kept file
CUDA_FLAGS = ["-std=c++17"]  # for hexadecimal floating-point numbers


def shared_library(source: Path, *flags: str) -> ctypes.CDLL:
    """Compiles a C source for this processor and loads it.

    Args:
        source: a file of plain C with OpenMP.
        flags: more flags for the compiler, such as definitions.

    Raises:
        OSError: there is no compiler, or it failed; the message says what to install.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"CC={os.environ['CC']}: {error}.") from None
    compiler = compiler or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler or not shutil.which(compiler[0]):
        raise OSError("Install a C compiler with OpenMP (Debian, Ubuntu: apt install gcc).")
    command = [*compiler, *CPU_FLAGS, *flags]
    # The predefined macros name the compiler's version and what this processor can do.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])

    def build(target: Path) -> None:
        _run([*command, "-shared", "-fPIC", str(source), "-o", str(target), "-lm"])

    return ctypes.CDLL(str(_cached(source, ".so", build, *command, macros)))


Launch = Callable[[ctypes.Structure, int, int], None]


def cuda_function(source: Path, name: bytes, device: torch.device, *flags: str) -> Launch:
    """Compiles a CUDA source for a GPU and loads one of its kernels.

    Args:
        source: the file.
        name: the kernel's, declared `extern "C"`; it takes one struct by value.
        device: the GPU.
        flags: more flags for the compiler, such as definitions.

    Returns:
        A function of the kernel's argument, the number of thread blocks and that of the threads of
        each, which launches it on the device's current stream.

    Raises:
        OSError: NVRTC or the driver is not installed.
        RuntimeError: the source does not compile, or the driver returned an error.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    code = cuda_code(source, torch.cuda.get_device_capability(index), *flags)
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()

    def call(name: str, *arguments: Any) -> None:
        error = getattr(driver, name)(*arguments)
        if error:
            raise RuntimeError(f"The CUDA driver's {name} returned error {error}.")

    def in_context(*calls: tuple[Any, ...]) -> None:
        # A thread that has not used CUDA yet has no driver context.
        call("cuCtxPushCurrent_v2", context)
        try:
            for one in calls:
                call(*one)
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(handle), index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)  # for the process's life
    in_context(
        ("cuModuleLoadData", ctypes.byref(module), code),
        ("cuModuleGetFunction", ctypes.byref(function), module, name),
    )

    def launch(argument: ctypes.Structure, blocks: int, threads: int) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        sizes = (blocks, 1, 1, threads, 1, 1, 0)
        in_context(("cuLaunchKernel", function, *sizes, stream, pointers, None))

    return launch


def cuda_code(source: Path, capability: tuple[int, int], *flags: str) -> bytes:
    """Compiles a CUDA source with NVRTC, which needs no GPU.

    Args:
        source: the file.
        capability: the GPU's, such as (9, 0).
        flags: more flags for the compiler, such as definitions.

    Returns:
        A cubin for that GPU or, where NVRTC is older than the GPU, PTX for the newest one before
        it, which the driver compiles.

    Raises:
        OSError: NVRTC is not installed.
        RuntimeError: the source does not compile, and the message is the compiler's; or NVRTC no
            longer knows so old a GPU.
    """
    nvrtc = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    size = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(size))
    known = (ctypes.c_int * size.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    wanted = 10 * capability[0] + capability[1]
    if wanted < min(known):
        raise RuntimeError(
            f"NVRTC {version[0].value}.{version[1].value} compiles for GPUs of compute capability "
            f"{min(known) / 10} and newer; this one has {capability[0]}.{capability[1]}."
        )
    newest = max(number for number in known if number <= wanted)
    kind = "CUBIN" if newest == wanted else "PTX"
    architecture = f"-arch={'sm' if kind == 'CUBIN' else 'compute'}_{newest}"
    command = [*CUDA_FLAGS, architecture, *flags]

    def build(target: Path) -> None:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.read_bytes(), b"source.cu", 0, None, None
        )
        options = (ctypes.c_char_p * len(command))(*(flag.encode() for flag in command))
        failed = nvrtc.nvrtcCompileProgram(program, len(command), options)
        part = "ProgramLog" if failed else kind
        getattr(nvrtc, f"nvrtcGet{part}Size")(program, ctypes.byref(size))
        output = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{part}")(program, output)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise RuntimeError(output.value.decode())
        target.write_bytes(output.raw)

    versions = (str(part.value) for part in version)
    return _cached(source, f".{kind.lower()}", build, *command, *versions).read_bytes()[:-CHECKSUM]


def _nvrtc() -> ctypes.CDLL:
    """NVRTC: NVIDIA's own search, else the package that torch asks for, else the system's."""
    try:
        pathfinder = import_module("cuda.pathfinder")
        return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError, OSError):
        pass
    needed = [line.partition(" ")[0] for line in metadata.requires("torch") or ()]
    packages = [name.partition("=")[0] for name in needed if name.startswith("nvidia-cuda-nvrtc")]
    paths = []
    for package in packages:
        try:
            paths += [str(file.locate()) for file in metadata.files(package) or ()]
        except metadata.PackageNotFoundError:
            continue
    libraries = [path for path in paths if Path(path).name.startswith(("libnvrtc.so", "nvrtc64"))]
    major = (torch.version.cuda or "0").partition(".")[0]
    for name in (*libraries, f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    wheel = packages[0] if packages else f"nvidia-cuda-nvrtc-cu{major}"
    raise OSError(f"Install NVIDIA's run-time compiler (pip install {wheel}).")


def _cached(source: Path, suffix: str, build: Callable[[Path], None], *key: str) -> Path:
    """The file that `build` makes of the source, from the cache where it is there and sound."""
    digest = hashlib.sha256(b"\0".join([source.read_bytes(), *(part.encode() for part in key)]))
    name = f"{source.stem}-{digest.hexdigest()[:32]}{suffix}"
    if _is_sound(_user_folder() / name):
        return _user_folder() / name
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch) / name)
        content = (Path(scratch) / name).read_bytes()
    for folder in (_user_folder, lambda: Path(_process_folder().name)):
        try:
            target = folder() / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(target) as file:
                # Loaders ignore what follows the file's own end.
                file.write(content + hashlib.sha256(content).digest())
            if _is_sound(target):
                return target
        except OSError:  # a cache that cannot be written: this process has one of its own
            continue
    raise OSError(f"Neither {_user_folder()} nor a temporary folder can be written.")


def _user_folder() -> Path:
    """Where files are kept, absolute; the process's own folder where the user has no home."""
    chosen, base = os.environ.get("PNORM_DECAY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(chosen or Path(base or Path.home() / ".cache") / "pnorm_decay").resolve()
    except RuntimeError:
        return Path(_process_folder().name)


def _is_sound(path: Path) -> bool:
    """Whether the file is there, whole, and the user's own: it is about to be run."""
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return False
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-CHECKSUM]).digest() == content[-CHECKSUM:]


@cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder that goes with the process."""
    return tempfile.TemporaryDirectory(prefix="pnorm_decay-")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(
            f"Install a C compiler with OpenMP (Debian, Ubuntu: apt install gcc); {command[0]} "
            f"failed: {done.stderr.strip()[-500:]}"
        )
    return done.stdout
