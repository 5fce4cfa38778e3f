"""Statistics of batch norms estimated anew: what they become, and that they go back."""

import copy

import pytest
import torch
from torch import nn

from pnorm_decay.models import ResNet18
from pnorm_decay.training.batch_norm import batch_norms, check_one_image, recalibrated
from pnorm_decay.training.settings import ConfigError


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


@pytest.mark.parametrize(("size", "is_enough"), [(8, False), (9, True)])
def test_single_images_are_enough_where_they_leave_several_values(size, is_enough) -> None:
    model = nn.Sequential(nn.Dropout(0.5), ResNet18(in_channels=1, width=4)).eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    image = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    if is_enough:
        check_one_image(model, image)
    else:
        with pytest.raises(ConfigError, match=r"trainer\.batch_size=1: must be at least 2"):
            check_one_image(model, image)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    # What is refused is what torch refuses.
    try:
        model.train()(image)
    except ValueError:
        assert not is_enough
    else:
        assert is_enough


def test_a_network_without_batch_norm_takes_single_inputs() -> None:
    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise ValueError("of its own")

    check_one_image(Other(2, 2), torch.ones(1, 2))
