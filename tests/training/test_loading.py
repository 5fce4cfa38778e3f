"""`load_run`: a finished run's network and config, from its folder."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from conftest import SHORT
from pnorm_decay.models import ResNet18
from pnorm_decay.records import RecordError
from pnorm_decay.training import load_run
from pnorm_decay.training.settings import ConfigError

TEXT = ["experiment=demo/nanogpt_pydoc", "trainer.steps=2", "trainer.threads=1"]
IMAGES = ["experiment=demo/resnet_digits", *SHORT]


@pytest.fixture
def train(run_program, tmp_path):
    def train(*overrides):
        places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
        done = run_program("experiments/train.py", *overrides, *places, "logger=none")
        assert done.code == 0, done.err
        (path,) = (tmp_path / "runs").glob("*/*/*/metrics.csv")
        return path.parent

    return train


@pytest.mark.parametrize(
    ("experiment", "inputs"),
    [(IMAGES, torch.zeros(2, 1, 8, 8)), (TEXT, torch.zeros(2, 4, dtype=torch.long))],
)
def test_it_is_the_network_that_the_run_left(train, experiment, inputs):
    folder = train(*experiment, "optimizer.p=0.7")
    model, config = load_run(str(folder))
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in saved)
    assert not model.training
    assert len(model(inputs)) == 2
    assert config["optimizer"]["p"] == 0.7
    assert config == json.loads((folder / "result.json").read_text())["config"]


def test_the_device_is_the_asked_one(train):
    model, _ = load_run(train(*IMAGES), "meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


class Linear(nn.Module):
    """A model of somebody's own, whose weights say nothing of the data."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64 * in_channels, num_classes)


def test_a_model_of_ones_own_is_loaded_too(train, monkeypatch):
    folder = train(*IMAGES)
    monkeypatch.setattr("pnorm_decay.models.Linear", Linear, raising=False)
    path = folder / "result.json"
    result = json.loads(path.read_text())
    result["config"]["model"] = {"_target_": "pnorm_decay.models.Linear"}
    path.write_text(json.dumps(result))
    torch.save(Linear(10, 1).state_dict(), folder / "model.pt")
    assert load_run(folder)[0].layer.weight.shape == (10, 64)


def test_what_cannot_be_loaded_is_said(train, tmp_path):
    with pytest.raises(ConfigError, match=r"no folder .*nowhere; a run is in runs/<scale>"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no finished run: there is no result\.json"):
        load_run(tmp_path)
    folder = train(*IMAGES)
    whole = (folder / "model.pt").read_bytes()
    for damaged in (b"", b"nothing", whole[:1000], whole[:-1000]):
        (folder / "model.pt").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"model\.pt is damaged or of another model"):
            load_run(folder)
    for other in (ResNet18(10, 1, width=6).state_dict(), {"weight": torch.ones(1)}, [1]):
        torch.save(other, folder / "model.pt")
        with pytest.raises(ConfigError, match=r"model\.pt is damaged or of another model"):
            load_run(folder)
    (folder / "model.pt").unlink()
    with pytest.raises(ConfigError, match=r"no saved network: there is no model\.pt"):
        load_run(folder)
    (folder / "result.json").write_text("{")
    with pytest.raises(RecordError, match=r"result\.json is not valid JSON"):
        load_run(folder)
