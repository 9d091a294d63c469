"""Tracing a body into a graph."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx

from mhc_compile.lowering.inline import Bodies, replace, replace_by_function


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


def sums(shapes: list[tuple[int, ...]], twice: bool = False) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A graph of additions that are to be replaced; with ``twice`` the last one adds a tensor to itself."""
    graph, nodes = fx.Graph(), []
    for index, shape in enumerate(shapes):
        a, b = graph.placeholder(f"a{index}"), graph.placeholder(f"b{index}")
        for source in (a, b):
            source.meta["val"] = torch.ones(shape)
        last = twice and index == len(shapes) - 1
        nodes.append(graph.call_function(torch.ops.aten.add.Tensor, (a, a if last else b)))
        nodes[-1].meta["val"] = torch.ones(shape)
    graph.output(tuple(nodes))
    return fx.GraphModule(torch.nn.Module(), graph), nodes


@pytest.mark.parametrize(
    ("shapes", "twice", "traced"), [([(2, 3)] * 3, False, 1), ([(2, 3), (2, 4)], False, 2), ([(2, 3)] * 2, True, 2)]
)
def test_equal_calls_are_traced_once(shapes: list[tuple[int, ...]], twice: bool, traced: int) -> None:
    gm, nodes = sums(shapes, twice)
    bodies: Bodies = {}

    def body(a: Tensor, b: Tensor) -> Tensor:
        return (a * 2.0).sum(-1, keepdim=True) - b

    for node in nodes:
        replace_by_function(node, body, node.args, bodies=bodies)
    assert len(bodies) == traced
    gm.recompile()
    inputs = [torch.rand(shape) for shape in shapes for _ in range(2)]
    wants = [body(a, a if twice and a is inputs[-2] else b) for a, b in zip(inputs[::2], inputs[1::2], strict=True)]
    for have, want in zip(gm(*inputs), wants, strict=True):
        torch.testing.assert_close(have, want)
    values = [node.meta["val"] for node in gm.graph.nodes if node.op == "call_function"]
    assert len({id(value) for value in values}) == len(values)  # copies do not share values
