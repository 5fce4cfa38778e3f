"""Optimizers with p-norm weight decay, and the parameter groups they take."""

from pnorm_decay.optim.adam import AdamPWD
from pnorm_decay.optim.groups import param_groups, split_decayed
from pnorm_decay.optim.sgd import SGDPWD

__all__ = ["SGDPWD", "AdamPWD", "param_groups", "split_decayed"]
