"""Sparse layers against torch's in float64, and the choice between the two."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import platform
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

from pnorm_decay.compiler import shared_library
from pnorm_decay.deploy import inference, sparse_inference
from pnorm_decay.deploy.copies import restore_buffers
from pnorm_decay.deploy.inference import SparseConv2d, SparseLinear
from pnorm_decay.models.gpt import GPT
from pnorm_decay.models.resnet import ResNet18

sizes = st.integers(1, 33)
few = st.integers(1, 3)
zeros = st.sampled_from([0.0, 0.5, 0.9, 1.0])
threads = st.sampled_from([1, 2, 3])
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sparsened(model: nn.Module, share: float) -> nn.Module:
    """The model with that share of random zeros, and with batch norms that do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(torch.rand_like(parameter) >= share)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
    return model.eval()


def is_close(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    bound = 1e-5 * (1 + exact.abs().amax().item()) if exact.numel() else 0.0
    return ours.shape == exact.shape and torch.allclose(ours.double(), exact, rtol=0, atol=bound)


@st.composite
def convolutions(draw):
    """A convolution, its input in one of three memory orders, and a residual and ReLU, or not."""
    torch.manual_seed(draw(seeds))
    groups, pairs = draw(few), [(draw(few), draw(few)) for _ in range(3)]
    kernel, stride, dilation = pairs
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    channels = groups * draw(few), groups * draw(few)
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    sparsened(conv, draw(zeros))
    pixels = [draw(st.integers(1, 20)) + (k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    x = torch.randn(draw(sizes), channels[0], *pixels)
    order = draw(st.sampled_from(["images last", "channels last", "as usual"]))
    if order == "images last":
        x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    elif order == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    return conv, x, draw(st.booleans()), draw(st.booleans())


def convolution_is_torch_s(case) -> bool:
    conv, x, has_residual, has_relu = case
    sparse = SparseConv2d(conv, conv.padding)
    sparse.relu = has_relu
    with torch.no_grad():
        exact = copy.deepcopy(conv).double()(x.double())
        residual = torch.randn(exact.shape) if has_residual else None
        if residual is not None:
            exact = exact + residual
        ours = sparse(x, residual)
    same_weight = torch.equal(sparse.weight, conv.weight)
    return same_weight and is_close(ours, exact.relu() if has_relu else exact)


@given(convolutions(), threads, st.sampled_from([1 << 18, 500]))
@settings(max_examples=150, deadline=None)
def test_convolution_is_torch_s(case, number, part):
    torch.set_num_threads(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "PART", part)  # of the input: whole, or a few rows
        assert convolution_is_torch_s(case)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 300), zeros, threads, seeds)
@settings(max_examples=100, deadline=None)
def test_linear_is_torch_s(columns, rows, tokens, share, number, seed):
    torch.set_num_threads(number)
    torch.manual_seed(seed)
    linear = sparsened(nn.Linear(columns, rows, bias=seed % 2 == 0), share)
    sparse = SparseLinear(linear.weight, linear.bias)
    exact = copy.deepcopy(linear).double()
    with torch.no_grad():
        for shape in [(tokens, columns), (columns,), (2, tokens, columns), (1, 1, columns)]:
            x = torch.randn(shape)
            assert is_close(sparse(x), exact(x.double()))
    assert torch.equal(sparse.weight, linear.weight)


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_computed_densely_has_its_residual_too(relu):
    conv = sparsened(nn.Conv2d(2, 3, 3, padding=1), 0.5)
    sparse = SparseConv2d(conv, conv.padding)
    sparse.relu = relu
    with torch.no_grad():
        for x in (torch.randn(2, 5, 5), torch.full((1, 2, 5, 5), torch.inf)):
            plain = conv(x)
            residual = torch.randn(plain.shape)
            exact = plain + residual
            expected = exact.relu() if relu else exact
            torch.testing.assert_close(sparse(x, residual), expected, equal_nan=True)


@pytest.mark.parametrize("columns", [50_000, 70_000])
def test_rows_about_as_wide_as_16_bits_count(columns):
    linear = sparsened(nn.Linear(columns, 3), 0.9)
    x = torch.randn(columns)
    with torch.no_grad():
        exact = copy.deepcopy(linear).double()(x.double())
        assert is_close(SparseLinear(linear.weight, linear.bias)(x), exact)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("lacks", ["avx512f", "avx"])
def test_processors_with_narrower_vectors(monkeypatch, lacks):
    library = shared_library(inference.SOURCE, f"-mno-{lacks}")
    monkeypatch.setattr(inference, "_library", lambda: library)

    @given(convolutions())
    @settings(max_examples=30, deadline=None)
    def check(case):
        assert convolution_is_torch_s(case)

    check()
    for tokens in (1, 2, 7, 16, 33, 200):
        linear = sparsened(nn.Linear(37, 29), 0.6)
        x = torch.randn(tokens, 37)
        with torch.no_grad():
            exact = copy.deepcopy(linear).double()(x.double())
            assert is_close(SparseLinear(linear.weight, linear.bias)(x), exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_where_the_dense_layers_have_them(bad):
    conv = sparsened(nn.Conv2d(3, 4, 3, padding=1), 0.8)
    linear = sparsened(nn.Linear(40, 30), 0.9)
    images, one, several = torch.randn(17, 3, 8, 8), torch.randn(1, 40), torch.randn(50, 40)
    images[16, 2, 3, 3] = one[0, 7] = several[49, 39] = bad
    with torch.no_grad():
        for layer, sparse, x in (
            (conv, SparseConv2d(conv, (1, 1)), images),
            (linear, SparseLinear(linear.weight, linear.bias), one),
            (linear, SparseLinear(linear.weight, linear.bias), several),
        ):
            expected = layer(x)
            assert not expected.isfinite().all()
            torch.testing.assert_close(sparse(x), expected, equal_nan=True)


def test_other_types_gradients_and_images_without_a_batch_get_the_dense_result():
    conv = sparsened(nn.Conv2d(3, 4, 3), 0.8)
    sparse = SparseConv2d(conv, (0, 0))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    (ours,), (theirs,) = (torch.autograd.grad(layer(x).sum(), x) for layer in (sparse, conv))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x[0]), conv(x[0]))
        torch.testing.assert_close(sparse(x[:0]), conv(x[:0]))
        exact = copy.deepcopy(conv).double()(x.double())
        torch.testing.assert_close(copy.deepcopy(sparse).double()(x.double()), exact)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(sparse(x), conv(x))
        with pytest.raises(RuntimeError, match="channels"):
            sparse(torch.randn(2, 4, 8, 8))
        with pytest.raises(RuntimeError, match="shape"):
            SparseLinear(torch.ones(2, 3), None)(torch.ones(4, 2))


def test_new_weights_are_used():
    first, second = (sparsened(nn.Linear(32, 16), 0.5) for _ in range(2))
    with torch.no_grad():
        second.weight.copy_(first.weight * 3)
    x, sparse = torch.randn(32), SparseLinear(first.weight, first.bias)
    sparse(x)
    sparse.load_state_dict(SparseLinear(second.weight, second.bias).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), second(x))


def everything_sparse(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """What `sparse_inference` returns where every sparse layer is faster."""
    with torch.no_grad():
        base = inference._folded(copy.deepcopy(model), (x,), model(x))
        layers = {name: inference._sparse(layer) for name, layer in inference._eligible(base)}
        return inference._fused(inference._with(base, layers), (x,))


def test_a_network_with_everything_that_follows_its_convolutions():
    torch.manual_seed(0)
    model, x = sparsened(ResNet18(width=4), 0.7), torch.randn(5, 3, 16, 16)
    fast = everything_sparse(model, x)
    with torch.no_grad():
        for images in (x, torch.randn(17, 3, 9, 12)):
            torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
    convolutions = [layer for layer in fast.modules() if isinstance(layer, SparseConv2d)]
    assert len(convolutions) == 20
    assert sum(layer.relu for layer in convolutions) == 17  # all but the shortcuts
    calls = {node.target for node in fast.graph.nodes if node.op == "call_function"}
    assert calls == {torch.mean}
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())


class Branches(nn.Module):
    """Additions and ReLUs that a convolution cannot take over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, n, 3, padding=1) for n in (4, 1))
        self.c, self.twice = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        a, b = self.a(x), self.c(x)
        a = a + torch.relu(a)  # two users
        b = torch.add(b, 1.5) + (self.b(x) + a)  # a number; another shape
        return torch.relu(self.twice(b)) + self.twice(a)


def test_what_does_not_belong_to_one_convolution_stays_outside():
    torch.manual_seed(0)
    model, x = sparsened(Branches(), 0.6), torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(everything_sparse(model, x)(x), model(x))


def test_a_convolution_with_two_batch_norms():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.b(self.conv(self.a(self.conv(x))))

    torch.manual_seed(0)
    model, x = sparsened(Twice(), 0.5), torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(everything_sparse(model, x)(x), model(x))


def test_the_result_is_a_module_like_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    x, other = torch.randn(4, 3, 6, 6), torch.randn(7, 3, 6, 6)
    fast = everything_sparse(sparsened(model, 0.8), x)
    with torch.no_grad():
        expected = model(x)
        dimension = torch.export.Dim("images", min=2, max=64)
        exported = torch.export.export(fast, (x,), dynamic_shapes=({0: dimension},))
        torch.testing.assert_close(exported.module()(other), model(other))
        kept = io.BytesIO()
        torch.export.save(exported, kept)
        kept.seek(0)
        torch.testing.assert_close(torch.export.load(kept).module()(x), expected)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        kept = io.BytesIO()
        torch.save(fast, kept)
        kept.seek(0)
        torch.testing.assert_close(torch.load(kept, weights_only=False)(x), expected)
        wrong = copy.deepcopy(fast)
        for tensor in wrong.state_dict().values():
            tensor.zero_()
        wrong.load_state_dict(fast.state_dict())
        torch.testing.assert_close(wrong(x), expected)


def test_the_faster_layer_stays(caplog):
    # One is so much faster and the other so much slower that a busy machine does not matter.
    wide, narrow = sparsened(nn.Linear(2048, 2048), 0.999), sparsened(nn.Linear(2048, 2), 0.5)
    model, x = nn.Sequential(wide, narrow), torch.randn(1, 2048)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, "pnorm_decay.deploy"):
        fast = sparse_inference(model, x)
    assert isinstance(fast[0], SparseLinear)
    assert "The whole, mixed" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert model[0] is wide
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("faster", ["dense", "sparse", "bf16"])
def test_layer_by_layer(monkeypatch, faster):
    """The choice itself, with times that are given."""
    model = nn.Sequential(sparsened(nn.Linear(64, 64), 0.9), nn.ReLU())

    def timed(runs):
        for run in runs.values():
            run()
        return {name: 0.5 if name == "mixed" else 1.0 for name in runs}

    def least(times):
        return order.pop(0)

    order = {"dense": [1, 2, 3], "sparse": [2, 1, 3], "bf16": [2, 3, 1]}[faster]
    monkeypatch.setattr(inference, "_alternate", timed)
    monkeypatch.setattr(inference, "_least", least)
    kinds = {"dense": nn.Linear, "sparse": SparseLinear, "bf16": inference.InBfloat16}
    x = torch.randn(2, 64)
    with warnings.catch_warnings(record=True) as caught:
        fast = sparse_inference(model, x, allow_bf16=True)
    assert ["Nothing is gained by leaving zeros out" in str(one.message) for one in caught] == (
        [] if faster == "sparse" else [True]
    )
    assert type(fast[0]) is kinds[faster]
    torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert fast(x).dtype == torch.float32


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_large_batch_is_read_in_parts_unless_its_items_matter_to_each_other(
    monkeypatch, is_alone
):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            y = self.conv(x).sum((2, 3))
            return y if is_alone else y - y.mean(0)

    seen = []

    def timed(runs):
        for run in runs.values():
            run()
        seen.extend(runs)
        return {name: 1.0 / (1 + name.startswith("mixed") + ("16" in name)) for name in runs}

    torch.manual_seed(0)
    monkeypatch.setattr(inference, "_alternate", timed)
    monkeypatch.setattr(inference, "_least", lambda times: -next(count))  # sparse is faster
    count = itertools.count()
    model, x = sparsened(Network(), 0.9), torch.randn(50, 3, 6, 6)
    fast = sparse_inference(model, x)
    assert ("mixed, 16 at a time" in seen) == is_alone
    assert isinstance(fast, inference.InParts) == is_alone
    with torch.no_grad():
        for size in (50, 16, 3):
            torch.testing.assert_close(fast(x[:size]), model(x[:size]))


def test_layers_that_stay_as_they_are():
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(8, 8)
    hooked.register_forward_pre_hook(lambda *_: None)
    infinite = nn.Linear(8, 8)
    infinite.weight.data[0, 0] = float("inf")
    stay = {
        "subclass": Own(8, 8),
        "hooked": hooked,
        "infinite": infinite,
        "fp16": nn.Linear(8, 8).half(),
        "reflect": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        "uneven": nn.Conv2d(2, 2, 2, padding="same"),
        "dense": nn.Linear(8, 8),
    }
    goes = {
        "same": nn.Conv2d(2, 2, 3, padding="same"),
        "valid": nn.Conv2d(2, 2, 3, padding="valid"),
    }
    for name, layer in (stay | goes).items():
        if name != "dense":
            sparsened(layer, 0.9)
    found = dict(inference._eligible(nn.ModuleDict(stay | goes)))
    sparse = {name for name, layer in found.items() if inference._sparse(layer)}
    assert sparse == set(goes)
    x = torch.randn(3, 2, 7, 7)
    with torch.no_grad():
        for conv in goes.values():
            torch.testing.assert_close(inference._sparse(conv)(x), conv(x))


def test_gradients_of_a_residual_and_in_the_forward_mode_are_the_dense_ones():
    conv = sparsened(nn.Conv2d(3, 4, 3), 0.8)
    sparse = SparseConv2d(conv, (0, 0))
    x, residual = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 6, requires_grad=True)
    (ours,) = torch.autograd.grad(sparse(x, residual).sum(), residual)
    torch.testing.assert_close(ours, torch.ones_like(residual))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        ours, theirs = (forward_ad.unpack_dual(layer(dual)).tangent for layer in (sparse, conv))
    torch.testing.assert_close(ours, theirs)


def test_numbers_that_torch_has_yet_to_negate():
    conv, linear = sparsened(nn.Conv2d(3, 4, 3), 0.8), sparsened(nn.Linear(8, 5), 0.5)
    x = torch._neg_view(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(SparseConv2d(conv, (0, 0))(x), conv(x))
        torch.testing.assert_close(SparseLinear(linear.weight, linear.bias)(x), linear(x))


def test_weights_that_are_loaded_in_inference_mode_count():
    models = [sparsened(nn.Sequential(nn.Linear(64, 64)), 0.9) for _ in range(2)]
    models[1][0].weight.data[models[0][0].weight != 0] = 2.0  # as many non-zeros, in its places
    models[1][0].weight.data[models[0][0].weight == 0] = 0.0
    x = torch.randn(1, 64)
    with torch.inference_mode():
        first, second = (SparseLinear(model[0].weight, model[0].bias) for model in models)
        first(x)
        first.load_state_dict(second.state_dict())
        torch.testing.assert_close(first(x), models[1](x))


class Preparing(nn.Module):
    """It writes into its input, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = sparsened(nn.Sequential(nn.Linear(256, 256), nn.ReLU()), 0.99)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layers(x.div_(255).sub_(0.5))


def test_the_example_and_the_state_of_the_model_stay():
    model, example = Preparing(), torch.rand(2, 256)
    before = example.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # dense may be faster
        fast = sparse_inference(model, example)
    assert torch.equal(example, before)
    assert model.calls == fast.calls == 0
    with torch.no_grad():
        torch.testing.assert_close(fast(before.clone()), model(before.clone()))


def test_its_state_stays_without_a_compiler_and_in_bf16_too(monkeypatch):
    model = Preparing()
    tried = copy.deepcopy(model).bfloat16()
    tried.calls += 3
    restore_buffers(tried, model)
    assert tried.calls == 0
    monkeypatch.setattr(inference, "_library", lambda: None)
    assert sparse_inference(model, torch.rand(2, 256)).calls == 0


def test_a_buffer_may_be_expanded():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = sparsened(nn.Linear(64, 64), 0.9)
            self.register_buffer("mean", torch.zeros(1).expand(64))

        def forward(self, x):
            return self.linear(x - self.mean)

    model, x = Centred(), torch.randn(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(sparse_inference(model, x)(x), model(x))


def test_hooks_go_on_where_batch_norms_would_be_folded():
    model = sparsened(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), 0.5)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # dense may be faster
        fast = sparse_inference(model, x)
    calls.clear()
    fast(x)
    assert calls == [1]


def test_masks_of_torch_prune_are_named():
    model = nn.Sequential(nn.Linear(64, 64))
    prune.l1_unstructured(model[0], "weight", 0.9)
    with pytest.warns(UserWarning, match=r"hooks, such as masks of torch\.nn\.utils\.prune"):
        sparse_inference(model, torch.randn(1, 64))


def test_what_reads_in_parts_takes_its_input_by_name_too():
    fast = inference.InParts(sparsened(nn.Sequential(nn.Conv2d(3, 8, 3)), 0.5))
    x = torch.randn(20, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), fast(input=x))
        dynamic = {"args": ({0: torch.export.Dim("images", min=2)},)}
        exported = torch.export.export(fast, (x,), dynamic_shapes=dynamic).module()
        torch.testing.assert_close(exported(x[:3]), fast(x[:3]))


def test_bad_inputs():
    with pytest.raises(TypeError, match="takes a module, not a function"):
        sparse_inference(lambda x: x, torch.randn(1, 64))
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="Nothing is gained: no linear layer"):
        same = sparse_inference(model, torch.randn(1, 64))
    assert type(same[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"does not take the example: .*shape"):
        sparse_inference(model, torch.randn(1, 63))
    with pytest.raises(ValueError, match=r"does not take the example: .*argument"):
        sparse_inference(model, (torch.randn(1, 64), 3))
    with pytest.raises(ValueError, match=r"call model.cpu\(\) first"):
        sparse_inference(nn.Linear(2, 2, device="meta"), torch.randn(1, 2))


def test_without_a_compiler_the_model_stays_dense(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    inference._library.cache_clear()
    try:
        model = sparsened(nn.Sequential(nn.Linear(64, 64)), 0.9)
        with pytest.warns(UserWarning, match="computed densely. Install a C compiler"):
            same = sparse_inference(model, torch.randn(1, 64))
        assert type(same[0]) is nn.Linear
        x = torch.randn(2, 64)
        torch.testing.assert_close(SparseLinear(model[0].weight, model[0].bias)(x), model(x))
    finally:
        inference._library.cache_clear()


def test_wrong_loops_are_noticed(monkeypatch):
    class Wrong:
        def multiply(self, *_):
            return 0

    monkeypatch.setattr(inference, "_library", Wrong)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with pytest.raises(RuntimeError, match="sparse layer 0 differs from the dense one by more"):
        sparse_inference(sparsened(nn.Sequential(nn.Linear(64, 64)), 0.9), torch.randn(1, 64))


def test_a_model_that_torch_fx_cannot_trace():
    torch.manual_seed(0)
    model = sparsened(GPT(11, 2, 2, 16, 8, bias=True), 0.8)
    tokens = torch.randint(11, (3, 8))
    with torch.no_grad():
        fast = everything_sparse(model, tokens)
        assert type(fast) is GPT
        torch.testing.assert_close(fast(tokens), model(tokens))
