"""The benchmark of inference, on tiny networks."""

from __future__ import annotations

import sys
from collections import OrderedDict

import pandas as pd
import pytest
import torch

from pnorm_decay.deploy import inference, save_sparse
from pnorm_decay.deploy.inference import InBfloat16, InParts
from pnorm_decay.figures.inference import read
from pnorm_decay.models.gpt import GPT
from pnorm_decay.models.resnet import ResNet18


@pytest.fixture
def bench(load, monkeypatch):
    module = load("bench_inference")
    monkeypatch.setattr(module, "ResNet18", lambda *sizes: ResNet18(*(sizes or (10, 3, 2))))
    monkeypatch.setattr(module, "nanogpt", lambda: GPT(11, 1, 2, 8, 32))
    monkeypatch.setattr(inference, "SECONDS", 0.02)
    return module


def run(bench, monkeypatch, output, *arguments: str) -> list[dict]:
    given = ["--threads", "1", "--rounds", "1", "--seconds", "0.001", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["bench", *given, "--output", str(output), *arguments])
    bench.main()
    return pd.read_csv(output).to_dict("records")


def test_it_writes_a_row_for_each_form_and_resumes(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "peak_megabytes", lambda *_: 12.5)
    output = tmp_path / "inference.csv"
    chosen = ["--cases", "write text", "1 image", "--sparsity", "0.5", "0.95"]
    rows = run(bench, monkeypatch, output, *chosen)
    dense = ["dense fp32", "dense bf16"]
    last = [f"{form} channels_last" for form in dense]
    assert [(row["case"], row["form"]) for row in rows] == [
        *(("write text", form) for form in [*dense, "sparse", "sparse"]),
        *(("1 image", form) for form in [*dense, *last, "sparse", "sparse"]),
    ]
    for case in ("write text", "1 image"):
        of_case = [row for row in rows if row["case"] == case]
        best = min(row["milliseconds"] for row in of_case if "sparse" not in row["form"])
        for row in of_case:
            assert row["ratio"] == pytest.approx(best / row["milliseconds"], rel=0.02, abs=0.002)
            assert row["peak_megabytes"] == 12.5
        sparse = [row for row in of_case if row["form"] == "sparse"]
        assert [round(row["sparsity"], 1) for row in sparse] == pytest.approx([0.5, 0.95], abs=0.1)
        assert sparse[0]["multiply_adds_left"] > 2 * sparse[1]["multiply_adds_left"] > 0
    assert len(read(output)) == len(rows)
    assert "1 image, 1 threads, random zeros" in capsys.readouterr().out
    again = run(bench, monkeypatch, output, *chosen[:3], "16 images", *chosen[3:])
    assert again[: len(rows)] == rows
    assert {row["case"] for row in again[len(rows) :]} == {"16 images"}


def test_sparse_files_are_networks(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "peak_megabytes", lambda *_: 12.5)
    networks = {"images": ResNet18(width=2), "text": GPT(11, 1, 2, 8, 32, bias=False)}
    paths = [tmp_path / f"{name}.safetensors" for name in networks]
    for path, network in zip(paths, networks.values(), strict=True):
        save_sparse(bench.with_random_zeros(network, 0.9), path)
    words = ["--networks", *map(str, paths), "--cases", "1 image", "read a prompt"]
    rows = run(bench, monkeypatch, tmp_path / "inference.csv", *words)
    forms = {(row["case"], row["network"], row["form"]) for row in rows}
    assert {case: network for case, network, _ in forms} == {
        "1 image": "images", "read a prompt": "text"
    }  # fmt: skip
    assert {"sparse", "compact", "compact sparse"} <= {form for _, _, form in forms}


def test_a_sparse_file_of_another_model_is_one_line(bench, monkeypatch, tmp_path, capsys):
    save_sparse(torch.nn.Linear(3, 2), tmp_path / "other.safetensors")
    with pytest.raises(SystemExit):
        run(
            bench,
            monkeypatch,
            tmp_path / "x.csv",
            "--networks",
            str(tmp_path / "other.safetensors"),
        )
    assert "other.safetensors holds neither a GPT nor a ResNet18" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(bench):
    small, large = (
        bench.peak_megabytes(
            "1 image", "sparse", InParts(torch.nn.Sequential(OrderedDict(conv1=conv)))
        )
        for conv in (torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 300_000, 5, stride=32))
    )
    assert large - small > 80  # 22.5 million weights, unless it is not Linux


def test_bad_arguments(bench, monkeypatch, tmp_path, capsys):
    for arguments, message in (
        (["--sparsity", "1.5"], "--sparsity must be in"),
        (["--rounds", "0"], "must be at least 1"),
        (["--networks", str(tmp_path)], "holds no finished run"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(bench, monkeypatch, tmp_path / "inference.csv", *arguments)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert message in captured.err + captured.out


def test_what_a_network_reads_does_not_depend_on_what_it_is_wrapped_in(bench):
    for model, case in ((GPT(11, 1, 2, 8, 32), "read a prompt"), (ResNet18(width=2), "1 image")):
        shape = bench.example_of(case, model).shape
        assert bench.example_of(case, InBfloat16(model)).shape == shape
        assert bench.example_of(case, InParts(model)).shape == shape


def test_random_zeros_are_zeros_without_a_sign(bench):
    model = bench.with_random_zeros(GPT(11, 1, 2, 8, 32), 0.5)
    zeros = torch.cat([w[w == 0] for w in model.parameters()])
    assert len(zeros) > 100
    assert not zeros.signbit().any()
