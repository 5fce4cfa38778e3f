"""experiments/generate.py through its command line, on made-up run folders."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from conftest import REPOSITORY
from deploy.test_inference import sparsened
from pnorm_decay.models.gpt import GPT
from pnorm_decay.models.resnet import ResNet18

GENERATE = "experiments/generate.py"
RECORD = {"run_id": "0123456789ab", "method": "pwd", "status": "finished"}
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 16, "bias": False}


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a finished run with a sparse network that has Shakespeare's characters."""
    torch.manual_seed(0)
    network = sparsened(GPT(65, **SIZES), 0.95)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    model = {"_target_": "pnorm_decay.models.GPT", "dropout": 0.0, **SIZES}
    (tmp_path / "result.json").write_text(
        json.dumps({"config": {"model": model}, "record": RECORD})
    )
    return tmp_path


def test_dense_and_sparse_write_the_same_text(run_program, run_folder):
    arguments = [str(run_folder), "--prompt", "ROMEO:", "--tokens", "60", "--seed", "3"]
    sparse, dense = run_program(GENERATE, *arguments), run_program(GENERATE, *arguments, "--dense")
    assert (sparse.code, dense.code) == (0, 0), sparse.err + dense.err
    assert sparse.out == dense.out
    assert sparse.out.startswith("ROMEO:")
    assert len(sparse.out) == len("ROMEO:") + 60 + 1
    assert "60 tokens, " in sparse.err
    assert "(dense; 9" in dense.err
    assert "% of the weights are zero; 1 threads)" in dense.err
    other = run_program(GENERATE, *arguments[:-1], "4")
    assert other.out != sparse.out


def test_bad_inputs_are_one_line(run_program, run_folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    images, damaged, strange = (tmp_path_factory.mktemp("run") for _ in range(3))
    result = json.loads((run_folder / "result.json").read_text())
    for folder in (damaged, strange):
        (folder / "result.json").write_text(json.dumps(result))
    (damaged / "model.pt").write_bytes(b"no network")
    torch.save(GPT(7, **SIZES).state_dict(), strange / "model.pt")
    model = {"_target_": "pnorm_decay.models.ResNet18", "width": 2}
    (images / "result.json").write_text(json.dumps({"config": {"model": model}, "record": RECORD}))
    torch.save(ResNet18(width=2).state_dict(), images / "model.pt")
    for arguments, message in (
        ([str(empty)], "holds no finished run: there is no result.json"),
        ([str(damaged)], "is damaged or of another model"),
        ([str(images)], "holds a ResNet18, which writes no text"),
        ([str(strange)], "the network has 7 characters"),
        ([str(run_folder), "--prompt", "é"], "the network knows no 'é'"),
        ([str(run_folder), "--prompt", ""], "--prompt must not be empty"),
        ([str(run_folder), "--tokens", "-1"], "--tokens must be at least 0, not -1"),
        ([str(run_folder), "--temperature", "nan"], "--temperature must be at least 0, not nan"),
        ([str(run_folder), "--seed", str(2**64)], "--seed must be from 0 to 2^64 - 1, not 184467"),
        ([str(run_folder), "--threads", "0"], "--threads must be at least 1, not 0"),
        ([str(run_folder), "--threads", "1000000"], "--threads=1000000: must be at most "),
    ):
        done = run_program(GENERATE, *arguments)
        assert done.code == 2
        assert message in done.err.splitlines()[-1]


@pytest.mark.slow
def test_a_reader_that_has_enough_gets_no_frames(run_folder):
    command = [sys.executable, str(REPOSITORY / GENERATE), str(run_folder), "--tokens", "100000"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout.read(50)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 0
