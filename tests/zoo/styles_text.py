"""Plain PyTorch language models: the ways in which people write, scale, share and read a residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.base import HEADS, HIDDEN, LAYERS, VOCAB
from tests.zoo.styles_blocks import Attention, Block, FeedForward, RMSNorm


class NanoGPT(nn.Module):
    """Token plus position embedding, dropout, pre-norm blocks, final norm, tied head."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(64, HIDDEN), nn.Dropout(0.0)
        self.h = nn.ModuleList(self.block() for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def block(self) -> nn.Module:
        """One layer; a subclass gives its own."""
        return Block()

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, C]."""
        return self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class TitanAttention(nn.Module):
    """Grouped-query attention with a complex rotary embedding, as torchtitan and Meta's Llama write it."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.groups = HIDDEN // HEADS, 2
        self.wq = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.wk = nn.Linear(HIDDEN, self.head_dim * self.groups, bias=False)
        self.wv = nn.Linear(HIDDEN, self.head_dim * self.groups, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def rotate(t: Tensor) -> Tensor:
            pairs = torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * freqs[:length].view(1, length, 1, -1)).flatten(3).type_as(t)

        q = rotate(self.wq(x).view(batch, length, HEADS, self.head_dim)).transpose(1, 2)
        k = rotate(self.wk(x).view(batch, length, self.groups, self.head_dim)).transpose(1, 2)
        v = self.wv(x).view(batch, length, self.groups, self.head_dim).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).contiguous().view(batch, length, -1))


class TitanBlock(nn.Module):
    """h = x + attention(norm(x)); out = h + w2(silu(w1(n)) * w3(n)), n = norm(h)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm, self.ffn_norm = TitanAttention(), RMSNorm(), RMSNorm()
        self.w1 = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.w2 = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs)
        n = self.ffn_norm(h)
        return h + self.w2(functional.silu(self.w1(n)) * self.w3(n))


class TitanLlama(nn.Module):
    """Layers in a ModuleDict keyed by number; the rotary table is a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings, self.norm = nn.Embedding(VOCAB, HIDDEN), RMSNorm()
        self.layers = nn.ModuleDict({str(i): TitanBlock() for i in range(LAYERS)})
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)
        inverse = 1.0 / 10000 ** (torch.arange(0, HIDDEN // HEADS, 2).float() / (HIDDEN // HEADS))
        angles = torch.outer(torch.arange(64).float(), inverse)
        self.register_buffer("freqs", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tok_embeddings(ids)
        for layer in self.layers.values():
            h = layer(h, self.get_buffer("freqs"))
        return self.output(self.norm(h))


class EarlyExits(NanoGPT):
    """Every layer's stream is read by an exit head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.exits = nn.ModuleList(nn.Linear(HIDDEN, VOCAB) for _ in self.h)

    def forward(self, ids: Tensor) -> Tensor:
        x, logits = self.embed(ids), []
        for block, head in zip(self.h, self.exits, strict=True):
            x = block(x)
            logits.append(head(self.ln_f(x)))
        return torch.stack(logits)


class HiddenStates(NanoGPT):
    """All residual values are returned beside the logits, as output_hidden_states does."""

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:  # type: ignore[override]  # returns more on purpose
        x = self.embed(ids)
        states = [x]
        for block in self.h:
            x = block(x)
            states.append(x)
        return self.lm_head(self.ln_f(x)), tuple(states)


class SharedLayers(NanoGPT):
    """One pre-norm layer applied three times (ALBERT's sharing)."""

    def __init__(self) -> None:
        super().__init__(layers=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(3):
            x = self.h[0](x)
        return self.lm_head(self.ln_f(x))


class ParallelBlock(Block):
    """x + attn(n) + mlp(n), one norm (PaLM)."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.ln_1(x)
        return x + self.attn(n) + self.mlp(self.ln_2(n))


class SpelledBlock(Block):
    """The spellings of an add: torch.add with alpha, += on the branch, branch first, add_ on a copy of the carrier.

    In place on the carrier itself is no spelling: autograd refuses it, for the norm has saved the carrier.
    """

    def __init__(self) -> None:
        super().__init__()
        self.extra_a, self.extra_b = FeedForward(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attn(self.ln_1(x)), alpha=0.5)
        y = self.mlp(self.ln_2(x))
        y += x
        x = self.extra_a(self.ln_1(y)).mul(0.7) + y
        return x.clone().add_(self.extra_b(self.ln_2(x)))


class ScaledCarrierBlock(Block):
    """Learned scalars on the carrier and on the branch: x = a * x + b * f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a * x + self.b * self.attn(self.ln_1(x))
        return self.a * x + self.mlp(self.ln_2(x)) * self.b


class CheckpointedBlock(Block):
    """Each block under activation checkpointing, its adds inside the checkpointed body."""

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(super().forward, x, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out


class WideStreamBlock(Block):
    """The stream in float64, the branch in float32: a cast on either side of each add."""

    def forward(self, x: Tensor) -> Tensor:
        residual = x.double()
        residual = residual + self.attn(self.ln_1(residual.float()))
        return residual + self.mlp(self.ln_2(residual.float())).to(torch.float64)


class WideStream(NanoGPT):
    """float64 residual stream through float32 layers (the pattern of residual_in_fp32, one size up)."""

    def block(self) -> nn.Module:
        return WideStreamBlock()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x.float()))


class Packed(nn.Module):
    """Tokens of all sequences in one axis: the stream is [T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(HIDDEN), FeedForward()) for _ in range(2 * LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.flatten())
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class InjectedEmbedding(NanoGPT):
    """x = a x + b x0 before each block (speed-run GPT): the injection is linear in the stream and is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([0.9, 0.1]))

    def forward(self, ids: Tensor) -> Tensor:
        x0 = self.embed(ids)
        x = self.h[0](x0)
        for block in list(self.h)[1:]:
            x = block(self.mix[0] * x + self.mix[1] * x0)
        return self.lm_head(self.ln_f(x))


class DeepStack(NanoGPT):
    """Features from outside are added to the stream after the first layers (Qwen3-VL): no site, for no branch of it."""

    def __init__(self) -> None:
        super().__init__(layers=3)
        self.project = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]  # takes more on purpose
        x = self.embed(ids)
        for index, block in enumerate(self.h):
            x = block(x)
            if index < features.shape[0]:
                x = x + self.project(features[index])
        return self.lm_head(self.ln_f(x))


class Residual(nn.Module):
    """x + f(x) as a wrapper module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


def wrapped_sequential() -> nn.Module:
    """nn.Sequential of residual wrappers, no forward of our own."""
    parts: list[nn.Module] = [nn.Embedding(VOCAB, HIDDEN)]
    for _ in range(LAYERS):
        parts.append(Residual(nn.Sequential(nn.LayerNorm(HIDDEN), Attention())))
        parts.append(Residual(nn.Sequential(nn.LayerNorm(HIDDEN), FeedForward())))
    return nn.Sequential(*parts, nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB))


class Mamba(nn.Module):
    """A gated causal convolution with a decaying scan, in the shape of a Mamba mixer.

    Y + D * x inside it is no site.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = RMSNorm(), nn.Linear(HIDDEN, 4 * HIDDEN)
        self.conv = nn.Conv1d(2 * HIDDEN, 2 * HIDDEN, 4, groups=2 * HIDDEN, padding=3)
        self.decay, self.skip = nn.Parameter(torch.zeros(2 * HIDDEN)), nn.Parameter(torch.ones(2 * HIDDEN))
        self.out = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        x, gate = self.inner(self.norm(hidden)).chunk(2, dim=-1)
        x = functional.silu(self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2))
        distance = torch.arange(length, device=x.device)
        lag = (distance[:, None] - distance[None, :]).clamp(min=0)
        weight = (
            torch.exp(-functional.softplus(self.decay) * lag[..., None]) * (distance[:, None] >= distance)[..., None]
        )
        y = torch.einsum("lsd,bsd->bld", weight, x) + self.skip * x
        return hidden + self.out(y * functional.silu(gate))
