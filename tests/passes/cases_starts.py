"""Models by where their streams begin and what joins them: learned queries, zeros, scales and shifts, nested adds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from tests.passes.cases import blocks, layers
from tests.passes.cases_models import DecoderBlock, case
from tests.passes.models import WIDTH, Attention, Block, Lambda, Mlp


def with_queries(model: nn.Module) -> nn.Module:
    model.register_parameter("queries", nn.Parameter(torch.linspace(-1, 1, 4 * WIDTH).sin().view(4, WIDTH)))
    return model


@case(("decoder.0.attn", "decoder.0.mlp", *["decoder.1"] * 3))
def learned_queries() -> nn.Module:
    """A Perceiver's latents: the stream begins in a parameter."""

    def forward(m: Any, x: Tensor) -> Tensor:
        memory, y = m.embed(x), m.queries.unsqueeze(0).expand(x.shape[0], -1, -1)
        y = y + m.decoder[0].attn(y, memory)
        y = y + m.decoder[0].mlp(y)
        return m.head(m.decoder[1](y, memory))

    decoder = nn.ModuleList([Block(), DecoderBlock()])
    return with_queries(Lambda(forward, embed=nn.Linear(3, WIDTH), decoder=decoder, head=Mlp()))


@case(layers(2, 3, prefix="decoder"), "zero there")
def queries_from_zero() -> nn.Module:
    """DETR: the stream begins as zeros, and learned positions are added to what the layers read."""

    def forward(m: Any, x: Tensor) -> Tensor:
        memory, position = m.embed(x), m.queries.unsqueeze(0).expand(x.shape[0], -1, -1)
        y = torch.zeros_like(position)
        for layer in m.decoder:
            y = layer(y, position, memory)
        return m.head(y)

    def layer(m: Any, y: Tensor, position: Tensor, memory: Tensor) -> Tensor:
        y = y + m.cross(y + position, memory)
        y = y + m.attn(y + position)
        return y + m.mlp(y)

    decoder = nn.ModuleList([Lambda(layer, attn=Attention(), cross=Attention(), mlp=Mlp()) for _ in range(2)])
    return with_queries(Lambda(forward, embed=nn.Linear(3, WIDTH), decoder=decoder, head=Mlp()))


@case(layers(2, 2))
def scaled_and_shifted() -> nn.Module:
    """ZAYA: both summands are shifted and scaled by parameters before they are added."""

    def join(m: Any, x: Tensor, f: Tensor) -> Tensor:
        return (f + m.a.bias) * m.a.weight + (x + m.b.bias) * m.b.weight

    def forward(m: Any, x: Tensor) -> Tensor:
        x = join(m, x, m.attn(x))
        return join(m, x, m.mlp(x))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
            self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, WIDTH))

    return blocks(forward, attn=Attention, mlp=Mlp, a=Scaled, b=Scaled)


@case(layers(2, 2), "inside the branch", "inside the branch")
def add_inside_a_parallel_branch() -> nn.Module:
    """Gemma 3n's laurel: a low-rank branch with a residual add of its own behind a norm that is spelled out."""

    def forward(m: Any, x: Tensor) -> Tensor:
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.norm.weight
        laurel = n + m.up(torch.tanh(m.down(n)))
        x = (x + m.attn(n) + laurel) / 2**0.5
        return x + m.mlp(x)

    return blocks(
        forward,
        norm=lambda: nn.RMSNorm(WIDTH),
        attn=lambda: Attention(norm=None),
        down=lambda: nn.Linear(WIDTH, 2),
        up=lambda: nn.Linear(2, WIDTH),
        mlp=Mlp,
    )


@case((*layers(2, 2, prefix="low"), *layers(2, 2, prefix="high")) * 2, *["long skip"] * 3, chains=4)
def two_states() -> nn.Module:
    """HRM: two states feed one another, each through its own layers and a norm, twice."""

    def forward(m: Any, x: Tensor) -> Tensor:
        high, low = m.embed(x), m.start(x)
        for _ in range(2):
            low = functional.layer_norm(m.low[1](m.low[0](low + high)), (WIDTH,))
            high = functional.layer_norm(m.high[1](m.high[0](high + low)), (WIDTH,))
        return m.head(high)

    return Lambda(
        forward,
        embed=nn.Linear(3, WIDTH),
        start=nn.Linear(3, WIDTH),
        low=nn.ModuleList([Block(), Block()]),
        high=nn.ModuleList([Block(), Block()]),
        head=Mlp(),
    )


@case(layers(2, 2), "inside the branch")
def relative_bias() -> nn.Module:
    """LayoutLMv3: one bias, made of the inputs, is added to the attention scores of every layer."""

    def attend(m: Any, x: Tensor, bias: Tensor) -> Tensor:
        n = m.norm(x)
        scores = m.q(n) @ m.kv(n)[..., :WIDTH].transpose(1, 2) + bias
        x = x + m.o(scores.softmax(-1) @ n)
        return x + m.mlp(x)

    def forward(m: Any, x: Tensor) -> Tensor:
        bias = torch.sin(m.start(x) @ x.transpose(1, 2))
        y = m.embed(x)
        for layer in m.layers:
            y = layer(y, bias)
        return m.head(y)

    def layer() -> nn.Module:
        attention = Attention()
        return Lambda(attend, norm=attention.norm, q=attention.q, kv=attention.kv, o=attention.o, mlp=Mlp())

    stack = nn.ModuleList([layer(), layer()])
    return Lambda(forward, embed=nn.Linear(3, WIDTH), start=nn.Linear(3, 3), layers=stack, head=Mlp())
