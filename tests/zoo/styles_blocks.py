"""Parts that the plain PyTorch styles share: attention, feed-forward and the usual pre-norm block.

In the manner of nanoGPT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from tests.zoo.base import HEADS, HIDDEN


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention when ``memory`` is given. x [B, S, C] -> [B, S, C]."""

    def __init__(self, width: int = HIDDEN, heads: int = HEADS, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.kv(source).chunk(2, dim=-1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal and memory is None)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """x [..., C] -> [..., C] by way of 2C."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class RMSNorm(nn.Module):
    """Root mean square norm, in float32 as Llama does. x [..., C] -> [..., C]."""

    def __init__(self, width: int = HIDDEN, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class Block(nn.Module):
    """The pre-norm block: two sites. x [B, S, C] -> [B, S, C]."""

    def __init__(self, width: int = HIDDEN, causal: bool = True) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, causal=causal)
        self.ln_2, self.mlp = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
