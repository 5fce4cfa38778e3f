"""The benchmark script, on a small model of its own."""

import csv
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pnorm_decay import AdamPWD, param_groups

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = REPOSITORY / "scripts" / "bench_optimizer.py"
    monkeypatch.syspath_prepend(path.parent)
    specification = importlib.util.spec_from_file_location("bench_optimizer", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "bench_optimizer", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "MODELS", {"resnet18": lambda: nn.Linear(30, 20)})
    return module


def test_it_writes_a_row_for_each_optimizer_and_p(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "in_own_process", lambda *arguments: (0.25, 50.0))
    output = tmp_path / "bench" / "optimizer.csv"
    arguments = "--models resnet18 --p 0.8 2 --repeats 2 --threads 1 --output"
    monkeypatch.setattr("sys.argv", ["bench", *arguments.split(), str(output)])
    bench.main()
    with output.open() as file:
        rows = list(csv.DictReader(file))
    fast = ("ours, fused", "ours, default", "ours, hold_zeros", "ours, exact")
    slow = ("straightforward", "ours, reference", "ours, foreach")
    assert [(row["optimizer"], row["p"], row["sparsity"]) for row in rows] == [
        ("AdamW fused", "", "0.0"),
        ("AdamW foreach", "", "0.0"),
        *((name, p, "0.0") for name in slow + fast for p in ("0.8", "2.0")),
        ("AdamW fused", "", "0.5"),
        *((name, p, "0.5") for name in fast for p in ("0.8", "2.0")),
    ]
    assert rows[0]["ratio"] == "1.0"
    for row in rows:
        assert row["parameters"] == "620"
        assert float(row["milliseconds"]) > 0
        assert (row["threads"], row["torch"]) == ("1", torch.__version__)
        once = (row["first_step_seconds"], row["peak_extra_ratio"])
        assert once == (("0.25", "1.0") if row["sparsity"] == "0.0" else ("", ""))
    assert "ours, fused, p = 0.8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_of_its_own_measures_first_step_and_memory(bench: Any, tmp_path: Path) -> None:
    case = bench.Case("ours, fused", 0.8)
    seconds, megabytes = bench.in_own_process("nanogpt", case, str(tmp_path))
    assert seconds > 0
    assert megabytes > 80  # two moments of 10.7 million floats, unless it is not Linux


def test_the_straightforward_one_is_the_same_update(bench: Any) -> None:
    models = [nn.Linear(30, 20), nn.Linear(30, 20)]
    models[1].load_state_dict(models[0].state_dict())
    make: list[Callable[[Any], torch.optim.Optimizer]] = [
        lambda groups: bench.Straightforward(groups, lr=0.01),
        lambda groups: AdamPWD(groups, lr=0.01),
    ]
    for model, optimizer_of in zip(models, make, strict=True):
        optimizer = optimizer_of(param_groups(model, p=0.8, lambda_p=0.1))
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, step - 0.5)
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_named(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--repeats", "0"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--repeats 0 (must be at least 1)" in capsys.readouterr().err
