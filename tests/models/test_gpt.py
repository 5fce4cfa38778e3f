import math

import pytest
import torch
from torch.nn import functional as F

from pnorm_decay.models import GPT
from pnorm_decay.models.gpt import causal_attention


def small(**options: float) -> GPT:
    sizes = {"vocab_size": 11, "n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 8}
    return GPT(**{**sizes, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # nanoGPT prints 10.65M and 0.80M for its two character models (positions not counted).
        ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 10_646_784),
        ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}, 795_904),
    ],
)
def test_parameter_counts_are_nanogpts(sizes: dict[str, int], expected: int) -> None:
    model = GPT(vocab_size=65, **sizes)
    total = sum(p.numel() for p in model.parameters())
    assert total - model.position_embedding.weight.numel() == expected


def test_bias_adds_biases_to_every_linear_layer_and_norm() -> None:
    # Per layer: qkv 36, attention 12, fc 48, proj 12, two norms 24; and the last norm 12.
    def count(model: GPT) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(small(bias=True)) - count(small()) == 2 * (36 + 12 + 48 + 12 + 24) + 12


@pytest.mark.parametrize("length", [1, 5, 8])
def test_logits_shape(length: int) -> None:
    logits = small()(torch.zeros(3, length, dtype=torch.int64))
    assert logits.shape == (3, length, 11)


def test_future_tokens_do_not_change_past_logits() -> None:
    model = small().eval()
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (tokens[:, 5:] + 1) % 11
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_earlier_tokens_change_later_logits() -> None:
    model = small().eval()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % 11
    assert not torch.allclose(model(tokens)[0, 7], model(changed)[0, 7])


def test_attention_equals_the_written_out_formula() -> None:
    attention = small().blocks[0].attention
    x = torch.randn(2, 8, 12)
    q, k, v = (part.view(2, 8, 3, 4) for part in attention.qkv(x).split(12, dim=2))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(4)
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).reshape(2, 8, 12)
    torch.testing.assert_close(attention(x), attention.proj(mixed))


def test_output_layer_is_the_token_embedding() -> None:
    model = small()
    hidden: list[torch.Tensor] = []
    model.ln_f.register_forward_hook(lambda _m, _i, out: hidden.append(out))
    logits = model(torch.zeros(1, 3, dtype=torch.int64))
    torch.testing.assert_close(logits, F.linear(hidden[0], model.token_embedding.weight))
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes.count((11, 12)) == 1


def test_initialisation_is_nanogpts() -> None:
    torch.manual_seed(0)
    model = GPT(vocab_size=65, n_layer=8, n_head=4, n_embd=128, block_size=64, bias=True)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            expected = 0.02 / math.sqrt(16) if name.endswith("proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            assert (parameter != 0).float().mean() > 0.99, name
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == value).all(), name


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    tokens = torch.randint(11, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("name", ["vocab_size", "n_layer", "n_head", "n_embd", "block_size"])
def test_sizes_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        small(**{name: 0})


def test_width_must_divide_into_heads() -> None:
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head, got 13 and 3"):
        small(n_embd=13)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_dropout_must_be_a_probability_below_one(dropout: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        small(dropout=dropout)


def test_too_long_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens exceed block_size 8"):
        small()(torch.zeros(1, 9, dtype=torch.int64))


def test_bf16_attention_on_a_cpu_is_torchs() -> None:
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in (q, k, v)]
    result = causal_attention(*narrow, dropout=0.0)
    got = torch.autograd.grad(result.float().square().sum(), narrow)
    torch.testing.assert_close(result.float(), expected, atol=0.03, rtol=0.03)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.15, rtol=0.05)


def test_bf16_attention_on_a_cpu_drops_weights_in_training() -> None:
    ones = torch.ones(1, 1, 50, 4, dtype=torch.bfloat16)
    dropped = causal_attention(ones, ones, ones, dropout=0.5)
    assert dropped.float().std() > 0.1
    assert dropped.float().mean() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("bias", [False, True])
def test_a_network_from_its_weights(bias):
    model = GPT(11, 3, 2, 64, 9, bias=bias)
    again = GPT.from_state_dict(model.state_dict())
    tokens = torch.randint(11, (2, 9))
    assert torch.equal(again(tokens), model(tokens))
    assert GPT.from_state_dict(model.state_dict(), 4).blocks[0].attention.n_head == 4


def test_other_weights_are_refused():
    state = GPT(11, 1, 2, 64, 9).state_dict()
    with pytest.raises(ValueError, match=r"not the weights of a GPT: .*multiple"):
        GPT.from_state_dict(state, 3)
    with pytest.raises(ValueError, match=r"not the weights of a GPT: .*mlp\.fc"):
        GPT.from_state_dict({name: w for name, w in state.items() if "mlp.fc" not in name})
    with pytest.raises(ValueError, match=r"not the weights of a GPT: 'token_embedding\.weight'"):
        GPT.from_state_dict({})
