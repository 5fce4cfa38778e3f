"""What zeros are worth once training is over: small files, small networks, fast inference."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pnorm_decay.deploy.compact import (
    ChannelGroup,
    CompactError,
    Compaction,
    channel_groups,
    compact,
)
from pnorm_decay.deploy.generation import generate
from pnorm_decay.deploy.inference import sparse_inference

if TYPE_CHECKING:
    from pnorm_decay.deploy.sparse_files import SparseFileError, load_sparse, save_sparse

__all__ = [
    "ChannelGroup",
    "CompactError",
    "Compaction",
    "SparseFileError",
    "channel_groups",
    "compact",
    "generate",
    "load_sparse",
    "save_sparse",
    "sparse_inference",
]


def __getattr__(name: str) -> Any:
    """Files alone need more than torch, and are imported when they are asked for."""
    if name not in ("SparseFileError", "load_sparse", "save_sparse"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module("pnorm_decay.deploy.sparse_files"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "safetensors", "zstandard"):
            raise
        needed = f"{name} needs {error.name}: pip install 'pnorm-decay[deploy]'"
        raise ModuleNotFoundError(needed, name=error.name) from error


def __dir__() -> list[str]:
    """Names that are not imported yet, too, for completion and documentation."""
    return sorted({*globals(), *__all__})
