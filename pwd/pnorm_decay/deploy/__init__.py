"""What zeros are worth once training is over: small files and small networks."""

from pnorm_decay.deploy.compact import (
    ChannelGroup,
    CompactError,
    Compaction,
    channel_groups,
    compact,
)
from pnorm_decay.deploy.files import SparseFileError, load_sparse, save_sparse

__all__ = [
    "ChannelGroup",
    "CompactError",
    "Compaction",
    "SparseFileError",
    "channel_groups",
    "compact",
    "load_sparse",
    "save_sparse",
]
