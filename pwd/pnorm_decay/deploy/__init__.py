"""What zeros are worth once training is over: small files and small networks."""

from pnorm_decay.deploy.files import SparseFileError, load_sparse, save_sparse

__all__ = ["SparseFileError", "load_sparse", "save_sparse"]
