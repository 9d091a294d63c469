"""Tracing a body into a graph."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx

from mhc_compile.lowering.inline import replace, replace_by_function


def graph_of(users: int) -> tuple[fx.GraphModule, fx.Node]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2, 3)
    node = graph.call_function(torch.ops.aten.var_mean.correction, (x,))
    node.meta["val"] = (torch.ones(()), torch.ones(()))
    graph.output(tuple(graph.call_function(operator.getitem, (node, i)) for i in range(users)) if users else node)
    return fx.GraphModule(torch.nn.Module(), graph), node


def test_several_results() -> None:
    gm, node = graph_of(2)

    def body(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x.sum() * scale, x.mean()

    replace_by_function(node, body, [node.args[0], 3.0])
    gm.recompile()
    x = torch.rand(2, 3)
    torch.testing.assert_close(gm(x), (x.sum() * 3, x.mean()))


def test_a_result_taken_whole_is_refused() -> None:
    gm, node = graph_of(0)
    with pytest.raises(ValueError, match="takes it whole"):
        replace(node, [node.args[0], node.args[0]])
    assert gm is not None
