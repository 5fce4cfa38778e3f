"""The config as an experiment's file has it, for a run to be compared with."""

from __future__ import annotations

import functools

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from pnorm_decay.training.settings import Settings

BASE = "adamw"  # the optimizer that methods beside an optimizer are recorded with


def experiments_own(settings: Settings) -> Settings | None:
    """What a run of the same method would be if nothing but its choices were given.

    Args:
        settings: of the present run, which Hydra has composed.

    Returns:
        The experiment's settings with the run's optimizer or method beside it; None where Hydra
        has not composed the run.
    """
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    choices = {group: hydra.runtime.choices[group] for group in ("experiment", "pruning")}
    choices["optimizer"] = hydra.runtime.choices["optimizer"] if settings.pruning.is_none else BASE
    if settings.target_sparsity is not None:
        choices["decay_schedule"] = hydra.runtime.choices["decay_schedule"]
    paths = [source.path for source in hydra.runtime.config_sources if source.provider == "main"]
    words = tuple(f"{group}={choice}" for group, choice in choices.items())
    return _composed(paths[0], hydra.job.config_name, words)


@functools.cache
def _composed(folder: str, name: str, overrides: tuple[str, ...]) -> Settings:
    if GlobalHydra.instance().is_initialized():  # within Hydra's own program
        return Settings.from_config(compose(name, list(overrides)))
    with initialize_config_dir(folder, version_base="1.3"):
        return Settings.from_config(compose(name, list(overrides)))
