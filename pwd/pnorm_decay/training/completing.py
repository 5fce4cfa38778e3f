"""Whether all runs of a sweep are complete, asked in one process and without starting any."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pnorm_decay.data import DataError
from pnorm_decay.records import RecordError
from pnorm_decay.training.building import build_data
from pnorm_decay.training.run import Run, finished_record, repeats_a_best_run
from pnorm_decay.training.settings import ConfigError, Settings


def count_if_complete(words: Sequence[str], configs: Path) -> int | None:
    """How many runs a sweep has, if each of them is complete or left out by ``repeat_best``.

    Args:
        words: what stands behind ``experiments/train.py -m``.
        configs: the folder of ``train.yaml``.

    Returns:
        The number; None where a run is not complete, and where something is wrong, of which the
        sweep itself tells.
    """
    count = 0
    try:
        with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
            for settings in settings_of_runs(words, configs):
                run = Run(settings, build_data(settings))
                left_out = settings.repeat_best and not repeats_a_best_run(run)
                if not left_out and finished_record(run) is None:
                    return None
                count += 1
    except (ConfigError, DataError, RecordError, OSError, HydraException, OmegaConfBaseException):
        return None
    return count


def settings_of_runs(words: Sequence[str], configs: Path) -> Iterator[Settings]:
    """The settings of every run of a sweep, in order, while Hydra is initialised.

    Hydra composes the config of each run from its files, which takes a tenth of a second. Here a
    config is composed for each choice of config groups, and the values of the runs are put into
    it.

    Raises:
        ConfigError: a value is not what a run takes, or a word does more than to set a value.
        HydraException: a word is not understood.
    """
    composed = functools.cache(compose_choices)
    for run in runs_of(words):
        overrides = [(parsed(word), word) for word in run]
        is_group = {
            word: (configs / override.key_or_group).is_dir() for override, word in overrides
        }
        config = copy.deepcopy(composed(*(word for word in run if is_group[word])))
        for override, word in overrides:
            if not is_group[word]:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        yield Settings.from_config(config)


def runs_of(words: Sequence[str]) -> list[list[str]]:
    """The words of every run of a sweep, as Hydra's sweeper makes them.

    Raises:
        ConfigError: it is another sweeper, which does not say.
        HydraException: a word is not understood.
    """
    parser = OverridesParser.create()
    given = parser.parse_overrides(list(words))
    single = [str(word.input_line) for word in given if not word.is_sweep_override()]
    sweeper = compose("train", single, return_hydra_config=True).hydra.sweeper
    params: Any = OmegaConf.to_container(sweeper.params, resolve=True) if sweeper.params else {}
    own = [f"{key}={value}" for key, value in params.items()]
    task = [str(word.input_line) for word in given if not word.is_hydra_override()]
    split = getattr(get_class(sweeper._target_), "split_arguments", None)
    if split is None:
        raise ConfigError(f"{sweeper._target_}: chooses its runs as it goes")
    (runs,) = split(parser.parse_overrides([*own, *task]), None)
    return runs


def compose_choices(*choices: str) -> DictConfig:
    """The config of an experiment with nothing but choices of config groups."""
    config = compose("train", list(choices), return_hydra_config=True)
    chosen = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    config.experiment_name, config.sweep_name = chosen["experiment"], chosen["sweep"]
    return config


@functools.cache
def parsed(word: str) -> Override:
    """A word that sets a value or chooses from a group.

    Raises:
        ConfigError: it adds or deletes something.
    """
    override: Any = OverridesParser.create().parse_override(word)
    if override.type != OverrideType.CHANGE or override.package is not None:
        raise ConfigError(f"{word}: does more than to set a value")
    return override
