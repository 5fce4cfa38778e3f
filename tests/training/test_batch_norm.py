"""Statistics of batch norms estimated anew: what they become, and that they go back."""

import copy

import torch
from torch import nn

from pnorm_decay.training.batch_norm import batch_norms, recalibrated


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.0))
    model.append(nn.BatchNorm2d(3, track_running_stats=False))
    return model.eval()


def test_the_statistics_are_the_mean_over_the_batches_and_go_back() -> None:
    model = network()
    batches = [torch.randn(8, 2, 4, 4) + number for number in range(3)]
    model.train()(torch.randn(8, 2, 4, 4))  # statistics of its own, which do not count
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with recalibrated(model, batches) as inside:
        (norm,) = batch_norms(inside)
        outputs = [model[0](batch) for batch in batches]
        expected = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
        torch.testing.assert_close(norm.running_mean, expected)
        assert not inside.training
        assert int(norm.num_batches_tracked) == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model[1].momentum == 0.1


def test_they_go_back_after_an_error() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())

    def broken():
        yield torch.randn(8, 2, 4, 4)
        raise RuntimeError

    try:
        with recalibrated(model, broken()):
            raise AssertionError
    except RuntimeError:
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
