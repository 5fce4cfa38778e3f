"""What tells runs apart: the recorded settings still have the ids that they were recorded with."""

from __future__ import annotations

from functools import cache
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from conftest import REPOSITORY
from pnorm_decay import records
from pnorm_decay.training import settings
from pnorm_decay.training.identity import hyperparameters, identity, overrides, run_name
from pnorm_decay.training.settings import Settings

RECORDED = sorted((REPOSITORY / "results").glob("[cd]*/*.csv"))
# The sweep whose choices a recorded method was made with; sweeps of the same name are left out.
SWEEPS = {"spred": "factorised", "dwf": "factorised", "pwd_target": "target"}
SWEEPS |= {"exact_target": "target_exact"}
# A column, and where the config has it; of several places the first that is there.
PLACES = {
    "p": ["optimizer.p"],
    "lambda_p": ["optimizer.lambda_p", "optimizer.weight_decay"],
    "lr": ["optimizer.lr"],
    "target_sparsity": ["pruning.sparsity", "decay_schedule.sparsity"],
}

# A change that is none, because the experiment's file has it.
IS_SO_ALREADY = [("demo/resnet_digits", "trainer.channels_last=false")]
IS_SO_ALREADY += [("demo/nanogpt_pydoc", "trainer.channels_last=true")]


@cache
def composed(experiment: str, *overrides: str) -> Any:
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        overrides = (f"experiment={experiment}", *overrides)
        return compose("train", list(overrides), return_hydra_config=True)


@cache
def of_method(experiment: str, method: str) -> Any:
    """What a recorded method was composed as: Hydra's part, whose copies take long, and ours."""
    pruning = ["pruning=dwf"] if method == "dwf" else []
    cfg = composed(experiment, f"sweep={SWEEPS.get(method, method)}", *pruning)
    plain = cfg.copy()
    with open_dict(plain):
        del plain["hydra"]
    plain.experiment_name, plain.sweep_name = experiment, "none"
    HydraConfig.instance().set_config(cfg)
    return HydraConfig.instance().cfg, plain


@cache
def but_for_the_seed(experiment: str, method: str, is_fp32: bool, **columns: float) -> Any:
    """A recorded run's config, resolved; its seed, which nothing refers to, is put in later."""
    HydraConfig.instance().cfg, plain = of_method(experiment, method)
    own = plain.copy()
    for column, value in columns.items():
        place = next(p for p in PLACES[column] if OmegaConf.select(own, p) is not None)
        OmegaConf.update(own, place, value)
    if is_fp32:  # "auto" stands for bf16
        own.trainer.precision = "fp32"
    return OmegaConf.to_container(own, resolve=True)


def settings_of(experiment: str, row: dict[str, Any]) -> Settings:
    """The settings of a recorded run."""
    _, plain = of_method(experiment, row["method"])
    columns = {
        column: row[column]
        for column, places in PLACES.items()
        if not pd.isna(row[column]) and any(OmegaConf.select(plain, p) is not None for p in places)
    }
    is_fp32 = str(row["device"]).endswith("fp32")
    config = but_for_the_seed(experiment, row["method"], is_fp32, **columns)
    return Settings.from_config({**config, "seed": row["seed"]})


@pytest.fixture(autouse=True)
def _hydra_as_it_was():
    state = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = state


def resolved(cfg: Any, experiment: str) -> Settings:
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    cfg.experiment_name, cfg.sweep_name = experiment, "none"
    return Settings.from_config(cfg)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recorded_settings_have_their_recorded_ids(path, monkeypatch):
    monkeypatch.setattr(settings, "bf16_is_fast", lambda device: True)  # as where they were made
    rows = records.read(path).to_dict("records")
    assert len(rows) > 90
    wrong, seen = [], set()
    for row in rows:
        of_row = settings_of(f"{path.parent.name}/{path.stem}", row)
        if identity(of_row, row["data"]) != row["run_id"]:
            wrong.append((row["run_id"], run_name(of_row)))
        columns = hyperparameters(of_row)
        assert columns["method"] == row["method"]
        assert columns["p"] == pytest.approx(row["p"])
        if columns["method"] not in seen:
            is_apart = row["device"].endswith("fp32") and path.parent.name != "demo"
            assert overrides(of_row) == ("trainer.precision=fp32" if is_apart else "")
            seen.add(columns["method"])
    assert wrong == []


# Ids of the defaults at the scales of which nothing is recorded yet, as they were on 2026-11-24.
UNRECORDED = {
    ("paper/nanogpt_shakespeare", "pwd"): "79033c1bbadb",
    ("paper/nanogpt_shakespeare", "adamw"): "e26ed4e1d31d",
    ("paper/nanogpt_shakespeare", "magnitude"): "bc3d4e161afd",
    ("paper/resnet18_cifar10", "pwd"): "9591e63cb71a",
    ("paper/resnet18_cifar10", "adamw"): "958df1a51937",
    ("paper/resnet18_cifar10", "magnitude"): "e2f2915d573d",
    ("paper/resnet18_cifar10", "magnitude_global"): "b13ba7adf93c",
    ("paper/resnet18_cifar10", "oto"): "26921c5f1820",
    ("wide/nanogpt_shakespeare", "pwd"): "ed1dd7a91ad8",
    ("wide/nanogpt_shakespeare", "target"): "883c200dfcee",
    ("wide/resnet18_cifar10", "pwd"): "a7ad9e4bf274",
    ("wide/resnet18_cifar10", "target"): "3b7f2425c119",
}


@pytest.mark.parametrize(("experiment", "sweep"), UNRECORDED)
def test_the_larger_scales_are_what_they_were(experiment, sweep, monkeypatch):
    monkeypatch.setattr(settings, "bf16_is_fast", lambda device: True)
    cfg = composed(experiment, f"sweep={sweep}").copy()
    if "grid" in cfg:  # the first setting of the sweep's grid
        for key, values in cfg.hydra.sweeper.params.items():
            OmegaConf.update(cfg, key, float(str(values).split(",")[0]))
    label = "CIFAR-10" if "cifar10" in experiment else "Tiny Shakespeare"
    assert identity(resolved(cfg, experiment), label) == UNRECORDED[experiment, sweep]


@pytest.mark.parametrize("scale", ["demo", "cpu", "wide", "paper"])
@pytest.mark.parametrize(("choice", "last"), [("cosine", 0.1), ("constant", 1.0)])
def test_a_schedule_is_what_it_says_whatever_the_experiment(scale, choice, last):
    experiment = f"{scale}/nanogpt_" + ("pydoc" if scale == "demo" else "shakespeare")
    of_choice = resolved(composed(experiment, f"schedule={choice}").copy(), experiment)
    assert of_choice.schedule.options["final_fraction"] == last
    assert of_choice.schedule.options["warmup_steps"] > 0


def test_the_papers_setting_is_the_papers():
    text = resolved(composed("paper/nanogpt_shakespeare").copy(), "x/x").config
    images = resolved(composed("paper/resnet18_cifar10").copy(), "x/x").config
    assert (images["trainer"]["epochs"], images["trainer"]["batch_size"]) == (100, 400)
    assert (text["trainer"]["steps"], text["trainer"]["batch_size"]) == (5000, 64)
    gpt = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}
    assert gpt.items() <= text["model"].items()
    assert images["model"]["width"] == 64
    augmentation = {"crop_padding": 4, "flip": True, "rotation_degrees": 10.0}
    assert augmentation.items() <= images["data"].items()
    assert text["optimizer"]["betas"] == [0.9, 0.99]
    assert images["optimizer"]["betas"] == [0.9, 0.999]
    for config, lrs in (
        (images, "1.0e-3,3.0e-3,6.31e-3,1.0e-2"),
        (text, "3.0e-4,1.0e-3,3.0e-3"),
    ):
        assert config["grid"]["p"] == "0.5,0.8,1.0,1.2,1.5,2.0"
        assert config["grid"]["lambda_p"] == "1.0e-5,1.0e-4,3.0e-4,1.0e-3,3.0e-3,1.0e-2"
        assert config["grid"]["lr"] == lrs


@pytest.mark.parametrize(
    ("experiment", "change"),
    [
        (experiment, change)
        for experiment in ("demo/resnet_digits", "demo/nanogpt_pydoc")
        for change in (
            "trainer.precision=bf16",
            "trainer.clip_grad_norm=0.5",
            "trainer.batch_size=17",
            "trainer.eval_every=7",
            "trainer.channels_last=true",
            "trainer.channels_last=false",
            "schedule.final_fraction=0.5",
            "schedule=constant",
            "decay_schedule=p_ramp",
            "optimizer=adamw",
            "optimizer.betas=[0.8,0.99]",
            "optimizer.eps=1e-7",
            "+optimizer.reweight_every=2",
            "pruning=magnitude",
            "seed=5",
        )
        if (experiment, change) not in IS_SO_ALREADY
    ],
)
def test_what_changes_a_result_changes_the_id(experiment, change):
    plain = resolved(composed(experiment).copy(), experiment)
    changed = resolved(composed(experiment, change).copy(), experiment)
    assert identity(plain, "x") != identity(changed, "x")


@pytest.mark.parametrize(
    "change",
    [
        "trainer.device=cpu",
        "trainer.threads=7",
        "trainer.compile=true",
        "trainer.val_batch_size=3",
        "trainer.checkpoint_minutes=1",
        "trainer.save_model=false",
        "runs_dir=x",
        "results_dir=x",
        "skip_recorded=true",
        "logger=none",
    ],
)
def test_how_and_where_a_run_is_done_does_not(change):
    plain = resolved(composed("demo/resnet_digits").copy(), "x/x")
    changed = resolved(composed("demo/resnet_digits", change).copy(), "x/x")
    assert identity(plain, "x") == identity(changed, "x")


def test_a_run_is_known_by_the_precision_that_auto_stands_for(monkeypatch):
    def of(precision: str, fast: bool) -> str:
        monkeypatch.setattr(settings, "bf16_is_fast", lambda device: fast)
        cfg = composed("demo/resnet_digits", f"trainer.precision={precision}").copy()
        return identity(resolved(cfg, "x/x"), "x")

    assert of("auto", fast=False) == of("fp32", fast=False) == of("fp32", fast=True)
    assert of("auto", fast=True) != of("auto", fast=False)


def test_the_data_and_where_they_lie():
    plain = resolved(composed("demo/resnet_digits").copy(), "x/x")
    assert identity(plain, "CIFAR-10") != identity(plain, "CIFAR-10, JPEG copy")
    here, there = (
        resolved(
            composed("cpu/resnet18_cifar10", f"data.path={p}", "data.cache_dir=d").copy(), "x/x"
        )
        for p in ("/here", "/there.tar")
    )
    assert identity(here, "CIFAR-10") == identity(there, "CIFAR-10")


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ([], {"method": "pwd", "p": 0.8, "lambda_p": 1e-3, "target_sparsity": None}),
        (["seed=3", "optimizer.p=1"], {"seed": 3, "p": 1.0}),
        (["optimizer=adamw"], {"method": "adamw", "p": 2.0, "lambda_p": 0.01}),
        (
            ["optimizer=adamw", "pruning=magnitude"],
            {"method": "magnitude", "p": 2.0, "target_sparsity": 0.9},
        ),
        (["optimizer=adamw", "pruning=dwf"], {"method": "dwf", "p": 2 / 3}),
        (
            ["decay_schedule=target_sparsity"],
            {"method": "pwd_target", "lambda_p": None, "target_sparsity": 0.95},
        ),
    ],
)
def test_the_columns_that_settings_determine(change, columns):
    of_change = resolved(composed("demo/resnet_digits", *change).copy(), "x/x")
    assert columns.items() <= hyperparameters(of_change).items()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], ""),
        (["optimizer.p=1", "optimizer.lambda_p=0.1", "optimizer.lr=1", "seed=7"], ""),
        (["trainer.threads=3", "trainer.device=cpu", "runs_dir=x", "model.n_embd=32"], ""),
        (["model.n_embd=48"], "model.n_embd=48"),
        (["trainer.steps=20", "model.n_embd=48"], "model.n_embd=48 trainer.steps=20"),
        (["+optimizer.weight_decay=0.1"], "optimizer.weight_decay=0.1"),
        (["+optimizer.hold_zeros=true"], "optimizer.hold_zeros=true"),
        (["betas=[0.8,0.9]"], "optimizer.betas=[0.8,0.9]"),
        (["optimizer=adamw", "optimizer.weight_decay=0.3"], ""),
        (["optimizer=adamw", "pruning=magnitude", "pruning.sparsity=0.5"], ""),
        (["sweep=magnitude_global"], ""),
        (["pruning=magnitude", "pruning.end=0.5"], "optimizer=pwd pruning.end=0.5"),
        (["optimizer=sgd", "pruning=spred"], "optimizer=sgd"),
        (["decay_schedule=target_sparsity", "decay_schedule.sparsity=0.5"], ""),
        (["decay_schedule=target_sparsity", "decay_schedule.end=0.5"], "decay_schedule.end=0.5"),
        (["data=digits", "data.crop_padding=3"], "data=Digits"),
    ],
)
def test_overrides_are_what_no_other_column_tells(changes, words):
    cfg = composed("demo/nanogpt_pydoc", *changes).copy()
    assert overrides(resolved(cfg, "demo/nanogpt_pydoc")) == words


def test_a_run_is_named_by_its_overrides():
    cfg = composed("demo/nanogpt_pydoc", "model.n_embd=48").copy()
    name = run_name(resolved(cfg, "demo/nanogpt_pydoc"))
    assert name == "pwd p=0.8 lambda_p=0.001 lr=0.001 seed=0 model.n_embd=48"
