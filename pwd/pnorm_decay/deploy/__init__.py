"""What zeros are worth once training is over: small files, small networks, fast inference."""

try:
    from pnorm_decay.deploy.files import SparseFileError, load_sparse, save_sparse
except ModuleNotFoundError as error:
    if error.name not in ("numpy", "safetensors", "zstandard"):
        raise
    raise ModuleNotFoundError(
        f"pnorm_decay.deploy needs {error.name}: pip install 'pnorm-decay[deploy]'"
    ) from error

from pnorm_decay.deploy.compact import (
    ChannelGroup,
    CompactError,
    Compaction,
    channel_groups,
    compact,
)
from pnorm_decay.deploy.generation import generate
from pnorm_decay.deploy.inference import sparse_inference

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
