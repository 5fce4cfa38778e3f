"""The shared trainer: one loop for every model, data set and method."""

from pnorm_decay.training.building import load_run

__all__ = ["load_run"]
