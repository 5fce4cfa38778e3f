"""Building the fused step: the cache, what happens without a compiler, and the CUDA source."""

import contextlib
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import Parameter

from pnorm_decay import AdamPWD, compiler
from pnorm_decay.decay import TABULATED_BELOW, proximal_factor, survival_limit
from pnorm_decay.optim.backends import native
from pnorm_decay.optim.layout import Slot
from pnorm_decay.optim.rules import SGDRule
from pnorm_decay.optim.shrink import Exact

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and no kernel remembered by the process."""
    monkeypatch.setenv("PNORM_DECAY_CACHE", str(tmp_path / "cache"))
    quick = ["-O1" if flag == "-O3" else flag for flag in compiler.CPU_FLAGS]
    monkeypatch.setattr(compiler, "CPU_FLAGS", quick)  # the others test what -O3 makes of it
    native.kernel.cache_clear()
    native._warn_once.cache_clear()
    yield tmp_path / "cache"
    native.kernel.cache_clear()


def step(**options: bool) -> Parameter:
    param = Parameter(torch.full((3, 3), 0.5))
    param.grad = torch.full((3, 3), 0.1)
    AdamPWD([param], p=0.8, lambda_p=0.1, **options).step()
    return param


def test_it_is_built_once_and_for_each_dtype(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.kernel(CPU, torch.float32) is not None
    (library,) = cache.iterdir()  # and nothing half-built beside it
    built = library.stat().st_mtime_ns
    native.kernel.cache_clear()
    assert native.kernel(CPU, torch.float32) is not None
    assert library.stat().st_mtime_ns == built
    assert native.kernel(CPU, torch.bfloat16) is not None
    assert len(list(cache.iterdir())) == 2
    source = cache.parent / "changed.c"
    source.write_bytes(native.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(native, "SOURCE", source)
    native.kernel.cache_clear()
    assert native.kernel(CPU, torch.float32) is not None
    assert len(list(cache.iterdir())) == 3


def build() -> None:
    warnings.simplefilter("error")
    assert native.kernel(CPU, torch.float32) is not None


def build_in_processes(number: int) -> list[int | None]:
    """The exit statuses of processes that want the kernel at once."""
    native.kernel.cache_clear()
    context = multiprocessing.get_context("fork")  # to start at once, with torch imported
    processes = [context.Process(target=build) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_processes_that_build_at_once_do_no_harm(cache: Path) -> None:
    assert build_in_processes(3) == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_one_warning_and_the_same_numbers(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match="several times slower.*Install a C compiler") as caught:
        param = step()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(step(fused=True), param)
        assert torch.equal(step(foreach=True), param)
        assert native.kernel(CPU, torch.float64) is None  # another dtype, the same reason
    monkeypatch.delenv("CC")
    native.kernel.cache_clear()
    torch.testing.assert_close(step(fused=True), param)


def test_no_warning_where_foreach_was_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listed, reference = step(foreach=True), step(foreach=False)
    torch.testing.assert_close(listed, reference)


def test_a_cache_folder_that_cannot_be_written_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where other processes make nothing
    cache.write_text("a file where the folder should be")
    compiler._process_folder.cache_clear()
    assert native.kernel(CPU, torch.float32) is not None
    assert native.kernel(CPU, torch.float64) is not None
    assert cache.is_file()
    (own,) = tmp_path.glob("pnorm_decay-*")
    assert len(list(own.iterdir())) == 2
    compiler._process_folder().cleanup()  # as at the end of the process
    compiler._process_folder.cache_clear()
    assert not own.exists()


def test_a_cache_that_cannot_be_written_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.kernel(CPU, torch.float32) is not None

    def refuse(*arguments: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(compiler, "atomic_write", refuse)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    native.kernel.cache_clear()
    assert native.kernel(CPU, torch.float32) is not None


@pytest.mark.parametrize(
    "damage",
    ["cut", *(pytest.param(x, marks=pytest.mark.slow) for x in ("changed", "empty", "foreign"))],
)
def test_a_damaged_file_in_the_cache_is_built_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A library that is cut off kills the process that loads it, with no error to catch."""
    assert native.kernel(CPU, torch.float32) is not None
    (library,) = cache.iterdir()
    sound = library.read_bytes()
    if damage == "foreign":
        owner = os.stat(library).st_uid
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        native.kernel.cache_clear()
        compiler._process_folder.cache_clear()
        with pytest.warns(UserWarning, match="could not be built"):
            assert native.kernel(CPU, torch.float32) is None  # everything is another's here
        return
    broken = {"cut": sound[:4096], "changed": sound[:999] + b"?" + sound[1000:], "empty": b""}
    # A new file: this process has the old one in its memory.
    library.unlink()
    library.write_bytes(broken[damage])
    assert build_in_processes(1) == [0]
    assert library.read_bytes() == sound
    assert len(list(cache.iterdir())) == 1


def test_the_cache_is_the_users_own(cache: Path) -> None:
    assert native.kernel(CPU, torch.float32) is not None
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return w - c->rate * (m / ", "return w - c->rate * (v / "),
        ("  return narrow(ABS(w) < SMALLEST ? 0 : w);", "  return narrow(w * 0);"),
        ("  return narrow(ABS(w) < SMALLEST ? 0 : w);", "  return narrow(w / 0 * 0);"),
        ("    t->first[i] = narrow(buffer);", ""),
        ("  t->second[i] = narrow(v);", ""),
        ("    v = largest >= v ? largest : v;", ""),
        (
            "begin + BLOCK < t.numel ? BLOCK : t.numel - begin",
            "begin + BLOCK < t.numel ? BLOCK : 0",
        ),
        ("c.sign = o->maximize ? -1 : 1;", "c.sign = 1;"),
        ("case P_ONE: return x / (x + step);", "case P_ONE: return x / (x + 2 * step);"),
        (
            "if (p == P_ONE) return x > step ? 1 - step / x : 0;",
            "if (p == P_ONE) return x > step ? 1 - step / x / 2 : 0;",
        ),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    """As a compiler with a defect would make it."""
    source = cache.parent / "wrong.c"
    text = native.SOURCE.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(native, "SOURCE", source)
    with pytest.warns(UserWarning, match=r"compiled step is wrong: \d+ of 33003 torch.float32"):
        param = step()
    assert torch.equal(step(foreach=True), param)


def test_processors_without_avx_512_compute_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "cc -mno-avx512f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in native.STORAGE:  # which compares it with the reference
            assert native.kernel(CPU, dtype) is not None


def shrunk(before: torch.Tensor, shrink: Exact) -> torch.Tensor:
    """What the compiled step makes of float32 weights whose gradients are 0."""
    slot = Slot(before.clone(), torch.zeros_like(before), {})
    group = {"momentum": 0, "dampening": 0, "nesterov": False, "maximize": False}
    kernel = native.kernel(CPU, torch.float32)
    assert kernel is not None
    native.run([slot], SGDRule(), shrink, group, kernel)
    return slot.param


@pytest.mark.parametrize("p", [0.1, 0.5, 2 / 3, 0.8, 0.95, 0.97, 1, 1.5])
def test_an_exact_step_of_next_to_nothing_moves_no_large_weight(p: float) -> None:
    before = torch.linspace(0.25, 4, 5001)
    assert torch.equal(shrunk(before, Exact(p, 1.0, 1e-12)), before)


@given(
    p=st.floats(0.01, 2) | st.sampled_from([0.5, 0.98, 1.0, 1.5]),
    step=st.floats(-120, 30).map(lambda exponent: 2.0**exponent),
    hold_zeros=st.booleans(),
)
def test_the_exact_step_of_weights_of_every_size(p: float, step: float, hold_zeros: bool) -> None:
    assume(p == 1 or abs(p - 1) > 1e-3)  # where Newton's method ends too early
    before = torch.cat([torch.logspace(-38, 30, 4001), torch.tensor([0.0, -1.0, -math.inf])])
    threshold = (step / survival_limit(p)[0]) ** (1 / (2 - p)) if p < 1 else step
    near = (threshold * torch.linspace(0.99, 1.5, 1001, dtype=torch.float64)).float()
    before = torch.cat([before, near, -near])
    after = shrunk(before, Exact(p, 1.0, step, hold_zeros=hold_zeros))
    wide = before.double()
    expected = wide * proximal_factor(wide, p, step)
    decided = ((wide.abs() / threshold - 1).abs() > 1e-5) | (p > 1)
    error = (after.double() - expected).abs()[decided]
    has_table = torch.backends.cpu.get_cpu_capability() == "AVX512"
    # Elsewhere r is a power by its logarithm, which float32 knows to about 100 eps.
    relative = 3e-7 if has_table and p < TABULATED_BELOW else 2e-5
    allowed = (relative * wide.abs() + torch.finfo(torch.float32).tiny)[decided]
    assert after[wide == -math.inf].item() == -math.inf
    assert (error <= allowed)[wide[decided].isfinite()].all()


@pytest.mark.parametrize("words", ['gcc "', "  "])
def test_an_odd_choice_of_compiler_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv("CC", words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    assert len(caught) == (words != "  ")


def test_a_user_without_a_home_has_a_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert native.kernel(CPU, torch.float32) is not None  # in $PNORM_DECAY_CACHE
    monkeypatch.delenv("PNORM_DECAY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    native.kernel.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.kernel(CPU, torch.float32) is not None


def test_the_compiler_can_be_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -DUNUSED=1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.kernel(CPU, torch.float32) is not None


def test_other_dtypes_and_devices_have_no_kernel() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.kernel(CPU, torch.complex64) is None
        assert native.kernel(torch.device("meta"), torch.float32) is None


# What NVIDIA sold from 2017 on: Volta, Turing, Ampere (data centre, desktop), Ada, Hopper, and
# Blackwell (data centre, desktop).
CAPABILITIES = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def resources(cubin: Path) -> dict[str, int]:
    """What a thread of the kernel takes, as NVIDIA's cuobjdump reads it off the machine code."""
    tool = shutil.which("cuobjdump")
    with contextlib.suppress(ImportError):  # Triton, which torch needs, brings one
        import triton

        tools = Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump")
        tool = tool or next(map(str, tools), None)
    if tool is None:
        pytest.skip("needs cuobjdump, which Triton and NVIDIA's toolkit bring")
    shown = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True)
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", shown.stdout)}


@pytest.mark.parametrize("storage", native.STORAGE.values())
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_cuda_kernel_compiles_for_every_gpu(
    cache: Path, capability: tuple[int, int], storage: int
) -> None:
    """With the run-time compiler alone: no GPU is needed to see that the machine code is right.

    Nothing of a thread may lie in local memory, which is as slow as the GPU's main memory, and the
    registers of a thread block must be there.
    """
    if torch.version.cuda is None:
        pytest.skip("needs a build of torch with CUDA, which brings NVRTC")
    flag = f"-DSTORAGE={storage}"
    if capability == (7, 0) and int(torch.version.cuda.partition(".")[0]) >= 13:
        with pytest.raises(RuntimeError, match=r"capability 7\.5 and newer; this one has 7\.0"):
            compiler.cuda_code(native.SOURCE, capability, flag)
        return
    code = compiler.cuda_code(native.SOURCE, capability, flag)
    assert compiler.cuda_code(native.SOURCE, capability, flag) == code
    (kept,) = cache.iterdir()
    if code.startswith(b"//"):  # PTX: an NVRTC older than the GPU
        assert capability >= (10, 0)
        return
    assert code[:4] == b"\x7fELF"
    assert b"step_cuda" in code
    used = resources(kept)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] * native.CUDA_THREADS <= 65536


@pytest.mark.parametrize("storage", native.STORAGE.values())
def test_a_gpu_newer_than_the_compiler_gets_ptx(cache: Path, storage: int) -> None:
    """Which its driver compiles; nothing in it asks for local memory."""
    if torch.version.cuda is None:
        pytest.skip("needs a build of torch with CUDA, which brings NVRTC")
    code = compiler.cuda_code(native.SOURCE, (99, 0), f"-DSTORAGE={storage}")
    assert code.startswith(b"//")
    assert b".target sm_" in code
    assert b".entry step_cuda" in code
    assert b".local" not in code


def test_a_source_that_does_not_compile_shows_the_compilers_message(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.version.cuda is None:
        pytest.skip("needs a build of torch with CUDA, which brings NVRTC")
    source = cache.parent / "wrong.c"
    source.write_text("undefined thing;")
    with pytest.raises(RuntimeError, match="undefined"):
        compiler.cuda_code(source, (8, 0), "-DSTORAGE=32")
    assert not cache.exists()


def test_threads_share_the_work() -> None:
    """With several threads every element is updated once, whatever the sizes of the tensors."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for n in (1, 511, 512, 513, 70_000)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            params = [Parameter(value.clone()) for value in values]
            optimizer = AdamPWD(params, p=0.7, lambda_p=0.1, fused=True)
            for _ in range(3):
                for param, value in zip(params, values, strict=True):
                    param.grad = value.flip(0)
                optimizer.step()
            results.append(params)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
