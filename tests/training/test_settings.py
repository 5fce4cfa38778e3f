from __future__ import annotations

import os

import pytest
import torch

from pnorm_decay.training.settings import ConfigError, TrainerSettings, cores


def test_length_in_epochs_and_in_steps():
    assert TrainerSettings(epochs=2.5).total_steps(40) == 100
    assert TrainerSettings(epochs=0.7).total_steps(11) == 8  # 7.7 rounded
    assert TrainerSettings(steps=7).total_steps(None) == 7
    with pytest.raises(ConfigError, match=r"set trainer\.steps"):
        TrainerSettings(epochs=1).total_steps(None)


def test_evaluation_interval():
    assert TrainerSettings(steps=100).evaluation_interval(100, None) == 10
    assert TrainerSettings(epochs=2).evaluation_interval(80, 40) == 40
    assert TrainerSettings(steps=100, eval_every=3).evaluation_interval(100, 40) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": 1, "steps": 1},
        {"epochs": 0},
        {"epochs": float("nan")},
        {"steps": 1.5},
        {"steps": True},
        {"steps": 1, "batch_size": "many"},
        {"steps": 1, "eval_every": 0},
        {"steps": 1, "clip_grad_norm": -1.0},
        {"steps": 1, "checkpoint_minutes": None},
        {"steps": 1, "threads": "all"},
        {"steps": 1, "threads": 0},
        {"steps": 1, "device": "abacus"},
        {"steps": 1, "precision": "fp8"},
        {"steps": 1, "save_model": 1},
    ],
)
def test_bad_values_name_the_key(options):
    with pytest.raises(ConfigError, match=r"trainer\.\w+="):
        TrainerSettings.checked(options, "trainer")


def test_unknown_key():
    with pytest.raises(ConfigError, match=r"trainer\.stesp=3"):
        TrainerSettings.checked({"stesp": 3}, "trainer")


def test_threads_are_shared_among_workers(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert TrainerSettings(steps=1).resolve_threads(1) == cores()
    assert TrainerSettings(steps=1).resolve_threads(10 * cores()) == 1
    assert TrainerSettings(steps=1, threads=3).resolve_threads(2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # as a cluster gives them to a worker
    assert TrainerSettings(steps=1).resolve_threads(2) == 5


def test_precision_follows_the_hardware():
    cpu = torch.device("cpu")
    able = torch.cpu.get_capabilities()
    fast = able.get("amx_bf16", False) or able.get("avx512_bf16", False)
    assert TrainerSettings(steps=1).resolve_precision(cpu) == ("bf16" if fast else "fp32")
    assert TrainerSettings(steps=1, precision="bf16").resolve_precision(cpu) == "bf16"
    with pytest.raises(ConfigError, match="fp16"):
        TrainerSettings(steps=1, precision="fp16").resolve_precision(cpu)


def test_each_process_of_a_run_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = TrainerSettings(steps=1)
    assert settings.resolve_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert settings.resolve_device() == torch.device("cuda", 1)
    assert TrainerSettings(steps=1, device="cpu").resolve_device() == torch.device("cpu")
