from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pnorm_decay.data import Digits
from pnorm_decay.models import ResNet18
from pnorm_decay.training import checkpoint
from pnorm_decay.training.evaluation import cross_entropy, evaluate
from pnorm_decay.training.machine import check_channels_last, make_accelerator
from pnorm_decay.training.settings import ConfigError, TrainerSettings
from pnorm_decay.training.trainer import is_finite, restore_own

CPU = torch.device("cpu")


def test_cross_entropy_is_the_mean_over_every_prediction():
    logits = torch.randn(2, 3, 5)
    targets = torch.randint(5, (2, 3))
    chosen = logits.log_softmax(-1).gather(-1, targets[..., None])
    assert cross_entropy(logits, targets) == pytest.approx(-chosen.mean().item(), rel=1e-5)


def test_evaluation_covers_the_whole_validation_part_whatever_the_batch():
    data = Digits()
    data.setup(CPU)

    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.full((len(images),), 3), 10) * 2.0

    labels = torch.cat([targets for _, targets in data.val_batches(100)])
    share = (labels == 3).double().mean().item()
    normaliser = math.log(math.exp(2) + 9)
    for batch in (7, 1000):
        settings = TrainerSettings(steps=1, val_batch_size=batch)
        loss, accuracy = evaluate(Always(), data, settings, make_accelerator(CPU, "fp32"))
        assert accuracy == pytest.approx(100 * share)
        assert loss == pytest.approx(normaliser - 2 * share, rel=1e-5)


def test_evaluation_leaves_the_model_in_training_mode_without_touching_it():
    data = Digits()
    data.setup(CPU)
    model = ResNet18(in_channels=1, width=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainerSettings(steps=1, channels_last=False)
    evaluate(model, data, settings, make_accelerator(CPU, "fp32"))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_channels_last_is_refused_where_it_would_corrupt_memory():
    with pytest.raises(ConfigError, match="channels_last=false"):
        check_channels_last(ResNet18(width=8), CPU)
    check_channels_last(ResNet18(width=16), CPU)
    check_channels_last(ResNet18(width=8), torch.device("cuda"))


def test_a_checkpoint_of_an_older_version_is_taken_up():
    torch.manual_seed(3)
    state = {"loss_sum": torch.tensor(2.5), "random": checkpoint.random_state(CPU)}
    state["random"]["cuda"] = []  # as it was saved without a GPU
    expected = torch.rand(4)
    assert restore_own(state, make_accelerator(CPU, "fp32")) == 2.5
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("loss", ["train_loss", "val_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_diverges_by_either_loss(loss, value):
    losses = {"train_loss": 1.0, "val_loss": 1.0}
    assert is_finite(losses)
    assert not is_finite(losses | {loss: value})
