"""Decoupled weight decay for any p norm (pWD, arXiv:2404.10824): sparse networks by training."""

from pnorm_decay.decay import auxiliary, penalty, shrink_factor
from pnorm_decay.optim import SGDPWD, AdamPWD, attach_pnorm_decay, param_groups
from pnorm_decay.sparsity import sparsity

__version__ = "0.2.0"

__all__ = [
    "SGDPWD",
    "AdamPWD",
    "attach_pnorm_decay",
    "auxiliary",
    "param_groups",
    "penalty",
    "shrink_factor",
    "sparsity",
]
