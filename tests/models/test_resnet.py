import pytest
import torch

from pnorm_decay.models import ResNet18


def test_paper_width_has_the_paper_parameter_count() -> None:
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_173_962


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8), (1, 1)])
def test_logits_shape_and_gradients_reach_every_parameter(channels: int, size: int) -> None:
    model = ResNet18(num_classes=7, in_channels=channels, width=4)
    logits = model(torch.randn(5, channels, size, size))
    assert logits.shape == (5, 7)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_strides_halve_the_image_three_times() -> None:
    model = ResNet18(width=4).eval()
    sizes: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]


def test_no_decayed_tensor_starts_at_zero() -> None:
    # Zero is absorbing under pWD with p < 2.
    for name, parameter in ResNet18(width=4).named_parameters():
        if parameter.ndim >= 2:
            assert (parameter != 0).all(), name


def test_activations_keep_their_scale_at_initialisation() -> None:
    torch.manual_seed(0)
    logits = ResNet18(width=16)(torch.randn(16, 3, 32, 32))
    assert 0.05 < logits.std() < 20


@pytest.mark.parametrize("name", ["num_classes", "in_channels", "width"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least 1, got {value}"):
        ResNet18(**{name: value})
