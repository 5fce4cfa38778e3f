"""Text from the network with a cache, in Python and in compiled code."""

from __future__ import annotations

import pytest
import torch

from deploy.test_inference import everything_sparse, sparsened
from pnorm_decay.deploy import compact, generate, generation, inference, sparse_inference
from pnorm_decay.deploy.inference import InBfloat16, SparseLinear
from pnorm_decay.models.gpt import GPT


def network(share: float, bias: bool = True, **sizes: int) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 13, "n_layer": 3, "n_head": 2, "n_embd": 24, "block_size": 10} | sizes
    model = GPT(**shape, bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return sparsened(model, share)


def recomputed(model: GPT, prompt: list[int], count: int) -> list[int]:
    """A text by the whole network for each token; the window and the draws as `generate` has them.

    With Gumbel noise: without, such a network soon repeats one token for ever.
    """
    text, start = list(prompt), max(len(prompt) - model.block_size, 0)
    stream = torch.Generator().manual_seed(5)
    noise = -torch.empty(generation.DRAWS, 13).exponential_(generator=stream).log()
    for n in range(count):
        if len(text) - start > model.block_size:
            start = len(text) - model.block_size // 2
        text.append(int((model(torch.tensor([text[start:]]))[0, -1] + noise[n]).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 4, 10, 15])
def test_the_cache_changes_nothing(length, bias):
    model = network(0.6, bias)
    fast = everything_sparse(model, torch.zeros(1, 1, dtype=torch.long))
    prompt = torch.randint(13, (length,))
    with torch.no_grad():
        expected = recomputed(model, prompt.tolist(), 30)
    assert len(set(expected)) > 5
    for either in (model, fast):
        stream = torch.Generator().manual_seed(5)
        assert list(generate(either, prompt, 30, generator=stream)) == expected


def test_at_temperature_0_the_likeliest_token_is_taken():
    model, prompt = network(0.5), torch.tensor([1, 2, 3])
    (token,) = generate(model, prompt, 1, temperature=0)
    assert token == int(model(prompt[None])[0, -1].argmax())


def test_a_text_read_in_parts():
    model, tokens = network(0.5), torch.randint(13, (2, 10))
    for kind, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        model = model.to(kind)
        with torch.no_grad():
            cache = model.new_cache(2)
            parts = [model(tokens[:, a:b], cache, a) for a, b in ((0, 3), (3, 4), (4, 10))]
            torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=bound, atol=bound)
    with pytest.raises(ValueError, match="11 tokens exceed block_size 10"):
        model(tokens[:, :1], model.new_cache(2), 10)


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_logits_are_the_network_s(monkeypatch, threads):
    model = network(0.7, n_embd=32, n_head=4, block_size=16)
    fast = everything_sparse(model, torch.zeros(1, 1, dtype=torch.long))
    # One layer stayed dense.
    fast.blocks[1].mlp.fc = model.blocks[1].mlp.fc
    monkeypatch.setattr(generation, "threads_for", lambda weights: threads)
    tokens = torch.randint(13, (1, 16))
    store = fast.new_cache()
    step = generation.compiled_step(fast, store)
    with torch.no_grad():
        expected = model(tokens)[0]
    for position, token in enumerate(tokens[0].tolist()):
        torch.testing.assert_close(step(token, position), expected[position], rtol=1e-4, atol=1e-4)


def compacted(bias: bool) -> GPT:
    """A network whose layers lost different numbers of neurons and of value dimensions."""
    model = network(0.5, bias)
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            block.mlp.fc.weight[: 20 * number + 7] = 0
            values = block.attention.qkv.weight[48:].view(2, 12, 24)
            values[:, 11 - 5 * number :] = 0
    small = compact(model, torch.randint(13, (2, 10)))
    shapes = [tuple(block.attention.proj.weight.shape) for block in small.blocks]
    assert shapes == [(24, 22), (24, 12), (24, 2)]
    assert [len(block.mlp.fc.weight) for block in small.blocks] == [89, 69, 49]
    return small


@pytest.mark.parametrize("bias", [False, True])
def test_a_compacted_network_writes_the_same_text(bias):
    model = compacted(bias)
    fast = everything_sparse(model, torch.zeros(1, 1, dtype=torch.long))
    assert generation.compiled_step(fast, fast.new_cache())
    with torch.no_grad():
        expected = recomputed(model, [1, 2, 3], 30)
    assert len(set(expected)) > 5
    for either in (model, fast):
        stream = torch.Generator().manual_seed(5)
        assert list(generate(either, torch.tensor([1, 2, 3]), 30, generator=stream)) == expected


def test_draws_follow_the_softmax():
    model = network(0.5)
    prompt, logits = torch.tensor([3]), network(0.5)(torch.tensor([[3]]))[0, -1].detach()
    stream = torch.Generator().manual_seed(0)
    draws = [next(generate(model, prompt, 1, temperature=2, generator=stream)) for _ in range(3000)]
    shares = torch.bincount(torch.tensor(draws), minlength=13) / len(draws)
    # Six standard deviations of a share.
    torch.testing.assert_close(shares, (logits / 2).softmax(0), rtol=0, atol=6 * 0.5 / 3000**0.5)


def test_a_seed_gives_the_same_text_dense_or_sparse():
    model = network(0.5)
    fast = everything_sparse(model, torch.zeros(1, 1, dtype=torch.long))
    texts = [
        list(generate(of, torch.tensor([1, 2]), 100, generator=torch.Generator().manual_seed(7)))
        for of in (model, fast, model)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 100


def test_only_sparse_networks_of_this_form_are_compiled():
    model = network(0.5)
    assert generation.compiled_step(model, model.new_cache()) is None
    fast = everything_sparse(model, torch.zeros(1, 1, dtype=torch.long))
    assert generation.compiled_step(fast, fast.new_cache())
    kept = fast.blocks[2].mlp.proj
    fast.blocks[2].mlp.proj = InBfloat16(torch.nn.Linear(96, 24))
    assert generation.compiled_step(fast, fast.new_cache()) is None
    wide = torch.nn.Linear(24, 70_000), torch.nn.Linear(70_000, 24)  # places have 16 bits
    kept_fc, (fast.blocks[2].mlp.fc, fast.blocks[2].mlp.proj) = fast.blocks[2].mlp.fc, wide
    assert generation.compiled_step(fast, fast.new_cache()) is None
    fast.blocks[2].mlp.fc, fast.blocks[2].mlp.proj = kept_fc, kept
    for values in (22, 23, 26):  # fewer are all right, if each head has as many
        fast.blocks[0].attention.qkv = torch.nn.Linear(24, 48 + values)
        assert generation.compiled_step(fast, fast.new_cache()) is None
        fast.blocks[0].attention.proj = torch.nn.Linear(values, 24)
        is_compiled = generation.compiled_step(fast, fast.new_cache()) is not None
        assert is_compiled == (values == 22)


def test_a_network_that_writes_is_chosen_by_the_time_that_takes():
    # Its layers are so small that in Python it does not matter whether they are sparse.
    model, token = network(0.9, n_embd=96, n_layer=6), torch.zeros(1, 1, dtype=torch.long)
    fast = sparse_inference(model, token)
    assert sum(isinstance(layer, SparseLinear) for layer in fast.modules()) == 24
    assert generation.compiled_step(fast, fast.new_cache())


def test_what_writes_is_never_wrapped_in_bf16(monkeypatch):
    def timed(runs):
        assert list(runs) == ["dense", "one call a token"]
        return {"dense": 1.0, "one call a token": 2.0}

    monkeypatch.setattr(inference, "_alternate", timed)
    model, token = network(0.9), torch.zeros(1, 1, dtype=torch.long)
    with pytest.warns(UserWarning, match="dense is fastest here"):
        fast = sparse_inference(model, token, allow_bf16=True)
    assert next(generate(fast, torch.tensor([1]), 1)) < 13


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "one or more tokens below 13"),
        ([[1]], {}, "one or more tokens below 13"),
        ([13], {}, "one or more tokens below 13"),
        ([-1], {}, "one or more tokens below 13"),
        ([1], {"count": -1}, "count -1"),
        ([1], {"temperature": -0.5}, "temperature -0.5"),
        ([1], {"temperature": float("nan")}, "temperature nan"),
        ([1], {"temperature": float("inf")}, "temperature inf"),
    ],
)
def test_bad_inputs(prompt, options, message):
    tokens = torch.tensor(prompt, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        generate(network(0), tokens, **({"count": 3} | options))


@pytest.mark.parametrize(
    ("prompt", "options"),
    [([1, 2], {}), (torch.tensor([1.0]), {}), (torch.tensor([True]), {}), ("ROMEO", {}),
     (torch.tensor([1]), {"count": 2.5}), (torch.tensor([1]), {"temperature": None}),
     (torch.tensor([1]), {"temperature": "1"})],
)  # fmt: skip
def test_what_is_no_number_is_refused_at_the_call(prompt, options):
    with pytest.raises(TypeError):
        generate(network(0.5), prompt, **{"count": 3} | options)


def test_at_the_smallest_temperatures_the_likeliest_token_is_taken():
    model, prompt = network(0.5), torch.tensor([1, 2, 3])
    likeliest = list(generate(model, prompt, 6, temperature=0))
    for temperature in (1e-30, 1e-40, 1e-320):
        assert list(generate(model, prompt, 6, temperature=temperature)) == likeliest


def test_what_compiled_code_does_not_know_is_done_in_python():
    model, token = network(0.8), torch.zeros(1, 1, dtype=torch.long)
    fast = everything_sparse(model, token)
    assert generation.compiled_step(fast, fast.new_cache()) is not None
    calls = []
    handle = fast.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    list(generate(fast, torch.tensor([1]), 3))
    assert len(calls) == 3
    handle.remove()
    fast.ln_f.eps = 0.1
    assert generation.compiled_step(fast, fast.new_cache()) is None


@pytest.mark.slow
def test_a_network_through_torch_compile_writes_the_same_text():
    model, prompt = network(0.5), torch.tensor([1, 2, 3])
    compiled = torch.compile(model, backend="eager", dynamic=True)
    same = [list(generate(m, prompt, 15, temperature=0)) for m in (model, compiled)]
    assert same[0] == same[1]


def test_other_models_write_no_text():
    with pytest.raises(TypeError, match="with a GPT, not with a InBfloat16"):
        generate(InBfloat16(network(0)), torch.tensor([1]), 3)
