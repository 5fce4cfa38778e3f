"""Every method through `experiments/train.py`: its record, its model, resuming, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY
from pnorm_decay.data import Digits
from pnorm_decay.models import ResNet18

TRAIN = "experiments/train.py"
DIGITS = "experiment=demo/resnet_digits"
SHORT = ["model.width=8", "trainer.epochs=null", "trainer.steps=6", "trainer.eval_every=3",
         "trainer.threads=1", "logger=none"]  # fmt: skip
ONE_BY_ONE = "hydra/launcher=basic"


@pytest.fixture
def places(tmp_path):
    return [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]


def result_of(tmp_path: Path) -> tuple[Path, dict]:
    (path,) = (tmp_path / "runs").glob("*/*/*/result.json")
    return path.parent, json.loads(path.read_text())["record"]


@pytest.mark.parametrize(
    ("arguments", "method", "p", "lambda_p", "zeros"),
    [
        (["sweep=magnitude", "pruning.sparsity=0.8"], "magnitude", 2, 0.01, (0.799, 0.801)),
        (["sweep=oto", "pruning.sparsity=0.4"], "oto", 2, 0.01, (0.3, 0.9)),
        (["sweep=l1", "optimizer.lambda_p=1"], "l1", 1, 1, (0.02, 0.5)),
        (["sweep=proximal", "optimizer.p=0.667"], "proximal", 0.667, 1e-3, (0.0, 0.2)),
        (["sweep=coupled", "optimizer.p=0.5"], "coupled", 0.5, 1e-3, (0.0, 0.0)),
        (["sweep=factorised", "optimizer.weight_decay=0.3"], "spred", 1, 0.3, (0.01, 1.0)),
        (["sweep=factorised", "pruning=dwf", "pruning.factors=4"], "dwf", 0.5, 0.01, (0.01, 1.0)),
        (["sweep=rewa"], "rewa", 8 / 9, 0.01, (0.01, 1.0)),
        (["sweep=sgd", "optimizer.weight_decay=0.1"], "sgd", 2, 0.1, (0.0, 0.0)),
    ],
)
def test_a_method_leaves_a_plain_model_and_its_record(
    run_program, places, tmp_path, arguments, method, p, lambda_p, zeros
):
    done = run_program(TRAIN, DIGITS, *arguments, *SHORT, *places)
    assert done.code == 0, done.err
    folder, record = result_of(tmp_path)
    assert record["method"] == method
    assert record["p"] == pytest.approx(p)
    assert record["lambda_p"] == lambda_p
    assert record["status"] == "finished"
    assert zeros[0] <= record["zero_fraction"] <= zeros[1]
    if method in ("magnitude", "oto", "l1", "spred", "dwf", "rewa"):
        assert record["zero_fraction"] == record["sparsity"]
    # What is saved is a plain network with these very zeros.
    saved = torch.load(folder / "model.pt", weights_only=True)
    ResNet18(in_channels=1, width=8).load_state_dict(saved)
    weights = [tensor for tensor in saved.values() if tensor.ndim >= 2]
    number = sum(weight.numel() for weight in weights)
    assert number == record["params_decayed"]
    assert sum(int((w == 0).sum()) for w in weights) == round(record["zero_fraction"] * number)


def test_a_text_model_is_pruned_and_factorised(run_program, places, tmp_path):
    for sweep in ("magnitude", "factorised"):
        runs = f"runs_dir={tmp_path / sweep / 'runs'}"
        done = run_program(
            TRAIN, "experiment=demo/nanogpt_pydoc", f"sweep={sweep}", "trainer.steps=10",
            "trainer.threads=1", "logger=none", places[1], runs,
        )  # fmt: skip
        assert done.code == 0, done.err
        _, record = result_of(tmp_path / sweep)
        assert record["zero_fraction"] > 0.01
        assert record["val_loss"] < 5


@pytest.mark.parametrize("sweep", ["magnitude", "oto", "factorised", "rewa"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_end(
    run_program, places, tmp_path, monkeypatch, sweep
):
    arguments = [DIGITS, f"sweep={sweep}", *SHORT, "trainer.checkpoint_minutes=1e-9"]
    whole = run_program(TRAIN, *arguments, f"runs_dir={tmp_path / 'whole' / 'runs'}")
    assert whole.code == 0, whole.err

    cut = []
    original = Digits.train_batch

    def cut_off(self, step, *rest):
        if step == 4 and not cut:
            cut.append(step)
            raise KeyboardInterrupt
        return original(self, step, *rest)

    monkeypatch.setattr(Digits, "train_batch", cut_off)
    assert run_program(TRAIN, *arguments, *places).code == 130
    resumed = run_program(TRAIN, *arguments, *places)
    assert resumed.code == 0, resumed.err
    (expected_dir, expected), (ours_dir, ours) = result_of(tmp_path / "whole"), result_of(tmp_path)
    for key in ("val_accuracy", "best_val_accuracy", "val_loss", "train_loss", "sparsity"):
        assert ours[key] == expected[key], key
    models = [
        torch.load(folder / "model.pt", weights_only=True) for folder in (ours_dir, expected_dir)
    ]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


def test_runs_that_differ_in_their_target_alone_are_different_runs(run_program, places, tmp_path):
    done = run_program(
        TRAIN,
        "-m",
        DIGITS,
        "sweep=magnitude",
        *SHORT,
        *places,
        ONE_BY_ONE,
        "pruning.sparsity=0.5,0.9",
    )
    assert done.code == 0, done.err
    assert "sparsity=0.5" in done.err  # a person can tell them apart as well
    assert "sparsity=0.9" in done.err
    assert len(list((tmp_path / "runs").glob("*/*/*/result.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([DIGITS, "pruning=magnitude", "pruning.sparsity=1"], "pruning.sparsity=1"),
        ([DIGITS, "pruning=magnitude", "pruning.sparsity=half"], "half"),
        ([DIGITS, "pruning=magnitude", "pruning.scope=channel"], "pruning.scope=channel"),
        ([DIGITS, "pruning=oto", "pruning.sparsity=-1"], "pruning.sparsity=-1"),
        ([DIGITS, "pruning=oto", "pruning.sparsity=0.999"], "pruning.sparsity=0.999"),
        ([DIGITS, "optimizer=adamw", "pruning=spred", "pruning.factors=1"], "pruning.factors=1"),
        ([DIGITS, "optimizer=adamw", "pruning=rewa", "pruning.power=4"], "pruning.power=4"),
        ([DIGITS, "pruning=nosuch"], "nosuch"),
        ([DIGITS, "optimizer=l1", "optimizer.p=0.8"], "optimizer.p=0.8"),
        ([DIGITS, "optimizer=coupled", "optimizer.lambda_p=-1"], "lambda_p"),
        ([DIGITS, "pruning=magnitude", "decay_schedule=target_sparsity"], "use one of them"),
        ([DIGITS, "optimizer=adamw", "decay_schedule=target_sparsity"], "use optimizer=pwd"),
    ],
)
def test_bad_input_is_one_clear_line_before_training(
    run_program, places, tmp_path, arguments, named
):
    done = run_program(TRAIN, *arguments, *places, "logger=none")
    assert done.code == 2
    assert named in done.err
    assert done.err.startswith("error:")
    assert len(done.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/*/*"))


def test_every_sweep_has_its_grid_in_every_experiment(run_program):
    sweeps = {path.stem for path in (REPOSITORY / "configs" / "sweep").glob("*.yaml")} - {"none"}
    experiments = sorted((REPOSITORY / "configs" / "experiment").glob("*/*.yaml"))
    assert {"magnitude", "oto", "l1", "proximal", "factorised", "rewa"} <= sweeps
    for path in experiments:
        if path.parent.name == "wide":
            continue  # single runs
        grid = path.read_text().split("grid:")[1]
        for sweep in sweeps:
            if sweep == "oto" and path.stem.startswith("nanogpt"):
                continue  # text models have layer norms, whose channels OTO cannot remove
            if sweep == "points" and f"{sweep}," not in path.read_text():
                continue  # most grids need none
            text = (REPOSITORY / "configs" / "sweep" / f"{sweep}.yaml").read_text()
            for key in [part.split("}")[0] for part in text.split("${grid.")[1:]]:
                assert f"\n  {key}: " in grid, (path, sweep, key)
