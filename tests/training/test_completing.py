"""Whether a sweep is complete: the settings of its runs without composing each of them."""

from __future__ import annotations

import pytest
import yaml
from hydra import compose, initialize_config_dir

from conftest import REPOSITORY
from pnorm_decay.training.completing import count_if_complete, runs_of, settings_of_runs
from pnorm_decay.training.settings import Settings

CONFIGS = REPOSITORY / "configs"
FILES = [CONFIGS / "experiment" / "demo" / "resnet_digits.yaml"]
FILES.append(CONFIGS / "experiment" / "cpu" / "nanogpt_shakespeare.yaml")
SWEEPS = [
    (f"{path.parent.name}/{path.stem}", sweep)
    for path in FILES
    for sweep in yaml.safe_load(path.read_text())["sweeps"]
]


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def composed(experiment: str, sweep: str, run: list[str]) -> Settings:
    """The settings as Hydra composes them for the run alone."""
    return Settings.from_config(
        compose("train", [*run, f"experiment_name={experiment}", f"sweep_name={sweep}"])
    )


@pytest.mark.parametrize(("experiment", "sweep"), SWEEPS)
def test_they_are_what_hydra_composes(hydra, experiment, sweep):
    words = [f"experiment={experiment}", f"sweep={sweep}", "seed=4", "trainer.eval_every=7"]
    runs, settings = runs_of(words), list(settings_of_runs(words, CONFIGS))
    assert len(runs) == len(settings) == len({repr(one) for one in settings})
    last = settings[-1]
    assert last == composed(experiment, sweep, runs[-1])
    assert (last.seed, last.trainer.eval_every) == (4, 7)


def test_the_values_of_one_run_leave_the_next_alone(hydra):
    words = ["experiment=demo/resnet_digits", "grid={p:first},{lr:second}"]
    first, second = (settings.grid for settings in settings_of_runs(words, CONFIGS))
    assert (first["p"], second["lr"]) == ("first", "second")
    assert second["p"] == "0.5,0.8,1.0,1.2,1.5"


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("trainer.eval_every=7", 3),
        ("+optimizer.nesterov=true", None),
        ("~trainer.eval_every", None),
        ("seed=abc", None),
        ("optimizer=nosuch", None),
        ("a=1", None),
        ("=", None),
        ("hydra.sweeper._target_=collections.Counter", None),
    ],
)
def test_of_what_is_not_understood_the_sweep_tells(monkeypatch, word, count):
    monkeypatch.setattr("pnorm_decay.training.completing.finished_record", lambda run: {})
    words = ["experiment=demo/resnet_digits", "sweep=sgd", word]
    assert count_if_complete(words, CONFIGS) == count
