"""The step in compiled code: one pass over parameter, gradient and moments, by fused.c."""

import ctypes
import itertools
import struct
import subprocess
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pnorm_decay.compiler import cuda_function, shared_library
from pnorm_decay.decay import TABULATED_BELOW, proximal_fit, proximal_table
from pnorm_decay.optim.backends import reference
from pnorm_decay.optim.layout import Slot
from pnorm_decay.optim.options import Group
from pnorm_decay.optim.rules import AdamRule, Rule, SGDRule
from pnorm_decay.optim.shrink import Exact, Reweighted, Shrink

__all__ = ["Kernel", "Options", "kernel", "run", "supports"]

SOURCE = Path(__file__).with_name("fused.c")
STORAGE = {torch.float64: 64, torch.float32: 32, torch.float16: 16, torch.bfloat16: 17}

# As in fused.c.
RECORD = struct.Struct("6q2d2q")  # the struct Tensor
COEFFICIENTS = 11
CUDA_TENSORS = 40
CUDA_BLOCK = 4096
CUDA_THREADS = 512

DOUBLES = ("lr", "beta1", "beta2", "eps", "p", "lambda_p", "weight_decay")
INTEGERS = ("rule", "maximize", "nesterov", "exact", "hold_zeros")
Record = tuple[Any, ...]  # the fields of one struct Tensor, numel last


class Options(ctypes.Structure):
    """The options of one group, as in fused.c."""

    _fields_ = (
        *((name, ctypes.c_double) for name in DOUBLES),
        *((name, ctypes.c_double) for name in ("limit", "branch", "slope", "offset")),
        ("coefficients", ctypes.c_double * COEFFICIENTS),
        ("table", ctypes.c_void_p),
        *((f"device_{name}", ctypes.c_void_p) for name in ("lr", "p", "lambda_p")),
        *((name, ctypes.c_int64) for name in INTEGERS),
    )


try:
    torch.autograd.graph.increment_version([])
    COUNTS_LISTS = True
except RuntimeError:  # torch 2.4 takes one tensor
    COUNTS_LISTS = False

Kernel = Callable[[list[Record], Options], None]


class _Launch(ctypes.Structure):
    _fields_ = (
        ("options", Options),
        ("count", ctypes.c_int64),
        ("first_block", ctypes.c_int64 * CUDA_TENSORS),
        ("tensors", ctypes.c_char * (RECORD.size * CUDA_TENSORS)),
    )


def supports(shrink: Shrink) -> bool:
    """Whether fused.c knows the decay; one with a delay of s it does not."""
    return type(shrink) in (Reweighted, Exact)


def is_on_host(tensor: Tensor) -> bool:
    """Whether reading the tensor's numbers makes nobody wait."""
    return tensor.is_cpu


def run(slots: list[Slot], rule: Rule, shrink: Shrink, group: Group, kernel: Kernel) -> None:
    """Does one step of flat tensors of the kernel's device and dtype."""
    if not slots:
        return
    kept: list[Tensor] = []  # until the kernel is launched
    device = slots[0].param.device
    options = Options(weight_decay=shrink.weight_decay, hold_zeros=shrink.hold_zeros, branch=1)
    for name, value in (("lr", shrink.alpha), ("p", shrink.p), ("lambda_p", shrink.lambda_p)):
        if isinstance(value, Tensor) and not is_on_host(slots[0].param):
            kept.append(value.to(device, torch.float32, non_blocking=True))
            setattr(options, f"device_{name}", kept[-1].data_ptr())
        else:
            setattr(options, name, float(value))
    options.maximize = group["maximize"]
    for name, value in rule.native_options(group).items():
        setattr(options, name, value)
    if isinstance(shrink, Exact):
        options.exact = True
        fitted = proximal_fit(shrink.p)
        options.limit, options.branch, options.slope, options.offset = fitted[:4]
        options.coefficients[:] = fitted.coefficients
        if shrink.p < TABULATED_BELOW and device.type == "cpu":
            kept.append(proximal_table(shrink.p))
            options.table = kept[-1].data_ptr()
    betas = options.beta1, options.beta2
    names = (*rule.moments, None, None)[:3]
    corrections: dict[int, tuple[float, ...]] = {}  # nearly always of one step
    records = []
    for slot in slots:
        state, step, device_step = slot.state, slot.step, 0
        if isinstance(step, Tensor) and not is_on_host(step):
            kept.append(step.float())
            device_step, step = kept[-1].data_ptr(), 1
        step = int(step)
        if step not in corrections:
            corrections[step] = tuple(1 - beta**step for beta in betas)
        records.append(
            (
                slot.param.data_ptr(),
                slot.grad.data_ptr(),
                *(state[name].data_ptr() if name in state else 0 for name in names),
                device_step,
                *corrections[step],
                slot.is_first,
                slot.param.numel(),
            )
        )
    kernel(records, options)
    # Autograd's version counters, which torch's fused AdamW leaves alone: it is nearly free.
    params = [slot.param for slot in slots]
    for changed in [params] if COUNTS_LISTS else params:
        torch.autograd.graph.increment_version(changed)


@cache
def kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The compiled step for tensors of one device and type.

    It is compared with the reference before it is used: `compare_with_reference`.

    Args:
        device: where the tensors are.
        dtype: their type.

    Returns:
        A function of the records of the tensors and of `Options`; None where there is none for this
        device or type, after a warning if something is wrong or missing.
    """
    if device.type not in ("cpu", "cuda") or dtype not in STORAGE or torch.version.hip:
        return None
    build = _cpu_kernel if device.type == "cpu" else _cuda_kernel
    try:
        built = build(STORAGE[dtype], device)
        compare_with_reference(built, device, dtype)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        _warn_once(
            f"p-norm weight decay runs without its fused step on {device.type}, several times "
            f"slower, because that could not be built. {error}"
        )
        return None
    return built


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


ADAM = {"amsgrad": False, "betas": (0.9, 0.99), "eps": 1e-8, "maximize": False}
SGD = {"momentum": 0.9, "dampening": 0.1, "nesterov": True, "maximize": True}
COMPARED: tuple[tuple[Rule, Group, Shrink], ...] = (
    (AdamRule(), ADAM, Reweighted(0.5, 0.1, 0.3, 0.2)),
    (AdamRule(), ADAM, Reweighted(0.8, 0.1, 0.3, hold_zeros=True)),
    (AdamRule(), {**ADAM, "amsgrad": True}, Reweighted(1, 0.1, 0.3)),
    (SGDRule(), SGD, Reweighted(1.5, 0.1, 0.3)),
    (SGDRule(), {**SGD, "momentum": 0, "nesterov": False}, Reweighted(2, 0.1, 0.3)),
    (AdamRule(), ADAM, Exact(0.5, 0.1, 0.3)),
    (AdamRule(), ADAM, Exact(0.8, 0.1, 0.3, 0.2, hold_zeros=True)),
    (AdamRule(), ADAM, Exact(1, 0.1, 0.3)),
    (SGDRule(), SGD, Exact(1.3, 0.1, 0.3)),
    (SGDRule(), SGD, Exact(1.5, 0.1, 0.3)),
)
COMPARED_ELEMENTS = 33_003  # enough for several threads and thread blocks, and no whole vectors


@torch.no_grad()
def compare_with_reference(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    """Raises RuntimeError if a kernel differs from the definition by more than rounding."""
    grid = torch.linspace(-1, 1, COMPARED_ELEMENTS, dtype=torch.float64, device=device)
    parts = {"grad": (grid * 37).sin(), "exp_avg": grid / 3, "momentum_buffer": grid / 3}
    parts |= {"exp_avg_sq": grid**2, "max_exp_avg_sq": (grid * 9).cos() ** 2}
    narrow, wide = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    if dtype == torch.float64:
        wide = narrow
    for rule, group, shrink in COMPARED:
        slots = []
        for _ in range(2):
            state = {name: parts[name].to(dtype, copy=True) for name in rule.names(group)}
            slots.append(Slot((grid**3).to(dtype), parts["grad"].to(dtype), state, 3))
        run(slots[:1], rule, shrink, group, kernel)
        reference.run(slots[1], rule, shrink, group)
        ours, theirs = slots[0].param.double(), slots[1].param.double()
        allowed = 2 * narrow * theirs.abs() + 500 * wide + torch.finfo(dtype).tiny
        right = (ours - theirs).abs() <= allowed
        if isinstance(shrink, Exact) and shrink.p <= 1:
            # At its threshold the exact step jumps to 0, and rounding decides on which side.
            edge = torch.minimum(ours.abs(), theirs.abs()) == 0
            sizes = torch.maximum(ours.abs(), theirs.abs())[edge & (ours != theirs)]
            right |= edge & (len(sizes) <= 8)
        wrong = int((~right).sum())
        for name, ours in slots[0].state.items():
            theirs = slots[1].state[name].double()
            wrong += int((~((ours.double() - theirs).abs() <= 2 * narrow + 9 * wide)).sum())
        if wrong:
            raise RuntimeError(
                f"The compiled step is wrong: {wrong} of {len(grid)} {dtype} weights differ from "
                f"the reference for {type(rule).__name__} with {shrink}."
            )


def _cpu_kernel(storage: int, device: torch.device) -> Kernel:
    library = shared_library(SOURCE, f"-DSTORAGE={storage}")

    def step(records: list[Record], options: Options) -> None:
        library.step_cpu(
            b"".join([RECORD.pack(*record) for record in records]),
            ctypes.c_int64(len(records)),
            ctypes.byref(options),
            torch.get_num_threads(),
        )

    return step


def _cuda_kernel(storage: int, device: torch.device) -> Kernel:
    launch = cuda_function(SOURCE, b"step_cuda", device, f"-DSTORAGE={storage}")

    def step(records: list[Record], options: Options) -> None:
        for arguments, blocks in cuda_launches(records, options):
            launch(arguments, blocks, CUDA_THREADS)

    return step


def cuda_launches(records: list[Record], options: Options) -> Iterator[tuple[_Launch, int]]:
    """The kernel launches of one step: each one's argument and its number of thread blocks."""
    filled = [record for record in records if record[-1]]
    for start in range(0, len(filled), CUDA_TENSORS):
        part = filled[start : start + CUDA_TENSORS]
        ends = list(itertools.accumulate(-(-record[-1] // CUDA_BLOCK) for record in part))
        launch = _Launch(options, len(part))
        launch.first_block[: len(part)] = [0, *ends[:-1]]
        packed = b"".join([RECORD.pack(*record) for record in part])
        ctypes.memmove(ctypes.addressof(launch) + _Launch.tensors.offset, packed, len(packed))
        yield launch, ends[-1]
