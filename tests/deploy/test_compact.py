from __future__ import annotations

import copy
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from pnorm_decay.deploy import CompactError, channel_groups, compact
from pnorm_decay.models import GPT, ResNet18


def without_units(model: nn.Module, share: float = 0.5, seed: int = 0) -> nn.Module:
    """Some units of every layer lose their incoming weights, others are read by nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                outputs, inputs = module.weight.shape[:2]
                module.weight[torch.rand(outputs, generator=generator) < share] = 0
                if module.weight.shape[1] > 1:
                    module.weight[:, torch.rand(inputs, generator=generator) < share / 4] = 0
            if isinstance(module, nn.BatchNorm2d):
                module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.6)
                module.running_mean.uniform_(-0.1, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def assert_same_outputs(small: nn.Module, model: nn.Module, inputs: torch.Tensor) -> None:
    expected, outputs = model.eval()(inputs), small.eval()(inputs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(outputs, expected, rtol=0, atol=2e-5 * scale)


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.GELU()]
    return nn.Sequential(*layers[:-1])


# ---------------------------------------------------------------------------- networks


def needed_neurons(model: nn.Sequential) -> list[int] | None:
    """How many neurons each hidden layer of an MLP needs, by a loop over layers and neurons.

    None if a layer needs none: it keeps one for the form, and what that one reads.
    """
    weights = [layer.weight.detach().double() for layer in model if isinstance(layer, nn.Linear)]
    constant = [torch.zeros(weights[0].shape[1], dtype=torch.bool)]
    for weight in weights:
        constant.append(
            torch.tensor(
                [all(w == 0 or constant[-1][i] for i, w in enumerate(row)) for row in weight]
            )
        )
    needed = [set(range(len(weights[-1])))]
    for weight, fixed in zip(reversed(weights[1:]), reversed(constant[1:-1]), strict=True):
        reads = {
            i
            for i in range(weight.shape[1])
            for o in needed[0]
            if weight[o, i] != 0 and not fixed[i]
        }
        if not reads:
            return None
        needed.insert(0, reads)
    return [len(neurons) for neurons in needed[:-1]]


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    share=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_mlp_keeps_just_the_neurons_that_matter(widths, share, bias, seed):
    torch.manual_seed(seed)
    model = mlp(*widths, bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[torch.rand(parameter.shape) < share] = 0
    small = compact(model, torch.randn(3, widths[0]))
    assert_same_outputs(small, model, torch.randn(20, widths[0]))
    hidden = [layer.out_features for layer in small if isinstance(layer, nn.Linear)][:-1]
    assert needed_neurons(model) in (None, hidden)
    assert size(compact(small, torch.randn(3, widths[0]))) == size(small)


def test_dead_neurons_with_biases_become_part_of_the_next_bias():
    """The issue's case: 84 dead neurons, whose biases are not zero."""
    torch.manual_seed(0)
    model = mlp(64, 128, 10)
    with torch.no_grad():
        model[0].weight[:84] = 0
    small = compact(model, torch.randn(2, 64))
    assert small[0].out_features == small[2].in_features == 44
    assert not torch.equal(small[2].bias, model[2].bias)
    assert_same_outputs(small, model, torch.randn(50, 64))
    assert small.compaction.layers == {"0.weight": (128, 44)}
    assert "0.weight: 44 of 128 units" in str(small.compaction)


NETWORKS = {
    "ResNet18": (lambda: ResNet18(width=8), (3, 16, 16), 0.8),
    "torchvision ResNet": (lambda: torchvision.models.resnet18(num_classes=9), (3, 64, 64), 0.8),
    "bottleneck ResNet": (lambda: torchvision.models.resnet50(num_classes=9), (3, 64, 64), 0.8),
    "VGG with batch norm": (lambda: small_vgg(), (3, 32, 32), 0.6),
    "MobileNetV2": (
        lambda: torchvision.models.mobilenet_v2(num_classes=9, width_mult=0.35), (3, 64, 64), 0.8,
    ),
}  # fmt: skip


def small_vgg() -> nn.Module:
    model = torchvision.models.VGG(
        torchvision.models.vgg.make_layers([16, "M", 32, "M", 32, "M"], batch_norm=True), 9
    )
    model.classifier = nn.Sequential(nn.Linear(32 * 49, 60), nn.ReLU(), nn.Linear(60, 9))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_for_images(name):
    make, shape, at_most = NETWORKS[name]
    torch.manual_seed(0)
    model = without_units(make())
    before = copy.deepcopy(model.state_dict())
    small = compact(model, torch.randn(2, *shape))
    assert_same_outputs(small, model, torch.randn(3, *shape))
    assert size(small) < at_most * size(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for module in small.modules():  # the sizes that layers show are those of their weights
        if isinstance(module, nn.Conv2d):
            shape_shown = module.out_channels, module.in_channels // module.groups
            assert shape_shown == module.weight.shape[:2]
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)
    small(torch.randn(2, *shape)).sum().backward()  # it can be trained on
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_a_gpt_loses_neurons_and_value_dimensions(bias):
    torch.manual_seed(0)
    model = GPT(9, 2, 2, 16, 8, bias=bias)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc.weight[:40] = 0
            block.attention.qkv.weight[32:35] = 0  # of values, three of the first head
            block.attention.proj.weight[:, 8:10] = 0  # two of the second
            for parameter in (block.mlp.fc.bias, block.attention.qkv.bias):
                if parameter is not None:
                    parameter.normal_()
    example = torch.randint(9, (2, 8))
    small = compact(model, example)
    assert small.blocks[0].mlp.fc.out_features == small.blocks[1].mlp.proj.in_features == 24
    # Both heads lose as many as the one that loses least.
    assert small.blocks[0].attention.qkv.out_features == 16 + 16 + 12
    assert small.blocks[0].attention.proj.in_features == 12
    assert_same_outputs(small, model, torch.randint(9, (5, 6)))


def test_a_whole_head_that_is_dead_takes_nothing_from_the_others():
    torch.manual_seed(0)
    model = GPT(9, 1, 2, 16, 8)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[32:40] = 0
    small = compact(model, torch.randint(9, (2, 8)))
    assert small.compaction.layers == {}
    assert small.compaction.kept == {"as many as other heads need": 8}
    assert_same_outputs(small, model, torch.randint(9, (2, 8)))


def test_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, :50] = 0
            block.mlp.c_fc.bias.normal_()
    small = compact(model, torch.randint(50, (2, 8)))
    assert small.transformer.h[0].mlp.c_fc.nf == 78
    tokens = torch.randint(50, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, model(tokens).logits)


# ---------------------------------------------------------------------------- exactness


class Padded(nn.Module):
    """A channel that is 0.5 everywhere, and zero beyond the border."""

    def __init__(self, kernel: int, padding: int, value: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 1)
        self.second = nn.Conv2d(3, 2, kernel, padding=padding, bias=False)
        with torch.no_grad():
            self.first.weight[1] = 0
            self.first.bias[1] = value

    def forward(self, images):
        return self.second(self.first(images).relu())


@pytest.mark.parametrize(
    ("kernel", "padding", "value", "goes"),
    [(1, 0, 0.5, True), (3, 0, 0.5, True), (3, 1, 0.5, False), (3, 1, -0.5, True)],
)
def test_a_constant_goes_where_that_is_exact(kernel, padding, value, goes):
    torch.manual_seed(0)
    model = Padded(kernel, padding, value)
    small = compact(model, torch.randn(1, 1, 5, 5))
    assert small.first.out_channels == (2 if goes else 3)
    assert (small.second.bias is None) == (value < 0 or not goes)
    assert_same_outputs(small, model, torch.randn(3, 1, 6, 6))
    if not goes:
        assert str(small.compaction).splitlines() == [
            "Nothing could be removed.",
            "1 unit that no weight enters stays: "
            "constants that what reads them cannot take into its bias",
        ]


class Shared(nn.Module):
    """One layer twice, on different constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.again(self.again(self.first(x)).relu()).relu())


class Fixed(nn.Module):
    """Code that counts on 2 x 2 x 6 features after the convolution, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(1, 6, 3), nn.Linear(24, 8), nn.Linear(8, 2)

    def forward(self, images):
        return self.head(self.hidden(self.conv(images).relu().view(-1, 24)).relu())


class Gated(nn.Module):
    """Half of a layer's units are factors of the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 12), nn.Linear(6, 3)

    def forward(self, x):
        value, gate = self.first(x).chunk(2, dim=-1)
        return self.head(value * gate.sigmoid())


class SelfAttention(nn.Module):
    """Softmax, products and sums written out, with a residual stream and a mean over it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.q, self.k, self.v = (nn.Linear(8, 6, bias=i > 1) for i in range(3))
        self.out, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        scores = (self.q(x) @ self.k(x).mT).softmax(-1)
        x = x + self.out(scores @ self.v(x))
        return self.head(x.mean(1))


class Scaled(nn.Module):
    """A parameter along the channels that is of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.head(self.first(x) * self.scale)


ODD = {
    "shared layer": (Shared, (4,)),
    "fixed sizes": (Fixed, (1, 4, 4)),
    "gate": (Gated, (4,)),
    "attention": (SelfAttention, (5, 4)),
    "scale": (Scaled, (4,)),
    "layer norm": (lambda: nn.Sequential(mlp(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), (4,)),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)
        ),
        (2, 5, 5),
    ),
    "depthwise with a multiplier": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        ),
        (2, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.MaxPool2d(2),
            nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
        ),
        (2, 6, 6),
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.AvgPool1d(2), nn.Conv1d(6, 2, 1)
        ),
        (2, 12),
    ),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)
        ),
        (4,),
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8),
    ),
    "recurrent": (lambda: Last(), (5, 4)),
}  # fmt: skip


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru, self.head = nn.Linear(4, 6), nn.GRU(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.gru(self.first(x))[0])


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_network_its_outputs_stay(name, seed):
    make, shape = ODD[name]
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 and "original1" not in path:  # the norm of zeros divides by zero
                parameter[torch.rand(len(parameter)) < 0.4] = 0
    small = compact(model, torch.randn(2, *shape))
    assert_same_outputs(small, model, torch.randn(4, *shape))


class Written(nn.Module):
    """What it writes in place depends on the input, though the buffer was made of nothing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.head = nn.Linear(4, 6), mlp(6, 5, 3)
        with torch.no_grad():
            self.first.weight[:3] = 0

    def forward(self, x):
        hidden = self.first(x)
        if self.how == "into a buffer":
            buffer = torch.zeros(len(x), 6)
            buffer[:, 1:3] = hidden[:, 3:5]
            return self.head(buffer)
        if self.how == "through a view":
            hidden.view(len(x), -1).mul_(x.sum())
            return self.head(hidden)
        if self.how == "by way of Python":
            return self.head(torch.full((len(x), 6), float(x.sum())))
        hidden.relu_()
        return self.head(hidden)


@pytest.mark.parametrize(
    "how", ["into a buffer", "through a view", "by way of Python", "all of it"]
)
def test_what_is_written_in_place_is_no_constant(how):
    torch.manual_seed(0)
    model = Written(how)
    small = compact(model, torch.randn(1, 4))  # one input, for which all is the same everywhere
    assert_same_outputs(small, model, torch.randn(5, 4))
    if how == "all of it":
        assert small.first.out_features == 3


def test_a_square_conv1d_folds_along_the_right_dimension():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    conv1d = transformers.pytorch_utils.Conv1D
    model = nn.Sequential(conv1d(6, 4), nn.GELU(), conv1d(6, 6))
    with torch.no_grad():
        model[0].weight[:, :2] = 0
        model[0].bias.normal_()
    small = compact(model, torch.randn(2, 4))
    assert small[0].nf == 4
    assert_same_outputs(small, model, torch.randn(5, 4))


def test_infinite_outputs_hide_no_difference():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(4, 8, 3)
            with torch.no_grad():
                self.layers[0].weight[:4] = 0

        def forward(self, x):
            return (self.layers(x) + len(self.layers[0].weight)).masked_fill(
                torch.tensor([True, False, False]), torch.inf
            )

    with pytest.raises(CompactError, match="differ by"):
        compact(Masked(), torch.randn(2, 4))


def test_how_much_goes_from_some_of_them():
    torch.manual_seed(0)
    model = Fixed()
    with torch.no_grad():
        model.conv.weight[:3] = model.hidden.weight[:5] = 0
    small = compact(model, torch.randn(1, 1, 4, 4))
    assert (small.conv.out_channels, small.hidden.out_features) == (6, 3)
    assert "reshaped in Fixed" in str(small.compaction)

    model = Gated()
    with torch.no_grad():
        model.first.weight[1] = 0
        model.first.bias[1] = 0
        model.head.weight[:, 4] = 0
    small = compact(model, torch.randn(2, 4))
    assert small.head.in_features == 5  # 4 with its gate; 0 * gate is not followed
    assert small.first.out_features == 10


def test_sixteen_bit_networks_lose_what_is_zero():
    torch.manual_seed(0)
    model = mlp(8, 16, 4)
    with torch.no_grad():
        model[0].weight[:8] = 0
        model[0].bias[:4] = 0
    small = compact(model.bfloat16(), torch.randn(2, 8, dtype=torch.bfloat16))
    assert small[0].out_features == 12  # a constant that is not zero would be rounded
    assert small[0].weight.dtype == torch.bfloat16


def test_modes_and_flags_stay():
    model = mlp(4, 8, 2).train()
    model[1].eval()
    model[2].weight.requires_grad_(False)
    with torch.no_grad():
        model[0].weight[:4] = 0
    small = compact(model, torch.randn(2, 4))
    assert [module.training for module in small] == [True, False, True]
    assert [p.requires_grad for p in small.parameters()] == [True, True, False, True]


def test_parameters_that_are_shared_stay_shared():
    torch.manual_seed(0)
    model = Shared()
    with torch.no_grad():
        model.again.weight[:3] = 0
    model.same = model.again
    small = compact(model, torch.randn(2, 4))
    assert small.same.weight is small.again.weight


# ---------------------------------------------------------------------------- bad inputs


def test_a_network_without_zeros_says_so(caplog):
    model = mlp(4, 8, 2)
    with caplog.at_level(logging.WARNING):
        small = compact(model, torch.randn(2, 4))
    assert size(small) == size(model)
    assert "Nothing could be removed" in caplog.text
    assert "every unit is read" in caplog.text


def test_nan_weights_matter_and_stay():
    model = mlp(4, 8, 2)
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[2].weight[:, 0] = torch.nan  # reads a constant, and makes NaN of it
    small = compact(model, torch.randn(2, 4))
    assert small[0].out_features == 5
    assert small(torch.randn(1, 4)).isnan().all()


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda: ResNet18(width=2), torch.randn(2, 1, 8, 8), r"\(2, 1, 8, 8\).*in conv1"),
        (lambda: mlp(4, 2), torch.randn(2, 5), r"Sequential does not take.*in 0:"),
        (lambda: GPT(9, 1, 2, 8, 4), torch.zeros(1, 5, dtype=torch.long), "5 tokens exceed"),
        (lambda: mlp(4, 2), [1.0], "a tensor that is not empty"),
        (lambda: mlp(4, 2), torch.randn(0, 4), "a tensor that is not empty"),
    ],
)
def test_examples_that_do_not_fit(model, example, message):
    with pytest.raises(CompactError, match=message):
        compact(model(), example)


def test_masks_of_torch_prune_have_to_be_made_permanent():
    model = mlp(4, 8, 2)
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    small = compact(model, torch.randn(2, 4))
    assert small[0].out_features == 8
    assert "The weight of 0 is computed in every call" in str(small.compaction)
    prune.remove(model[0], "weight")
    assert compact(model, torch.randn(2, 4))[0].out_features == 4


class Counting(nn.Module):
    """Its outputs tell how many units it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(4, 8, 2)
        with torch.no_grad():
            self.layers[0].weight[:4] = 0

    def forward(self, x):
        return self.layers(x) + len(self.layers[0].weight)


def test_outputs_that_would_change_are_an_error_and_the_model_stays():
    model = Counting()
    before = copy.deepcopy(model.state_dict())
    said = r"Counting without the units of layers\.0\.weight.*differ"
    with pytest.raises(CompactError, match=said):
        compact(model, torch.randn(2, 4))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("zeros", [0, 4])
def test_a_model_that_draws_random_numbers_is_told_so(zeros):
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(4, 8, 2)

        def forward(self, x):
            return self.layers(x) + torch.rand(2)

    model = Moody()
    with torch.no_grad():
        model.layers[0].weight[:zeros] = 0
    with pytest.raises(CompactError, match="Moody gives other outputs when it is called again"):
        compact(model, torch.randn(2, 4))


class Preparing(nn.Module):
    """It writes into its input, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(4, 8, 2)
        self.register_buffer("calls", torch.zeros(()))
        with torch.no_grad():
            self.layers[0].weight[:4] = 0

    def forward(self, x):
        self.calls += 1
        return self.layers(x.div_(255).sub_(0.5))


def test_the_example_and_the_state_of_the_model_stay():
    model, example = Preparing(), torch.rand(2, 4)
    before = example.clone()
    small = compact(model, example)
    assert torch.equal(example, before)
    assert model.calls == small.calls == 0
    assert small.layers[0].out_features == 4
    torch.testing.assert_close(small(before.clone()), model(before.clone()))


@pytest.mark.parametrize(
    "wrap", [SimpleNamespace, lambda logits: {1, 2}, lambda logits: logits.numpy()]
)
def test_outputs_that_cannot_be_looked_into_are_an_error(wrap):
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(4, 8, 2)

        def forward(self, x):
            logits = self.layers(x)
            return wrap(logits=logits)

    with pytest.raises(CompactError, match="Wrapping puts out no tensor"):
        compact(Wrapping(), torch.randn(2, 4))


def test_what_stands_beside_the_tensors_of_an_output_does_not_matter():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(4, 8, 2)
            with torch.no_grad():
                self.layers[0].weight[:3] = 0

        def forward(self, x):
            return {"logits": self.layers(x), "cache": SimpleNamespace(), "device": x.device}

    model, x = Caching(), torch.randn(2, 4)
    small = compact(model, x)
    assert small.layers[0].out_features == 5
    torch.testing.assert_close(small(x)["logits"], model(x)["logits"])


def as_buffers(model: nn.Module) -> nn.Module:
    """A model whose parameters are frozen: they are buffers."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return model


def test_constants_are_folded_into_frozen_layers_too():
    model, x = mlp(4, 8, 2), torch.randn(5, 4)
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, 3
    small = compact(as_buffers(model), x)
    assert small[0].out_features == 4
    torch.testing.assert_close(small(x), model(x))


def test_a_buffer_may_be_expanded_and_what_is_put_out_may_depend_on_one():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(4, 8, 2)
            self.register_buffer("mean", torch.zeros(1).expand(4))
            self.register_buffer("calls", torch.zeros(()))
            with torch.no_grad():
                self.layers[0].weight[:3] = 0

        def forward(self, x):
            self.calls += 1
            return self.layers(x - self.mean) * self.calls

    small = compact(Centred(), torch.randn(2, 4))
    assert small.layers[0].out_features == 5
    assert small.calls == 0


def test_a_view_of_a_weight_is_not_computed():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x @ self.weight.T + x @ self.weight.permute(1, 0)

    assert "computed" not in str(compact(Product(), torch.randn(2, 4)).compaction)


def test_constants_are_not_folded_through_a_sum_over_a_size():
    class Summing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
            with torch.no_grad():
                self.conv.weight[:8] = 0
                self.conv.bias[:4], self.conv.bias[4:8] = 1, -1  # after ReLU: constants and zeros

        def forward(self, x):
            return self.head(F.relu(self.conv(x)).sum((2, 3)))

    model = Summing()
    small = compact(model, torch.randn(2, 3, 8, 8))
    assert small.conv.out_channels == 12
    larger = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(small(larger), model(larger))


def test_only_a_module_is_made_smaller():
    with pytest.raises(TypeError, match="compact takes a module, not a dict"):
        compact({}, torch.randn(2, 4))


# ---------------------------------------------------------------------------- groups


def test_groups_of_an_mlp_in_a_transformer():
    model = GPT(9, 1, 2, 8, 4, bias=True)
    (group,) = channel_groups(model, torch.zeros(2, 4, dtype=torch.long))
    fc, proj = model.blocks[0].mlp.fc, model.blocks[0].mlp.proj
    assert group.channels == 32
    assert [id(p) for p in group.producers] == [id(fc.weight), id(fc.bias)]
    assert [id(p) for p in group.consumers] == [id(proj.weight)]


def test_no_groups():
    with pytest.raises(CompactError, match="Linear has no channels"):
        channel_groups(nn.Linear(4, 2), torch.zeros(2, 4))


def test_a_group_can_be_zeroed_and_removed_by_hand():
    """The definition, on a network of residual blocks: zero producers make zero channels."""
    torch.manual_seed(0)
    model = ResNet18(width=4).eval()
    images = torch.randn(2, 3, 8, 8)
    groups = channel_groups(model, images)
    with torch.no_grad():
        for group in groups:
            for parameter in group.producers:
                parameter[::2] = 0
        expected = model(images)
        for group in groups:
            for weight in group.consumers:
                weight[:, ::2] = F.normalize(torch.randn_like(weight[:, ::2]))
        assert torch.equal(model(images), expected)
