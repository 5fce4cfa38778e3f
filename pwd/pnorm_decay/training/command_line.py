"""The words of `experiments/train.py`: their order, and what is wrong with one of them."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.utils import get_object
from omegaconf import OmegaConf

from pnorm_decay.training.settings import NAME, ConfigError

NEAREST = 3  # how many neighbours of an unknown key are named
MULTIRUN = {"-m", "--multirun"}
ALONE = {"--cfg", "-c", "--info", "-i"}
NO_KEYS = {"grid", "point", "sweeps"}  # what values refer to


def flags_first(words: Sequence[str]) -> list[str]:
    """The words of a command line with Hydra's flags before the overrides, as Hydra wants them.

    Raises:
        ConfigError: -m stands beside a flag that shows the config instead of running it.
    """
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    for flag in sorted(flags & ALONE):
        if flags & MULTIRUN:
            raise ConfigError(
                f"-m, {flag}: -m runs a sweep, {flag} shows one config and runs nothing; "
                "leave one of them out"
            )
    return sorted(words, key=is_override)


def is_override(word: str) -> bool:
    """Whether a word changes the config; a flag or its value does not."""
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def check_choices(words: Sequence[str], configs: Path) -> None:
    """Raises a ConfigError where a config group is given null, a number or a list, not a name.

    Of these Hydra says the type alone, or accepts them, and then the choice is not known.
    """
    try:
        overrides = OverridesParser.create().parse_overrides([*filter(is_override, words)])
    except HydraException:  # which is raised again, with all that is known, later
        return
    for override in overrides:
        group, value = override.key_or_group, override.value()
        is_hydras = group.partition("/")[0] == "hydra"
        if override.is_delete() or not (is_hydras or (configs / group).is_dir()):
            continue
        values = value.list if isinstance(value, ChoiceSweep) else [value]
        if not all(isinstance(value, str | QuotedString | Glob) for value in values):
            wanted = NAME if is_hydras else f"one of {', '.join(choices_of(group, configs))}"
            raise ConfigError(f"{override.input_line}: must be {wanted}")


def explained(error: Exception, words: Sequence[str], configs: Path) -> Exception:
    """The error that Hydra gave, as one that names the choices or the nearest keys.

    Args:
        error: any error.
        words: what stood on the command line.
        configs: the folder of `train.yaml`.

    Returns:
        A ConfigError, or the same error where it is about something else.
    """
    message = None
    if isinstance(error, MissingConfigException):
        message = unknown_choice(error, configs)
    elif isinstance(error, ConfigCompositionException):
        if found := re.match(r"Could not override '([^']+)'", str(error)):
            message = unknown_key(found[1], words, configs)
        elif found := re.match(r"Ambiguous value for argument '(.+)'", str(error)):
            message = f"{found[1]}: several values are a sweep; add -m, or write a list as [1,2]"
    return error if message is None else ConfigError(message)


def unknown_choice(error: MissingConfigException, configs: Path) -> str | None:
    """Which choices a config group has, or None where the group is not known."""
    group, _, choice = (error.missing_cfg_file or "").partition("/")
    choices = choices_of(group, configs) if group else []
    if group == "hydra":  # its own choices lie in the package
        inner, _, choice = choice.rpartition("/")
        group, choices = f"{group}/{inner}", list(error.options or [])
    if not choices:
        return None
    return f"{group}={choice}: there is no such choice; there are {', '.join(sorted(choices))}"


def choices_of(group: str, configs: Path) -> list[str]:
    """The files of a config group, as one writes them behind its name."""
    folder = configs / group
    files = sorted(folder.rglob("*.yaml"))
    return [path.relative_to(folder).with_suffix("").as_posix() for path in files]


def unknown_key(key: str, words: Sequence[str], configs: Path) -> str:
    """Which keys of the config are most like one that there is not."""
    word = next((word for word in words if word.partition("=")[0] == key), key)
    groups = [w for w in words if (configs / w.partition("=")[0]).is_dir() and "," not in w]
    config: Any = {}
    with (
        contextlib.suppress(HydraException),  # another word is wrong, too
        initialize_config_dir(str(configs.resolve()), version_base="1.3"),
    ):
        config = OmegaConf.to_container(compose("train", groups))
    group, _, option = key.rpartition(".")
    owner = owner_of_option(config.get(group), option)
    if owner is not None:
        return f"{word}: the config has no such key, but {owner} has the option: write +{word}"
    names = [name for name in keys(config) if name.partition(".")[0] not in NO_KEYS]
    names += [path.name for path in configs.iterdir() if path.is_dir()]
    near = nearest(key, dict.fromkeys(names))
    if not near:
        return f"{word}: there is no such key; experiments/train.py --help shows all"
    verb = "is" if len(near) == 1 else "are"
    return f"{word}: there is no such key; the nearest {verb} {', '.join(near)}"


def owner_of_option(part: Any, option: str) -> str | None:
    """The name of the class that a config group names, if it has an option that the group lacks."""
    if not isinstance(part, Mapping) or "_target_" not in part:
        return None
    kind = get_object(part["_target_"])
    named = inspect.signature(kind).parameters.get(option)
    return kind.__name__ if named is not None and named.default is not named.empty else None


def keys(config: Mapping[str, Any], above: str = "") -> list[str]:
    """The keys of a config, of parts and of values, with dots."""
    found = []
    for key, value in config.items():
        if key != "_target_":
            found.append(f"{above}{key}")
            found += keys(value, f"{above}{key}.") if isinstance(value, dict) else []
    return found


def nearest(key: str, names: Mapping[str, Any]) -> list[str]:
    """The names most like a key: of another part under the same name first, then by spelling."""
    last = key.rpartition(".")[2]
    elsewhere = [name for name in names if name.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(key, names, NEAREST)
    if not alike:  # the right name in a wrong part, misspelt
        options = {name.rpartition(".")[2]: name for name in names}
        alike = [options[name] for name in difflib.get_close_matches(last, options, NEAREST)]
    return list(dict.fromkeys([*elsewhere, *alike]))[:NEAREST]
