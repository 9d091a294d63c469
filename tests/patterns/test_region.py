"""What lies between inputs and outputs, and what forbids to take it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mhc_compile.patterns.region import GraphFacts, obstacle, region, relink_writes
from tests.spellings.harness import capture

X = torch.randn(3, 4)


def facts_of(function: Callable[..., Any], *args: Tensor) -> tuple[dict[str, fx.Node], GraphFacts]:
    graph, _ = capture(function, *args)
    relink_writes(graph.graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    return nodes, GraphFacts(graph.graph, lambda node: node.name == "l_w_")


def simple(x: Tensor, w: Tensor) -> Tensor:
    scale = w.exp()
    middle = x * 2
    return (middle * scale).sum(-1)


def test_a_region_ends_at_inputs_and_parameters() -> None:
    nodes, facts = facts_of(simple, X, X + 1)
    part = region([nodes["sum_1"]], [nodes["l_x_"]], facts)
    assert [node.name for node in part.nodes] == ["scale", "middle", "mul_1", "sum_1"]
    assert {node.name for node in part.leaves} == {"l_x_", "l_w_"}
    assert nodes["scale"] not in part.inner
    assert nodes["scale"] in facts.static
    assert obstacle(part, [nodes["sum_1"]], facts) is None


def test_dependence() -> None:
    nodes, facts = facts_of(simple, X, X + 1)
    assert facts.depends(nodes["sum_1"], nodes["l_x_"])
    assert not facts.depends(nodes["scale"], nodes["l_x_"])
    assert facts.rests_on(nodes["sum_1"], [nodes["middle"]])
    assert not facts.rests_on(nodes["sum_1"], [nodes["scale"]])


def read_outside(x: Tensor) -> tuple[Tensor, Tensor]:
    a = x.exp()
    return a.sum(-1), a


def changed_mode(x: Tensor) -> Tensor:
    with torch.no_grad():
        a = x.exp()
    return a * x


def second_name(x: Tensor) -> Tensor:
    a = x + 1
    view = a.view(-1)
    a.mul_(2)
    return a.sum() + view[0] * 0


def writes_an_input(x: Tensor) -> Tensor:
    return x.mul_(2).sum()


@pytest.mark.parametrize(
    ("function", "source", "output", "reason"),
    [
        (read_outside, "l_x_", "sum_1", "an intermediate result is also read by"),
        (changed_mode, "l_x_", "mul", "it spans a change of grad mode"),
        (second_name, "a", "sum_1", "an in-place write whose buffer has a second name"),
        (writes_an_input, "l_x_", "sum_1", "an in-place write whose buffer has a second name"),
    ],
)
def test_obstacles(function: Callable[..., Any], source: str, output: str, reason: str) -> None:
    nodes, facts = facts_of(function, X.clone())
    part = region([nodes[output]], [nodes[source]], facts)
    found = obstacle(part, [nodes[output]], facts)
    assert found is not None
    assert found[0].startswith(reason)


def test_a_write_in_place_is_read_by_its_result() -> None:
    def function(x: Tensor) -> Tensor:
        a = x + 1
        a.mul_(2)
        a.add_(3)
        return a.sum()

    graph, inputs = capture(function, X)
    expected = graph(*inputs)
    relink_writes(graph.graph)
    graph.recompile()
    nodes = {node.name: node for node in graph.graph.nodes}
    assert nodes["sum_1"].args[0].target == "add_"
    assert nodes["sum_1"].args[0].args[0].target == "mul_"
    torch.testing.assert_close(graph(*inputs), expected)


def test_a_state_that_is_overwritten_in_between_is_not_read_late() -> None:
    def function(x: Tensor) -> Tensor:
        state = x + 1
        mixed = state * 3
        state.zero_()
        return mixed.sum() + state.sum()

    nodes, facts = facts_of(function, X)
    part = region([nodes["sum_1"]], [nodes["state"]], facts)
    found = obstacle(part, [nodes["sum_1"]], facts)
    assert found is not None
    assert found[0] == "an input is written in place by `zero_` before the op would read it"
