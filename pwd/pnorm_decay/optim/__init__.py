"""Optimizers with p-norm weight decay, what they take, and the decay for other optimizers."""

from pnorm_decay.optim.adam import AdamPWD
from pnorm_decay.optim.attach import PNormDecay, attach_pnorm_decay
from pnorm_decay.optim.groups import param_groups, split_decayed
from pnorm_decay.optim.scheduler import OptionScheduler, ramp
from pnorm_decay.optim.sgd import SGDPWD
from pnorm_decay.optim.target import TargetSparsity

__all__ = [
    "SGDPWD",
    "AdamPWD",
    "OptionScheduler",
    "PNormDecay",
    "TargetSparsity",
    "attach_pnorm_decay",
    "param_groups",
    "ramp",
    "split_decayed",
]
