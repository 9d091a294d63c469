"""Whole models by the trouble they make: several streams, readers outside, skips, norms on the stream, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from tests.passes.cases import Case, Conv, blocks, images, layers
from tests.passes.models import WIDTH, Attention, Block, Lambda, Mlp, tokens

MODELS: list[Case] = []


def case(modules: tuple[str, ...], *reasons: str, **more: Any) -> Callable[[Callable[[], nn.Module]], Any]:
    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        MODELS.append(Case(build.__name__, build, modules, reasons, **more))
        return build

    return register


def also(**changes: Any) -> None:
    """A variation of the case registered last."""
    MODELS.append(dataclasses.replace(MODELS[-1], **changes))


# ------------------------------------------------------------------------------------------------ several streams
class DecoderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross, self.mlp = Attention(), Attention(), Mlp()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = x + self.cross(x, memory)
        return x + self.mlp(x)


@case(
    (*layers(2, 2, prefix="encoder"), *layers(3, 3, prefix="decoder")),
    chains=2,
    inputs=lambda: (tokens(), tokens(2, 4, 3)),
)
def encoder_decoder() -> nn.Module:
    def forward(m: Any, source: Tensor, target: Tensor) -> Tensor:
        memory = m.embed(source)
        for block in m.encoder:
            memory = block(memory)
        memory, x = m.norm(memory), m.embed(target)
        for block in m.decoder:
            x = block(x, memory)
        return m.head(x)

    return Lambda(
        forward,
        embed=nn.Linear(3, WIDTH),
        encoder=nn.ModuleList([Block(), Block()]),
        norm=nn.LayerNorm(WIDTH),
        decoder=nn.ModuleList([DecoderBlock(), DecoderBlock()]),
        head=Mlp(),
    )


@case((*layers(2, 2, prefix="encoder"), *layers(3, 3, prefix="decoder")), "outside", "outside", chains=3)
def memory_added() -> nn.Module:
    """No norm behind the encoder, and its memory is also added to the decoder's stream behind each block.

    Where two streams meet, both end and their sum begins another one.
    """

    def forward(m: Any, x: Tensor) -> Tensor:
        memory = m.embed(x)
        for block in m.encoder:
            memory = block(memory)
        y = m.start(x)
        for block in m.decoder:
            y = block(y, memory)
            y = y + memory
        return m.head(y)

    return Lambda(
        forward,
        embed=nn.Linear(3, WIDTH),
        start=nn.Linear(3, WIDTH),
        encoder=nn.ModuleList([Block(), Block()]),
        decoder=nn.ModuleList([DecoderBlock(), DecoderBlock()]),
        head=Mlp(),
    )


@case((*layers(2, 2, prefix="a"), *layers(2, prefix="b")), chains=2)
def two_towers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = m.embed(x), m.other(x)
        for block in m.a:
            y = block(y)
        for block in m.b:
            z = block(z)
        return m.head(torch.cat([m.norm(y), m.norm(z)], 1))

    return Lambda(
        forward,
        embed=nn.Linear(3, WIDTH),
        other=nn.Linear(3, WIDTH),
        a=nn.ModuleList([Block(), Block()]),
        b=nn.ModuleList([Block()]),
        norm=nn.LayerNorm(WIDTH),
        head=Mlp(),
    )


@case((*layers(2, prefix="trunk"), *layers(2, 2, prefix="left"), *layers(2, prefix="right")), chains=2)
def fork() -> nn.Module:
    """Two heads of their own layers on one trunk: the longer goes on with the trunk's streams."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = m.embed(x)
        for block in m.trunk:
            x = block(x)
        y = z = x
        for block in m.left:
            y = block(y)
        for block in m.right:
            z = block(z)
        return m.norm(y), m.norm(z)

    return Lambda(
        forward,
        embed=nn.Linear(3, WIDTH),
        trunk=nn.ModuleList([Block()]),
        left=nn.ModuleList([Block(), Block()]),
        right=nn.ModuleList([Block()]),
        norm=nn.LayerNorm(WIDTH),
    )


@case((*layers(2, 2, prefix="tower"), *layers(2, 2)), chains=2)
def vision_language() -> nn.Module:
    """A tower's tokens are put in front of the text's."""

    def forward(m: Any, x: Tensor) -> Tensor:
        v = m.patch(x)
        for block in m.tower:
            v = block(v)
        y = torch.cat([m.project(v), m.embed(x)], 1)
        for block in m.layers:
            y = block(y)
        return m.head(y)

    return Lambda(
        forward,
        patch=nn.Linear(3, WIDTH),
        tower=nn.ModuleList([Block(), Block()]),
        project=nn.Linear(WIDTH, WIDTH),
        embed=nn.Linear(3, WIDTH),
        layers=nn.ModuleList([Block(), Block()]),
        head=Mlp(),
    )


@case((*layers(2, 2, prefix="m.layers"), *layers(2, 2, prefix="m.layers")))
def shared_layers() -> nn.Module:
    """ALBERT: the same layers run twice; each add is a site of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.embed(x)
        for _ in range(2):
            for layer in m.layers:
                y = layer(y)
        return m.head(y)

    inner = Lambda(forward, embed=nn.Linear(3, WIDTH), layers=nn.ModuleList([Block(), Block()]), head=Mlp())
    return Lambda(lambda m, x: m.m(x), m=inner)


# ------------------------------------------------------------------------------------------------ readers outside
@case(layers(2, 2))
def hidden_states() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        states = [m.embed(x)]
        for layer in m.layers:
            states.append(layer(states[-1]))
        return (m.head(states[-1]), *states)

    return Lambda(forward, embed=nn.Linear(3, WIDTH), layers=nn.ModuleList([Block(), Block()]), head=Mlp())


@case(layers(2, 2))
def early_exits() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x, logits = m.embed(x), []
        for layer in m.layers:
            x = layer(x)
            logits.append(m.head(m.norm(x)))
        return torch.stack(logits)

    return Lambda(
        forward,
        embed=nn.Linear(3, WIDTH),
        layers=nn.ModuleList([Block(), Block()]),
        norm=nn.LayerNorm(WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


@case(layers(2, 2))
def reader_without_gradient() -> nn.Module:
    """The first reader of each stream value stands in a no_grad region (a probe, a router's statistics)."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x, seen = m.embed(x), []
        for layer in m.layers:
            with torch.no_grad():
                seen.append(x.abs().mean())
            x = layer(x)
        with torch.no_grad():
            seen.append(m.head(x).sum())
        return (m.head(x), *seen)

    return Lambda(forward, embed=nn.Linear(3, WIDTH), layers=nn.ModuleList([Block(), Block()]), head=Mlp())


@case(layers(2, 2, 2), "skip connection", chains=2)
def u_net() -> nn.Module:
    """x2 + x1: two states of one stream meet, and their sum begins another one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.layers[0](m.embed(x))
        b = m.layers[1](a)
        return m.head(m.layers[2](b + a))

    return Lambda(forward, embed=nn.Linear(3, WIDTH), layers=nn.ModuleList([Block(), Block(), Block()]), head=Mlp())


@case(layers(2, 2, 2), chains=2)
def u_net_by_projection() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.layers[0](m.embed(x))
        b = m.layers[1](a)
        return m.head(m.layers[2](m.merge(torch.cat([b, a], -1))))

    return Lambda(
        forward,
        embed=nn.Linear(3, WIDTH),
        layers=nn.ModuleList([Block(), Block(), Block()]),
        merge=nn.Linear(2 * WIDTH, WIDTH),
        head=Mlp(),
    )


@case(layers(1, 1, 1), "long skip", inputs=images)
def image_restoration() -> nn.Module:
    """EDSR: x + conv(body(x)) around the chain."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = y = m.stem(x)
        for layer in m.layers:
            y = layer(y)
        return m.tail(x + m.conv(y))

    return Lambda(
        forward,
        stem=nn.Conv2d(3, WIDTH, 1),
        layers=nn.ModuleList([Lambda(lambda m, x: x + m.conv(x), conv=Conv()) for _ in range(3)]),
        conv=nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        tail=nn.Conv2d(WIDTH, 3, 1),
    )


@case(layers(1, 1, 1), "skip connection", inputs=images)
def global_skip() -> nn.Module:
    """x + body(x) without anything in between: head and end of one stream."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = y = m.stem(x)
        for layer in m.layers:
            y = layer(y)
        return m.tail(x + y)

    return Lambda(
        forward,
        stem=nn.Conv2d(3, WIDTH, 1),
        layers=nn.ModuleList([Lambda(lambda m, x: x + m.conv(x), conv=Conv()) for _ in range(3)]),
        tail=nn.Conv2d(WIDTH, 3, 1),
    )


@case(
    tuple(f"groups.{g}.layers.{i}" for g in range(3) for i in range(2) for _ in range(2)),
    "long skip",
    "long skip",
    "long skip",
    chains=3,
)
def residual_groups() -> nn.Module:
    """SwinIR: groups of blocks, each with a skip around it; the blocks are the stream, not the three skips."""

    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.end = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for layer in self.layers:
                y = layer(y)
            return x + self.end(y)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        for group in m.groups:
            x = group(x)
        return m.head(x)

    return Lambda(forward, embed=nn.Linear(3, WIDTH), groups=nn.ModuleList([Group() for _ in range(3)]), head=Mlp())


@case(layers(2, 2), "inside the branch", "inside the branch")
def residual_in_branch() -> nn.Module:
    """The MLP has a residual of its own, behind its norm."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(WIDTH), Mlp(norm=None)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            return n + self.mlp(n)

    return blocks(lambda m, x: (y := x + m.attn(x)) + m.inner(y), attn=Attention, inner=Inner)


@case(layers(2, 2), "outside", "outside")
def condition_each_layer() -> nn.Module:
    """A condition of the stream's own shape is added in front of every layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        condition, y = m.condition(x), m.embed(x)
        for layer in m.layers:
            y = layer(y + condition)
        return m.head(y + condition)

    return Lambda(
        forward,
        condition=nn.Linear(3, WIDTH),
        embed=nn.Linear(3, WIDTH),
        layers=nn.ModuleList([Block(), Block()]),
        head=Mlp(),
    )


@case(layers(2, 2))
def condition_broadcast() -> nn.Module:
    """The same, one vector a sequence."""

    def forward(m: Any, x: Tensor) -> Tensor:
        condition, y = m.condition(x.mean(1, keepdim=True)), m.embed(x)
        for layer in m.layers:
            y = layer(y + condition)
        return m.head(y)

    return Lambda(
        forward,
        condition=nn.Linear(3, WIDTH),
        embed=nn.Linear(3, WIDTH),
        layers=nn.ModuleList([Block(), Block()]),
        head=Mlp(),
    )


@case(("layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"), "outside")
def query_positions() -> nn.Module:
    """DETR: positions are added to what the attention reads, layer after layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        position, y = m.position(x), m.embed(x)
        for layer in m.layers:
            y = y + layer.attn(y + position)
            y = y + layer.mlp(y)
        return m.head(y)

    return Lambda(
        forward,
        position=nn.Linear(3, WIDTH),
        embed=nn.Linear(3, WIDTH),
        layers=nn.ModuleList([Block(), Block()]),
        head=Mlp(),
    )


# ------------------------------------------------------------------------------------------------ norms on the stream
def _post_norm(norm: Callable[[], nn.Module]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.na(x + m.attn(x))
        return m.nm(x + m.mlp(x))

    return blocks(forward, attn=lambda: Attention(norm=None), mlp=lambda: Mlp(norm=None), na=norm, nm=norm)


class HandWrittenNorm(nn.Module):
    """Llama's RMSNorm."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class HandWrittenLayerNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


PER_STREAM = {"post_norm": "per_stream"}


@case(layers(2, 2), options=PER_STREAM)
def post_norm_layer() -> nn.Module:
    return _post_norm(lambda: nn.LayerNorm(WIDTH))


@case(layers(2, 2), options=PER_STREAM)
def post_norm_rms() -> nn.Module:
    return _post_norm(lambda: nn.RMSNorm(WIDTH))


@case(layers(2, 2), options=PER_STREAM, single_pass=False)
def post_norm_by_hand() -> nn.Module:
    return _post_norm(HandWrittenNorm)


@case(layers(2, 2), options=PER_STREAM, single_pass=False)
def post_norm_mean_and_variance() -> nn.Module:
    return _post_norm(HandWrittenLayerNorm)


@case(layers(2, 2), options=PER_STREAM, single_pass=False)
def post_norm_functional_normalize() -> nn.Module:
    return _post_norm(lambda: Lambda(lambda m, x: functional.normalize(x, dim=-1)))


# ------------------------------------------------------------------------------------------------ refusals
@dataclasses.dataclass(frozen=True)
class Refused:
    """A model of which nothing can be converted, and a part of each reason."""

    name: str
    build: Callable[[], nn.Module]
    reasons: tuple[str, ...]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (tokens(),)

    def __str__(self) -> str:
        return self.name


REFUSED = [
    Refused("post_norm_layer", lambda: _post_norm(lambda: nn.LayerNorm(WIDTH)), ("post-norm",) * 4),
    Refused("post_norm_rms", lambda: _post_norm(lambda: nn.RMSNorm(WIDTH)), ("post-norm",) * 4),
    Refused("post_norm_by_hand", lambda: _post_norm(HandWrittenNorm), ("post-norm",) * 4),
    Refused(
        "relu_on_stream",
        lambda: blocks(lambda m, x: torch.relu(x + m.mlp(x)), 4, mlp=Mlp),
        ("relu",) * 4,
    ),
    Refused(
        "dropout_on_stream",
        lambda: blocks(lambda m, x: functional.dropout(x + m.mlp(x), 0.5), 4, mlp=Mlp),
        ("dropout",) * 4,
    ),
    Refused("rope_only", lambda: blocks(lambda m, x: m.a(x), a=Attention), ()),
]
