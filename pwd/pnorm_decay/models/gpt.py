"""nanoGPT's character model: a small pre-norm decoder with tied embeddings."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Scaled dot-product attention in which no position sees a later one.

    With fewer queries than keys, the queries are those of the last positions.

    torch's own, except for bf16 on a CPU: there the backward pass of its kernel took 45 % of a
    training step (torch 2.14.1, AVX-512 BF16), and plain matrix products are four times as fast.

    Args:
        q: queries, (batch, heads, positions, channels).
        k: keys, the same shape, or with more positions.
        v: values, as the keys.
        dropout: probability with which an attention weight is dropped.
    """
    T, S = q.shape[-2], k.shape[-2]
    if not (q.is_cpu and q.dtype == torch.bfloat16):
        seen = None
        if 1 < T < S:
            seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=T == S)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x)
        # A compacted network has fewer values than queries and keys.
        parts = qkv.split((C, C, qkv.shape[-1] - 2 * C), -1)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in parts)
        if cache is not None:
            room, width = slice(start, start + T), v.shape[-1]
            cache[0, :, :, room], cache[1, :, :, room, :width] = k, v
            k, v = cache[0, :, :, : start + T], cache[1, :, :, : start + T, :width]
        out = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, n_embd: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.resid_dropout(self.proj(F.gelu(self.fc(x))))


class Block(nn.Module):
    """Attention, then the MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd, bias=bias)
        self.attention = CausalSelfAttention(n_embd, n_head, dropout, bias)
        self.ln2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = MLP(n_embd, dropout, bias)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        x = x + self.attention(self.ln1(x), cache, start)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """nanoGPT's decoder-only transformer.

    The token embedding is also the output layer: one tensor under one name, so that it is decayed
    and counted once. Initialised as nanoGPT is: N(0, 0.02), and the two projections into the
    residual stream of every layer N(0, 0.02 / sqrt(2 n_layer)).

    Args:
        vocab_size: number of different tokens.
        n_layer: number of blocks.
        n_head: attention heads in a block.
        n_embd: width of the residual stream, a multiple of `n_head`.
        block_size: the longest context, in tokens.
        dropout: probability in [0, 1) for embeddings, attention and residual branches.
        bias: whether linear layers and layer norms have biases.

    Raises:
        ValueError: a size is below 1, `n_embd` is no multiple of `n_head`, or `dropout` is
            outside [0, 1).
    """

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        block_size: int,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": n_embd,
            "block_size": block_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if n_embd % n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {n_embd} and {n_head}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.block_size = block_size
        self.cache_shape = (n_layer, 2, n_head, block_size, n_embd // n_head)
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, bias) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        self._initialise(n_layer)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], n_head: int | None = None) -> "GPT":
        """The network that a state dict is of, with its weights.

        Args:
            state: of a `GPT`.
            n_head: attention heads, the only size that it does not tell; None for those of
                nanoGPT's configurations: heads of 32 channels up to a width of 128, then of 64.

        Raises:
            ValueError: it is of another model, or `n_head` does not divide the width.
        """
        try:
            vocab_size, n_embd = state["token_embedding.weight"].shape
            sizes = {
                "vocab_size": vocab_size,
                "n_layer": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
                "n_head": n_head or max(n_embd // (32 if n_embd <= 128 else 64), 1),
                "n_embd": n_embd,
                "block_size": len(state["position_embedding.weight"]),
            }
            model = cls(**sizes, bias="ln_f.bias" in state)
            model.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"These are not the weights of a GPT: {reason}") from error
        return model

    def _initialise(self, n_layer: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                # Each layer adds twice to the residual stream; the scale keeps its variance level.
                scale = 1 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 1.0
                nn.init.normal_(parameter, mean=0.0, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def new_cache(self, batch_size: int = 1) -> Tensor:
        """Room for keys and values: (blocks, 2, batch, heads, positions, channels).

        Its type and device are the network's.
        """
        n_layer, pair, n_head, *rest = self.cache_shape
        return self.token_embedding.weight.new_zeros(n_layer, pair, batch_size, n_head, *rest)

    def forward(self, tokens: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """Predict the token after each position.

        Args:
            tokens: int64 `(B, T)`, values in [0, vocab_size), T at most `block_size`.
            cache: from `new_cache`, to read a text in parts: it holds the keys and values of the
                tokens before these, and those of these are added. Without gradients only.
            start: how many tokens came before these.

        Returns:
            Logits `(B, T, vocab_size)`; those at position t depend on tokens 0..t alone.

        Raises:
            ValueError: start + T exceeds `block_size`.
        """
        T = tokens.shape[1]
        if self.block_size < start + T:
            raise ValueError(f"{start + T} tokens exceed block_size {self.block_size}")
        positions = torch.arange(start, start + T, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        return F.linear(self.ln_f(x), self.token_embedding.weight)
