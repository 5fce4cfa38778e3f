"""The benchmarks of training and of sweeps, on tiny cases."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.autograd import DeviceType

from conftest import SHORT
from pnorm_decay import records
from pnorm_decay.deploy import save_sparse
from pnorm_decay.models import ResNet18


def test_training_is_compared_with_a_straightforward_loop(load, monkeypatch, tmp_path, capsys):
    bench = load("bench_training")
    case = ["experiment=demo/nanogpt_pydoc", "trainer.threads=1"]
    monkeypatch.setattr(bench, "CASES", {"tiny": case})
    output = tmp_path / "training.csv"
    arguments = ["--seconds", "0.05", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    (row,) = pd.read_csv(output).to_dict("records")
    assert row["unit"] == "tokens"
    assert row["steps_timed"] >= 3
    speeds = row["ours_per_second"], row["straightforward_per_second"]
    assert row["ratio"] == pytest.approx(speeds[0] / speeds[1], rel=0.01)
    assert 0 < row["outside_share"] < 1
    assert "tiny" in capsys.readouterr().out


@pytest.mark.slow
def test_ways_of_doing_a_sweep_are_compared(load, monkeypatch, tmp_path, capsys):
    bench = load("bench_sweep")
    short = ["model.width=4", "trainer.epochs=null", "trainer.steps=3", "logger=none"]
    monkeypatch.setattr(bench, "EXPERIMENTS", {"demo/resnet_digits": short})
    monkeypatch.setattr(bench, "SWEEP", ["optimizer.p=0.5,0.8"])
    output = tmp_path / "sweep.csv"
    arguments = ["--ways", "1x1", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    (row,) = pd.read_csv(output).to_dict("records")
    assert (row["workers"], row["threads_each"], row["ratio"]) == (1, 1, 1.0)
    assert row["runs_per_hour"] > 0
    assert "runs per hour" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["2", "0x1", "axb"])
def test_a_way_that_is_none_is_refused(load, monkeypatch, capsys, text):
    bench = load("bench_sweep")
    monkeypatch.setattr(sys, "argv", ["bench", "--ways", text])
    with pytest.raises(SystemExit):
        bench.main()
    assert "must be WORKERSxTHREADS" in capsys.readouterr().err


@pytest.fixture
def sparse_run(run_program, tmp_path):
    """A folder of runs with one whose network has dead channels."""
    runs = tmp_path / "runs"
    overrides = [*SHORT, f"runs_dir={runs}", "skip_recorded=false", "logger=none"]
    assert (
        run_program("experiments/train.py", "experiment=demo/resnet_digits", *overrides).code == 0
    )
    (network,) = runs.glob("*/*/*/model.pt")
    state = torch.load(network, weights_only=True)
    for name, tensor in state.items():
        if name.endswith("conv1.weight"):
            tensor[::2] = 0
    result = json.loads((network.parent / "result.json").read_text())
    result["record"]["zero_fraction"] = 0.6
    (network.parent / "result.json").write_text(json.dumps(result))
    torch.save(state, network)
    return runs


def test_sparse_networks_are_compared_as_files(load, monkeypatch, tmp_path, capfd, sparse_run):
    bench = load("bench_files")
    monkeypatch.setattr(bench, "ResNet18", lambda: ResNet18(width=4))
    output = tmp_path / "files.csv"
    arguments = ["--sparsities", "0.9", "--rounds", "1", "--runs", str(sparse_run)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--output", str(output)])
    bench.main()
    rows = pd.read_csv(output)
    assert list(rows["network"].unique()) == [
        "ResNet18, random zeros", "demo/resnet_digits pwd p=0.8 60 %"
    ]  # fmt: skip
    assert list(rows["format"].unique()) == list(bench.FORMATS)
    sizes = rows.pivot(index="network", columns="format", values="bytes")
    assert (sizes["save_sparse"] < 0.75 * sizes["torch.save"]).all()
    assert (sizes["save_sparse bf16"] < sizes["save_sparse"]).all()
    reached = rows[rows["network"].str.startswith("demo")].set_index("format")["val_accuracy"]
    assert reached.notna().sum() == 2
    assert "Sparse networks as files" in capfd.readouterr().out


def test_what_compaction_leaves_of_a_run_and_of_what_is_shipped(
    load, monkeypatch, tmp_path, capfd, sparse_run
):
    results = tmp_path / "results"
    ((scale, name, result),) = records.recorded_runs(sparse_run)
    record = result["record"] | {"sparsity": 0.6}
    records.write(results / scale / f"{name}.csv", pd.DataFrame([record]))
    (network,) = sparse_run.glob("*/*/*/model.pt")
    shipped = results / "networks" / scale / name / f"{record['run_id']}.safetensors"
    shipped.parent.mkdir(parents=True)
    save_sparse(torch.load(network, weights_only=True), shipped)
    (shipped.parent / "unknown.safetensors").write_bytes(b"")
    bench = load("bench_compact")
    output = tmp_path / "compact.csv"
    arguments = ["--runs", str(sparse_run), "--results", str(results), "--batch-sizes", "2"]
    arguments += ["--seconds", "0.01", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    rows = pd.read_csv(output)
    row, of_run = rows.to_dict("records")
    assert row["network"] == f"demo/resnet_digits pwd p=0.8 60 % {record['run_id']}"
    same = ["sparsity", "parameters", "parameters_left", "multiply_adds", "multiply_adds_left"]
    assert [row[column] for column in same] == [of_run[column] for column in same]
    said = capfd.readouterr().out
    assert "is left out: no recorded run has the id unknown" in " ".join(said.split())
    assert "What compact leaves" in said
    assert 0.3 < row["parameters_left"] < 0.9
    assert 0.3 < row["multiply_adds_left"] < 0.9
    assert row["speedup"] == pytest.approx(
        row["milliseconds"] / row["compact_milliseconds"], rel=0.1
    )


def test_no_sparse_network_to_compact(load, monkeypatch, tmp_path, capsys):
    bench = load("bench_compact")
    places = ["--runs", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *places])
    with pytest.raises(SystemExit):
        bench.main()
    assert "no sparse network in" in capsys.readouterr().err


@pytest.mark.slow
def test_optimizers_are_compared_in_the_trainer(load, monkeypatch, tmp_path, capsys):
    bench = load("bench_training")
    monkeypatch.setattr(bench, "GPU_CASES", {"tiny": ["experiment=demo/nanogpt_pydoc"]})
    output = tmp_path / "training.csv"
    arguments = ["--optimizers", "--seconds", "0.01", "--rounds", "1", "--output", str(output)]
    words = ["trainer.threads=1", "trainer.steps=200", "trainer.eval_every=200"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--", *words])
    bench.main()
    rows = pd.read_csv(output)
    assert list(rows["loop"]) == [*bench.OPTIMIZERS, bench.LOOP]
    assert rows["step_ratio"].iloc[0] == 1
    assert (rows["per_second"] > 0).all()
    assert "AdamW fused, capturable" in capsys.readouterr().out


def test_kernels_are_counted_without_copies_and_marks(load):
    common = load("bench_common")
    events = [
        SimpleNamespace(name="adam_pwd", device_type=DeviceType.CUDA),
        SimpleNamespace(name="void multi_tensor_apply<...>", device_type=DeviceType.CUDA),
        SimpleNamespace(name="Memcpy HtoD (Pageable -> Device)", device_type=DeviceType.CUDA),
        SimpleNamespace(name="Memset (Device)", device_type=DeviceType.CUDA),
        SimpleNamespace(name="Optimizer.step#AdamW.step", device_type=DeviceType.CUDA),
        SimpleNamespace(name="mine", device_type=DeviceType.CUDA, is_user_annotation=True),
        SimpleNamespace(name="aten::add", device_type=DeviceType.CPU),
    ]
    assert common.kernels_of(events) == 2


@pytest.mark.parametrize(("count", "said"), [("0", "0: must be"), ("1000000", "must be at most")])
@pytest.mark.parametrize("bench", ["bench_optimizer", "bench_inference"])
def test_threads_that_no_machine_bears_are_refused(load, monkeypatch, capsys, bench, count, said):
    monkeypatch.setattr(sys, "argv", ["bench", "--threads", count])
    with pytest.raises(SystemExit):
        load(bench).main()
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["mps", "nosuch"])
@pytest.mark.parametrize("bench", ["bench_optimizer", "bench_training"])
def test_a_device_that_is_none_is_refused(load, monkeypatch, capsys, bench, name):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", name])
    with pytest.raises(SystemExit):
        load(bench).main()
    assert f"--device {name}: must be cpu or cuda" in capsys.readouterr().err
