from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mhc_compile.capture import Builder
from mhc_compile.passes.streams import StreamBuilder, StreamValue
from tests.passes.graphs import traced

PATHS: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
    ("cast", lambda x: x.double(), True),
    ("scale", lambda x: x * 0.5, True),
    ("cast and scale", lambda x: x.double() / 3, True),
    ("layer norm", lambda x: F.layer_norm(x, (4,)), True),
    ("reshape", lambda x: x.reshape(6, 4), False),
    ("permute", lambda x: x.permute(1, 0, 2), False),
    ("roll", lambda x: torch.roll(x, 1, 1), False),
    ("own norm", lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), False),
]


@pytest.mark.parametrize(("function", "direct"), [p[1:] for p in PATHS], ids=[p[0] for p in PATHS])
def test_a_path_is_applied_to_every_stream_alike(function: Any, direct: bool) -> None:
    """The state after the path equals the path on each stream; element-wise ones need no loop over streams."""
    example = torch.randn(2, 3, 4)
    gm = traced(lambda x: (function(x), x), example)
    nodes = list(gm.graph.nodes)
    source, path = nodes[0], nodes[1:-1]
    builder = Builder(gm)
    with builder.at(after=source):
        state = builder.call(torch.stack, [source, builder.call(torch.sin, source)], dim=-2)
    # stack was built from nodes that stand behind it in the list: put them in order
    sine = state.args[0][1]
    state.prepend(sine)
    versions = {source: StreamValue(state, -1)}
    result = StreamBuilder(builder).apply(path, source, path[-1], versions, -1)
    gm.graph.output_node().args = (result.node,)
    gm.graph.lint()
    gm.recompile()
    want = torch.stack([function(example), function(example.sin())], dim=-2)
    torch.testing.assert_close(gm(example), want)
    assert tuple(result.node.meta["example_value"].shape) == tuple(want.shape)
    assert any(node.op == "call_method" and node.target == "select" for node in gm.graph.nodes) is not direct


def test_channels_move_out_and_back() -> None:
    gm = traced(lambda x: x.sin(), torch.randn(2, 5, 3, 4))
    x: fx.Node = next(iter(gm.graph.nodes))
    builder = Builder(gm)
    streams = StreamBuilder(builder)
    with builder.at(after=x):
        last = streams.channels_last(x, -3)
        back = streams.channels_back(last, -3)
        assert streams.channels_last(x, -1) is x
    assert tuple(last.meta["example_value"].shape) == (2, 3, 4, 5)
    assert tuple(back.meta["example_value"].shape) == (2, 5, 3, 4)
