"""What the files in configs/ say: a value that changes there changes what everybody runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from omegaconf import OmegaConf

from conftest import REPOSITORY
from pnorm_decay import records

CONFIGS = REPOSITORY / "configs"


def read(choice: str) -> dict[str, Any]:
    """A config file as it stands, without what it builds on."""
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{choice}.yaml"))
    return {key: value for key, value in values.items() if key not in ("_target_", "defaults")}


BETAS = {"betas": "${betas}", "eps": 1e-8}
TRAINER = {"batch_size": 100, "val_batch_size": 1000, "precision": "auto", "device": "auto"}
TRAINER |= {"threads": "auto", "channels_last": True, "compile": False, "save_model": True}
TRAINER |= dict.fromkeys(("epochs", "steps", "eval_every", "clip_grad_norm"))
WANDB = {"mode": "offline", "project": "pnorm-decay", "entity": None, "dir": "${runs_dir}"}
NO_WARMUP = {"warmup_epochs": None, "warmup_steps": None}
CHOICES = {
    "optimizer/adamw": {"method": "adamw", "lr": 1e-3, "weight_decay": 1e-2} | BETAS,
    "optimizer/coupled": {"method": "coupled", "lr": 1e-3, "p": 0.5, "lambda_p": 1e-3} | BETAS,
    "optimizer/exact": {"method": "exact", "p": 0.5, "exact": True},
    "optimizer/l1": {"method": "l1", "p": 1.0},
    "optimizer/proximal": {"method": "proximal", "lr": 1e-3, "p": 0.5, "lambda_p": 1e-3} | BETAS,
    "optimizer/pwd": {"method": "pwd", "lr": 1e-3, "p": 0.8, "lambda_p": 1e-3} | BETAS,
    "optimizer/sgd": {"method": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "optimizer/sgd_pwd": {"method": "sgd_pwd", "lr": 0.1, "momentum": 0.9, "p": 0.8}
    | {"lambda_p": 1e-3},
    "pruning/none": {"name": "none"},
    "pruning/magnitude": {"name": "magnitude", "sparsity": 0.9, "scope": "layer", "num_steps": 40}
    | {"end": 0.7},
    "pruning/magnitude_global": {"name": "magnitude_global", "scope": "global"},
    "pruning/oto": {"name": "oto", "sparsity": 0.5, "periods": 10, "end": 0.5},
    "pruning/spred": {"name": "spred", "factors": 2, "tolerance": 0.01},
    "pruning/dwf": {"name": "dwf", "factors": 3},
    "pruning/rewa": {"name": "rewa", "power": 9, "order": 2, "eps": 0.0, "tolerance": 0.01},
    "decay_schedule/none": {"option": None},
    "decay_schedule/p_ramp": {"option": "p", "start": 2.0, "begin": 0.0, "end": 0.5},
    "decay_schedule/lambda_p_warmup": {"option": "lambda_p", "start": 0.0, "begin": 0.0}
    | {"end": 0.2},
    "decay_schedule/target_sparsity": {"sparsity": 0.95, "begin": 0.0, "end": "${target_end}"},
    "schedule/cosine": {"final_fraction": "${final_fraction}"} | NO_WARMUP,
    "schedule/constant": {"final_fraction": 1.0} | NO_WARMUP,
    "trainer/default": TRAINER | {"checkpoint_minutes": 5},
    "logger/wandb": WANDB,
    "logger/none": WANDB | {"mode": "disabled"},
    "model/resnet18": {"width": 64},
    "model/gpt": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
    | {"dropout": 0.2, "bias": False},
    "data/digits": {"crop_padding": 1, "flip": False, "rotation_degrees": 0.0},
    "data/cifar10": {"path": "${oc.env:PNORM_CIFAR10,null}", "cache_dir": "data"}
    | {"crop_padding": 4, "flip": True, "rotation_degrees": 10.0},
    "data/pydoc_topics": {"block_size": "${model.block_size}"},
    "data/tinyshakespeare": {"path": "${oc.env:PNORM_SHAKESPEARE,null}", "cache_dir": "data"}
    | {"block_size": "${model.block_size}"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_choice_is(choice):
    found, wanted = read(choice), CHOICES[choice]
    assert {key: found.get(key) for key in wanted} == wanted


def test_every_choice_is_told():
    groups = {choice.partition("/")[0] for choice in CHOICES}
    paths = [path for group in groups for path in (CONFIGS / group).glob("*.yaml")]
    assert {f"{path.parent.name}/{path.stem}" for path in paths} == CHOICES.keys()


def test_what_holds_for_every_run():
    root = OmegaConf.load(CONFIGS / "train.yaml")
    values = {"seed": 0, "betas": [0.9, 0.999], "final_fraction": 0.01}
    values |= {"target_end": 0.6, "skip_recorded": True, "repeat_best": False}
    values |= {"runs_dir": "runs", "results_dir": "results"}
    assert {key: root[key] for key in values} == values
    chosen = {key: value for entry in root.defaults for key, value in _pair(entry)}
    assert chosen["optimizer"] == "pwd"
    assert chosen["logger"] == "wandb"
    assert chosen["pruning"] == chosen["decay_schedule"] == chosen["sweep"] == "none"


def _pair(entry: Any) -> list[tuple[str, Any]]:
    return [] if isinstance(entry, str) else list(entry.items())


@pytest.mark.parametrize("scale", ["cpu", "wide", "paper"])
def test_images_are_steered_longer_than_text(scale):
    assert read(f"experiment/{scale}/resnet18_cifar10")["target_end"] == 0.75
    assert "target_end" not in read(f"experiment/{scale}/nanogpt_shakespeare")


# What a sweep sweeps over: options, and the names of their values in an experiment's grid.
PWD = {"optimizer.p": "p", "optimizer.lambda_p": "lambda_p", "optimizer.lr": "lr"}
TARGET = {"decay_schedule.sparsity": "target", "optimizer.lr": "sparse_lr"}
SWEEPS = {
    "pwd": PWD,
    "points": {"point": "points"},
    "target": {"optimizer.p": "target_p"} | TARGET,
    "target_exact": {"optimizer.p": "exact_p"} | TARGET,
    "adamw": {"optimizer.weight_decay": "weight_decay", "optimizer.lr": "lr"},
    "magnitude": {"pruning.sparsity": "sparsity", "optimizer.lr": "pruned_lr"},
    "magnitude_global": {"pruning.sparsity": "target", "optimizer.lr": "pruned_lr"},
    "oto": {"pruning.sparsity": "channel_sparsity", "optimizer.lr": "pruned_lr"},
    "l1": {"optimizer.lambda_p": "l1", "optimizer.lr": "baseline_lr"},
    "proximal": {"optimizer.p": "proximal_p", "optimizer.lambda_p": "proximal"}
    | {"optimizer.lr": "baseline_lr"},
    "coupled": {"optimizer.p": "coupled_p", "optimizer.lambda_p": "coupled"}
    | {"optimizer.lr": "baseline_lr"},
    "factorised": {"pruning": "spred,dwf", "optimizer.weight_decay": "factor_decay"}
    | {"optimizer.lr": "baseline_lr"},
    "rewa": {"optimizer.weight_decay": "rewa_decay", "optimizer.lr": "baseline_lr"},
    "sgd": {"optimizer.lr": "sgd_lr"},
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_is_over_its_part_of_the_grid(sweep):
    params = read(f"sweep/{sweep}")["hydra"]["sweeper"]["params"]
    names = {
        key: str(value).removeprefix("${grid.").removesuffix("}") for key, value in params.items()
    }
    assert names == SWEEPS[sweep]


SCALES = {
    "demo": {"resnet_digits": ["oto"], "nanogpt_pydoc": []},
    "cpu": {"resnet18_cifar10": ["oto"], "nanogpt_shakespeare": []},
    "paper": {"resnet18_cifar10": ["oto"], "nanogpt_shakespeare": []},
}
EVERYWHERE = ["adamw", "coupled", "factorised", "l1", "magnitude", "proximal", "pwd", "rewa", "sgd"]
TO_A_TARGET = ["magnitude_global", "target", "target_exact"]


@pytest.mark.parametrize("scale", SCALES)
def test_the_sweeps_of_a_scale(scale):
    for name, others in SCALES[scale].items():
        experiment = read(f"experiment/{scale}/{name}")
        of_scale = [] if scale == "demo" else TO_A_TARGET
        points = ["points"] if "points" in experiment["grid"] else []
        assert sorted(experiment["sweeps"]) == sorted(EVERYWHERE + of_scale + others + points)
        assert experiment.get("repeat_seeds") == (None if scale == "demo" else "1,2")


# Sweeps whose every setting is recorded with seed 0, and the columns of what they sweep over.
COLUMNS = {
    "optimizer.p": "p",
    "optimizer.lambda_p": "lambda_p",
    "optimizer.weight_decay": "lambda_p",
}
COLUMNS |= {"optimizer.lr": "lr", "pruning.sparsity": "target_sparsity"}
RECORDED = ["adamw", "coupled", "l1", "proximal", "pwd", "rewa", "sgd"]
OF_THE_DEMO = ["magnitude", "oto"]


@pytest.mark.parametrize("scale", ["demo", "cpu"])
def test_the_recorded_sweeps_are_the_grid(scale):
    for name in SCALES[scale]:
        experiment = read(f"experiment/{scale}/{name}")
        rows = records.read(REPOSITORY / "results" / scale / f"{name}.csv")
        rows = rows[(rows["seed"] == 0) & rows["overrides"].isna()]
        for sweep in RECORDED + [s for s in OF_THE_DEMO if scale == "demo"]:
            if sweep not in experiment["sweeps"]:
                continue
            columns = {COLUMNS[key]: grid for key, grid in SWEEPS[sweep].items()}
            values = [_numbers(experiment["grid"][grid]) for grid in columns.values()]
            done = rows.loc[rows["method"] == sweep, list(columns)]
            recorded = {tuple(round(v, 9) for v in row) for row in done.itertuples(index=False)}
            wanted = set(itertools.product(*values))
            assert wanted <= recorded, sweep
            if scale == "demo":
                assert wanted == recorded, sweep


def _numbers(grid: Any) -> list[float]:
    return [round(float(text), 9) for text in str(grid).split(",")]


PAPER_TEXT = {
    "weight_decay": "1.0e-3,1.0e-2,1.0e-1,1.0",
    "sparsity": "0.5,0.7,0.8,0.9,0.95,0.98,0.99",
    "target": "0.5,0.8,0.9,0.95,0.98,0.99",
    "target_p": "0.5,0.8",
    "baseline_lr": 1e-3,
    "pruned_lr": 1e-3,
    "sparse_lr": 3e-3,
}
PAPER_IMAGES = {
    "weight_decay": "1.0e-4,1.0e-3,7.08e-3,1.0e-1",
    "sparsity": "0.55,0.7,0.8,0.9,0.95,0.98,0.99,0.995",
    "channel_sparsity": "0.2,0.4,0.5,0.6,0.7,0.8",
    "target": "0.8,0.9,0.95,0.98,0.99,0.995",
    "target_p": "0.5,0.8",
    "baseline_lr": "1.0e-3,6.31e-3",
    "pruned_lr": 6.31e-3,
    "sparse_lr": 6.31e-3,
}


@pytest.mark.parametrize(
    ("name", "values"),
    [("nanogpt_shakespeare", PAPER_TEXT), ("resnet18_cifar10", PAPER_IMAGES)],
)
def test_the_paper_scales_grids(name, values):
    grid = read(f"experiment/paper/{name}")["grid"]
    assert {key: grid[key] for key in values} == values
