"""Graphs that are a piece of the model: whole chains are converted, cut ones are refused with the line that cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_compile.errors import FragmentError, NotConvertedWarning
from mhc_compile.model import hyper_connections
from tests.passes.models import WIDTH, Attention, Block, Lambda, Mlp, Stack, tokens

OPTIONS = {"compiler": "eager", "streams": 2, "sinkhorn_iters": 1}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="mhc", options={**OPTIONS, **options})


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in hyper_connections(model)]


def test_break_inside_a_chain() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(m.embed(x))
        torch._dynamo.graph_break()
        return m.head(m.second(x))

    model = Lambda(forward, embed=nn.Linear(3, WIDTH), first=Block(), second=Block(), head=Mlp())
    with pytest.raises(FragmentError, match=r"test_fragments\.py"):
        compiled(model)(tokens())
    assert names(model) == []


def test_break_in_a_loop_over_the_layers() -> None:
    """Dynamo gives the loop up and compiles each layer alone."""

    def body(layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return layer(x)

    model = Stack([Block(), Block()], body)
    with pytest.raises(FragmentError):
        compiled(model)(tokens())
    assert names(model) == []


def test_break_between_chains() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        memory = m.encoder(x)
        torch._dynamo.graph_break()
        return m.decoder(memory)

    model = Lambda(forward, encoder=Stack([Block()]), decoder=Stack([Block()]))
    before = model(tokens())
    after = compiled(model)(tokens())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert names(model) == [f"{part}.layers.0.mhc{i}" for part in ("encoder", "decoder") for i in range(2)]


def test_one_layer_at_a_time() -> None:
    model = Stack([Block(), Block()])
    for layer in model.layers:
        layer.compile(backend="mhc", options=OPTIONS)
    with pytest.raises(FragmentError, match="one piece of"):
        model(tokens())
    assert names(model) == []


def test_encoder_inside_a_larger_model() -> None:
    """An encoder with its own embedding and norm is whole, wherever it is called from."""
    model = Lambda(lambda m, x: m.head(m.encoder(x)), encoder=Stack([Block()]), head=nn.Linear(3, 2))
    before = model(tokens())
    model.encoder.compile(backend="mhc", options=OPTIONS)
    torch.testing.assert_close(model(tokens()), before, rtol=1e-5, atol=1e-6)
    assert names(model) == ["encoder.layers.0.mhc0", "encoder.layers.0.mhc1"]


def test_a_piece_without_a_chain_is_compiled_and_said() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        torch._dynamo.graph_break()
        for layer in (m.first, m.second):
            x = torch.nn.functional.layer_norm(x + layer(x), (WIDTH,))
        return x

    model = Lambda(forward, embed=nn.Linear(3, WIDTH), first=Mlp(), second=Mlp())
    with pytest.warns(NotConvertedWarning, match=r"post-norm[\s\S]*test_fragments\.py"):
        compiled(model)(tokens())
    assert names(model) == []


def test_break_in_front_of_the_first_layer() -> None:
    """What has run before is known: an embedding in a graph of ours, and no layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        torch._dynamo.graph_break()
        return m.head(m.second(m.first(x)))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Lambda(forward, embed=nn.Linear(3, WIDTH), first=Block(), second=Block(), head=Mlp())

    model = build()
    torch.testing.assert_close(compiled(model)(tokens()), build()(tokens()), rtol=1e-5, atol=1e-6)
    assert names(model) == ["first.mhc0", "first.mhc1", "second.mhc0", "second.mhc1"]


def test_break_inside_the_first_layer() -> None:
    """The second layer comes whole behind the break, but not what has run before it."""

    class Breaking(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.attn(x)
            torch._dynamo.graph_break()
            return x + h

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(m.embed(x))))

    model = Lambda(forward, embed=nn.Linear(3, WIDTH), first=Breaking(), second=Block(), head=Mlp())
    with pytest.raises(FragmentError, match="cut"), pytest.warns(NotConvertedWarning, match="runs in pieces"):
        compiled(model)(tokens())
    assert names(model) == []


def test_a_helper_of_a_forward_that_runs_uncompiled() -> None:
    """Dynamo gives ``forward`` up and compiles the helper: no reason to say that the model has no residual add."""

    class Model(Lambda):
        def start(self, x: Tensor) -> Tensor:
            return self.embed(x)

    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(1):
            torch._dynamo.graph_break()
            x = m.start(x)
        return m.head(m.first(x))

    model = Model(forward, embed=nn.Linear(3, WIDTH), first=Block(), head=Mlp())
    with pytest.raises(FragmentError, match="one piece of a Model"), pytest.warns(NotConvertedWarning):
        compiled(model)(tokens())


def test_half_a_model_is_said() -> None:
    """A pre-norm tower beside a post-norm one: the first is converted, the second is not, with a warning."""

    def post_norm(m: Any, x: Tensor) -> Tensor:
        x = m.a(x + m.first(x))
        return m.b(x + m.second(x))

    norms = {name: nn.LayerNorm(WIDTH) for name in ("a", "b")}
    tower = Lambda(post_norm, **norms, first=Mlp(norm=None), second=Mlp(norm=None))
    model = Lambda(
        lambda m, x: m.left(x) + m.out(m.right(m.embed(x))),
        left=Stack([Block()]),
        embed=nn.Linear(3, WIDTH),
        right=tower,
        out=nn.Linear(WIDTH, 3),
    )
    with pytest.warns(NotConvertedWarning, match="2 residual adds of Lambda are widened, and 2 are left: post-norm"):
        compiled(model)(tokens())
    assert names(model) == ["left.layers.0.mhc0", "left.layers.0.mhc1"]


class PostNorm(nn.Module):
    """A layer as BERT has it: the norm on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(norm=None), Mlp(norm=None)
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x + self.attn(x))
        return self.b(x + self.mlp(x))


def post_norm_stack(breaks: str) -> nn.Module:
    """Two layers; ``breaks``: where the graph does, "between" two layers or in front of each of a "loop"."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.embed(x))
        if breaks == "loop":
            for layer in (m.first, m.second):
                torch._dynamo.graph_break()
                x = layer(x)
            return m.head(x)
        x = m.first(x)
        if breaks == "between":
            torch._dynamo.graph_break()
        return m.head(m.second(x))

    torch.manual_seed(0)
    parts = {"embed": nn.Linear(3, WIDTH), "norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 3)}
    return Lambda(forward, first=PostNorm(), second=PostNorm(), **parts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("breaks", ["between", "loop"])
def test_break_between_post_norm_layers(breaks: str, training: bool) -> None:
    """The norm behind the last site of a piece is a part of the stream, which goes on in the next piece."""
    model = post_norm_stack(breaks).train(training)
    with torch.set_grad_enabled(training), pytest.raises(FragmentError, match=r"test_fragments\.py"):
        compiled(model, post_norm="per_stream")(tokens())
    assert names(model) == []


@pytest.mark.parametrize("training", [True, False])
def test_post_norm_layers_in_one_graph(training: bool) -> None:
    model = post_norm_stack("nowhere").train(training)
    with torch.set_grad_enabled(training):
        after = compiled(model, post_norm="per_stream")(tokens())
    torch.testing.assert_close(after, post_norm_stack("nowhere")(tokens()), rtol=1e-5, atol=1e-6)
    assert names(model) == [f"{layer}.mhc{i}" for layer in ("first", "second") for i in range(2)]


def test_break_inside_the_first_post_norm_site() -> None:
    """What follows the break begins with the norm of a sum whose branch ran in front of it."""

    class Breaking(PostNorm):
        def forward(self, x: Tensor) -> Tensor:
            h = self.attn(x)
            torch._dynamo.graph_break()
            x = self.a(x + h)
            return self.b(x + self.mlp(x))

    model = post_norm_stack("nowhere")
    model.add_module("first", Breaking())
    with pytest.raises(FragmentError, match="cut"), pytest.warns(NotConvertedWarning, match="runs in pieces"):
        compiled(model, post_norm="per_stream")(tokens())
    assert names(model) == []
