"""What a run asks of the machine: an accelerator, threads, memory formats, several processes."""

from __future__ import annotations

import ctypes
import platform

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from pnorm_decay.training.settings import ConfigError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """An Accelerator for this run, whatever an earlier run of this process asked for."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that accelerate then takes
    forget_accelerator()
    return Accelerator(cpu=device.type == "cpu", mixed_precision=ACCELERATE_PRECISION[precision])


def forget_accelerator() -> None:
    """Lets this process have another Accelerator: accelerate has no public way to say so."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepare_process(threads: int) -> None:
    """Settings of the whole process: CPU threads, and what makes them faster.

    Args:
        threads: CPU threads of torch's operations.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # weights on their way to zero pass through slow denormals
    if platform.libc_ver()[0] == "glibc":
        # Every step frees and takes the same memory. Given back to the system in between, it comes
        # with page faults: a tenth of a step of ResNet18 (width 16) on two cores.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def in_memory_format(inputs: Tensor, channels_last: bool) -> Tensor:
    """Images in the memory format that the convolutions have; anything else as it is."""
    if channels_last and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def check_channels_last(model: nn.Module, device: torch.device) -> None:
    """Refuses a model whose channels_last gradient oneDNN computes outside its memory.

    The weight gradient of a strided 1x1 convolution of fewer input channels than a vector holds
    corrupts the heap (oneDNN issue 6035; seen with torch 2.14.1, 4 channels, AVX2).

    Raises:
        ConfigError: the model has such a convolution and the device is a CPU.
    """
    for module in model.modules():
        if device.type == "cpu" and isinstance(module, nn.Conv2d):
            pointwise = module.kernel_size == (1, 1) and max(module.stride) > 1
            if pointwise and module.in_channels < 16:
                raise ConfigError(
                    "trainer.channels_last=true: a strided 1x1 convolution of fewer than 16 "
                    "channels crashes on a CPU; use trainer.channels_last=false"
                )


def check_share(batch_size: int, processes: int) -> None:
    """Raises a ConfigError unless a batch divides evenly among a run's processes."""
    if batch_size % processes:
        raise ConfigError(
            f"trainer.batch_size={batch_size}: {processes} processes share a batch, "
            "so it must be a multiple of that"
        )


def share_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch statistics over all processes of a run, as one process would have them.

    Raises:
        ConfigError: the model has batch norms and the device is a CPU, for which torch has no
            shared ones.
    """
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if has_batch_norm and device.type == "cpu":
        raise ConfigError("a model with batch norm runs on several GPUs, but on one CPU process")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
