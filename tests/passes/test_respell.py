from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mhc_compile.capture.mutation import op_name
from mhc_compile.config import Options
from mhc_compile.passes import PassContext
from mhc_compile.passes.respell import fold, respell
from tests.passes.graphs import is_parameter, traced
from tests.passes.models import WIDTH, Attention, Block, Lambda, Mlp, Stack, report, tokens
from tests.zoo.base import Example, projection_loss
from tests.zoo.convert import check

X, Y, G = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
HIDDEN: dict[str, Callable[..., Tensor]] = {
    "addcmul": lambda x, y, g: torch.addcmul(x, y, g),
    "addcmul with a factor": lambda x, y, g: torch.addcmul(x, y, g, value=0.5),
    "addcmul, method": lambda x, y, g: x.addcmul(y, g),
    "lerp by a number": lambda x, y, g: torch.lerp(x, y, 0.25),
    "lerp by a tensor": lambda x, y, g: torch.lerp(x, y, g),
    "addmm": lambda x, y, g: torch.addmm(x.flatten(0, 1), y.flatten(0, 1), g[0, :1].expand(4, 4)),
    "baddbmm": lambda x, y, g: torch.baddbmm(x, y, g[:, :1].expand(2, 4, 4)),
}


def context() -> PassContext:
    return PassContext(Options(), is_parameter=is_parameter)


def names(gm: fx.GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes]


@pytest.mark.parametrize("name", HIDDEN)
def test_spelled_as_an_add_and_back(name: str) -> None:
    function = HIDDEN[name]
    gm = traced(function, X, Y, G)
    before = names(gm)
    assert respell(gm, context()).changed == 1
    assert "add" in names(gm)
    gm.graph.lint()
    torch.testing.assert_close(fx.GraphModule(gm, gm.graph)(X, Y, G), function(X, Y, G))
    fold(gm)
    gm.graph.lint()
    assert sorted(set(names(gm)) - {"rsub"}) == sorted(set(before))
    assert torch.equal(fx.GraphModule(gm, gm.graph)(X, Y, G), function(X, Y, G))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, w: torch.addcmul(w, x, y),  # a parameter is no stream
        lambda x, y, w: torch.addcmul(x[:, :1], x, y),  # nor is what is broadcast
        lambda x, y, w: torch.addmm(x[0], y[0], w[0, :1].expand(4, 4), beta=0.5),
        lambda x, y, w: x * y + w,
    ],
)
def test_what_stays(function: Callable[..., Tensor]) -> None:
    gm = traced(function, X, Y, G)
    before = names(gm)
    assert respell(gm, context()).changed == 0
    assert names(gm) == before


def test_switched_off_with_the_rewrite() -> None:
    gm = traced(HIDDEN["addcmul"], X, Y, G)
    assert respell(gm, PassContext(Options(rewrite=False))).changed == 0
    assert respell(gm, PassContext(Options(streams=1))).changed == 0


def gated(m: Any, x: Tensor) -> Tensor:
    """adaLN's gate by one call, then an interpolation, then a product that is added as it is made."""
    x = torch.addcmul(x, m.gate.expand_as(x), m.attn(x))
    x = torch.lerp(x, m.mlp(x), 0.3)
    h = torch.tanh(m.up(m.norm(x)))
    return torch.addmm(x.flatten(0, 1), h.flatten(0, 1), m.down.weight.t()).view_as(x)


def gated_block() -> nn.Module:
    parts = {"attn": Attention(), "mlp": Mlp(), "norm": nn.LayerNorm(WIDTH)}
    block = Lambda(gated, **parts, up=nn.Linear(WIDTH, 16), down=nn.Linear(16, WIDTH, bias=False))
    block.register_parameter("gate", nn.Parameter(torch.linspace(0.5, 1.5, WIDTH)))
    return block


def test_in_a_model() -> None:
    model = Stack([gated_block(), Block()])
    assert [row.module for row in report(model, tokens()).sites] == ["layers.0"] * 3 + ["layers.1"] * 2
    outcome = check(Example(Stack([gated_block(), Block()]), {"x": tokens()}, projection_loss), {"compiler": "eager"})
    assert (outcome.sites, outcome.problems) == (5, [])


def test_what_is_no_site_is_left_as_it_was() -> None:
    """A modulation by one call inside a branch rounds as before."""

    def modulated(m: Any, x: Tensor) -> Tensor:
        n = m.norm(x)
        return x + m.mlp(torch.addcmul(n * 0.1, n, m.scale.expand_as(n)))

    block = Lambda(modulated, norm=nn.LayerNorm(WIDTH), mlp=Mlp(norm=None))
    block.register_parameter("scale", nn.Parameter(torch.ones(WIDTH)))
    result = report(Stack([block, Block()]), tokens())
    assert [row.module for row in result.sites] == ["layers.0"] + ["layers.1"] * 2
    assert "addcmul(" in result.graph
