"""What zeros are worth: inference that leaves them out."""

from pnorm_decay.deploy.generation import generate
from pnorm_decay.deploy.inference import sparse_inference

__all__ = ["generate", "sparse_inference"]
