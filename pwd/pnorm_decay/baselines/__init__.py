"""What the paper compares pWD with, and newer rivals; one file a family.

A method is a torch optimizer (`configs/optimizer/`), or a `SparsityMethod`: what makes zeros beside
the optimizer (`configs/pruning/`).
"""

from pnorm_decay.baselines.base import NoPruning, SparsityMethod
from pnorm_decay.baselines.coupled import CoupledAdam
from pnorm_decay.baselines.magnitude import MagnitudePruning
from pnorm_decay.baselines.oto import OTO
from pnorm_decay.baselines.proximal import HardThresholdAdam, ProximalAdam
from pnorm_decay.baselines.reparametrised import Factorised, ReWA
from pnorm_decay.deploy import compact

__all__ = [
    "OTO",
    "CoupledAdam",
    "Factorised",
    "HardThresholdAdam",
    "MagnitudePruning",
    "NoPruning",
    "ProximalAdam",
    "ReWA",
    "SparsityMethod",
    "compact",
]
