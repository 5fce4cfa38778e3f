from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from pnorm_decay.training import checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoint.pt"


def test_what_was_saved_is_loaded_and_the_one_before_is_kept(path):
    assert checkpoint.load(path) is None
    for step in (1, 2, 3):
        state = {"step": step, "weights": torch.arange(3.0), "history": [{"loss": 0.1}]}
        checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert loaded["step"] == 3
    assert loaded["history"] == [{"loss": 0.1}]
    assert torch.equal(loaded["weights"], torch.arange(3.0))
    assert checkpoint.read(checkpoint.previous(path))["step"] == 2
    assert len(list(path.parent.iterdir())) == 2
    checkpoint.remove(path)
    assert list(path.parent.iterdir()) == []


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut_short, one_bit_changed, lambda content: b""])
def test_of_a_damaged_checkpoint_the_previous_one_is_taken(path, capsys, damage):
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoint.load(path) == {"step": 1}
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "checkpoint.pt is left out" in message

    spare = checkpoint.previous(path)
    spare.write_bytes(damage(spare.read_bytes()))
    assert checkpoint.load(path) is None  # the run starts again


def test_a_checkpoint_is_never_code_to_run(path):
    class Malicious:
        def __reduce__(self):
            return (print, ("run",))

    checkpoint.save(path, {"x": Malicious()})
    with pytest.raises(checkpoint.CheckpointError, match="Weights only load failed"):
        checkpoint.read(path)


def test_a_full_disk_leaves_the_older_checkpoint(path, monkeypatch):
    checkpoint.save(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pnorm_decay.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1}


def test_every_random_generator_goes_on_where_it_was(path):
    def draw() -> list[float]:
        dropped = nn.functional.dropout(torch.ones(4)).tolist()
        return [random.random(), np.random.rand(), np.random.randn(), *dropped]

    np.random.randn()  # half of a pair: the generator holds the other half
    checkpoint.save(path, {"random": checkpoint.random_state(CPU)})
    expected = draw()
    draw()
    checkpoint.set_random_state(checkpoint.load(path)["random"], CPU)
    assert draw() == expected


@pytest.mark.parametrize("before", [False, True], ids=["now", "a state of every GPU, as before"])
def test_a_run_takes_its_own_gpus_generator_to_another_gpu(monkeypatch, before):
    generators = {number: torch.tensor([number], dtype=torch.uint8) for number in range(4)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generators[device.index])
    state = checkpoint.random_state(torch.device("cuda", 2))
    assert state["cuda"] is generators[2]
    if before:
        state["cuda"] = list(generators.values())
    restored = {}

    def restore(state: torch.Tensor, device: torch.device) -> None:
        restored[device.index] = int(state)

    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    checkpoint.set_random_state(state, torch.device("cuda", 1))
    assert restored == {1: 1 if before else 2}
    checkpoint.set_random_state(state, CPU)
    assert restored == {1: 1 if before else 2}
