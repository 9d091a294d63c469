"""Layouts are reached by views, and by none where the tensor lies right already."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx

from mhc_compile.capture import Builder
from mhc_compile.patterns.axes import Axes, Dims
from mhc_compile.patterns.base import Unarrangeable, arrange, in_dtype
from tests.spellings.harness import capture

X = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float()


def graph_of(x: torch.Tensor) -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    graph, _ = capture(lambda x: x + 1, x)
    nodes = list(graph.graph.nodes)
    return graph, nodes[0], nodes[-1]


def arranged(x: torch.Tensor, have: list[tuple[int, ...]], want: list[tuple[int, ...]]) -> tuple[torch.Tensor, int]:
    """The tensor in the wanted layout, and how many views that took. Atoms 0..3 have the sizes 2, 3, 4, 5."""
    graph, node, output = graph_of(x)
    axes = Axes()
    names = [axes.new(size) for size in (2, 3, 4, 5)]
    dims: tuple[Dims, Dims] = tuple(tuple(tuple(names[i] for i in dim) for dim in d) for d in (have, want))
    before = len(graph.graph.nodes)
    builder = Builder(graph)
    with builder.at(before=output):
        result = arrange(builder, axes, node, *dims)
    output.args = ((result,),)
    graph.recompile()
    return graph(x)[0], len(graph.graph.nodes) - before


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_a_permutation(order: tuple[int, ...]) -> None:
    got, views = arranged(X, [(0,), (1,), (2,), (3,)], [(i,) for i in order])
    assert torch.equal(got, X.permute(order))
    assert views == (0 if order == (0, 1, 2, 3) else 1)


def test_flat_axes_are_cut_and_merged() -> None:
    got, views = arranged(X.flatten(2), [(0,), (1,), (2, 3)], [(0,), (1,), (2,), (3,)])
    assert torch.equal(got, X)
    assert views == 1
    got, _ = arranged(X, [(0,), (1,), (2,), (3,)], [(1, 0), (3, 2)])
    assert torch.equal(got, X.permute(1, 0, 3, 2).reshape(6, 20))
    got, _ = arranged(X.flatten(1), [(0,), (1, 2, 3)], [(3,), (0, 1), (2,)])
    assert torch.equal(got, X.permute(3, 0, 1, 2).flatten(1, 2))


def test_axes_of_one_come_and_go() -> None:
    got, _ = arranged(X[:, :, None], [(0,), (1,), (), (2,), (3,)], [(), (0,), (2,), (), (1,), (3,)])
    assert torch.equal(got, X.permute(0, 2, 1, 3)[None, :, :, None])


def test_other_axes_cannot_be_reached() -> None:
    with pytest.raises(Unarrangeable, match="not those of the op"):
        arranged(X, [(0,), (1,), (2,), (3,)], [(0,), (1,), (2,)])


def test_a_cast_only_where_it_is_needed() -> None:
    graph, node, output = graph_of(X)
    builder = Builder(graph)
    with builder.at(before=output):
        assert in_dtype(builder, node, torch.float32) is node
        assert in_dtype(builder, node, torch.float64).meta["example_value"].dtype == torch.float64
