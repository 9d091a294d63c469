"""In-place writes become values exactly where nobody can see the difference."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from mhc_compile.capture.mutation import INPLACE_ADDS, aliases, functionalize, op_name

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["iadd", "add_", "setitem", "view", "slice", "clone", "mul", "sum"]), *[st.integers(0, 9)] * 2
    ),
    min_size=1,
    max_size=9,
)


def program(steps: list[tuple[str, int, int]]) -> fx.GraphModule:
    """A graph over two inputs [4, 6]: writes, views, copies and pure operations on any earlier value of that shape."""
    graph = fx.Graph()
    values = [graph.placeholder("a"), graph.placeholder("b")]
    pieces: list[fx.Node] = []
    for name, i, j in steps:
        x, y = values[i % len(values)], values[j % len(values)]
        if name == "iadd":
            values.append(graph.call_function(operator.iadd, (x, y)))
        elif name == "add_":
            values.append(graph.call_method("add_", (x, y), {"alpha": 0.5}))
        elif name == "setitem":
            source = graph.call_function(operator.mul, (pieces[j % len(pieces)], 2.0)) if pieces else 0.25
            graph.call_function(operator.setitem, (x, slice(0, 2), source))
        elif name == "view":
            flat = graph.call_method("view", (x, 24))
            values.append(graph.call_method("view", (flat, 4, 6)))
        elif name == "slice":
            pieces.append(graph.call_function(operator.getitem, (x, slice(1, 3))))
        elif name == "clone":
            values.append(graph.call_method("clone", (x,)))
        elif name == "mul":
            values.append(graph.call_function(operator.mul, (x, 1.5)))
        else:
            values.append(graph.call_function(operator.add, (x, y)))
    graph.output((*values[2:], *pieces))
    return fx.GraphModule({}, graph)


def with_values(gm: fx.GraphModule, *inputs: Any) -> fx.GraphModule:
    """Give every node the value of a run, as Dynamo's graphs carry fake ones."""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["example_value"] = result.detach().clone() if isinstance(result, Tensor) else result
            return result

    Recorder(gm).run(*inputs)
    return gm


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


@given(STEPS)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_random_programs_keep_their_meaning(steps: list[tuple[str, int, int]]) -> None:
    """The same outputs, and the same writes into the inputs."""
    before, after = inputs(), inputs()
    expected = program(steps)(*before)
    gm = with_values(program(steps), *inputs())
    functionalize(gm)
    gm.graph.lint()
    gm.recompile()
    actual = gm(*after)
    for a, e in zip([*actual, *after], [*expected, *before], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_private_add_becomes_a_value() -> None:
    gm = with_values(program([("clone", 0, 0), ("iadd", 2, 1), ("add_", 3, 0)]), *inputs())
    assert functionalize(gm) == 2
    assert not [n for n in gm.graph.nodes if op_name(n) in INPLACE_ADDS]


@pytest.mark.parametrize(
    "steps",
    [
        [("iadd", 0, 1)],
        [("view", 0, 0), ("iadd", 2, 1)],
        [("clone", 0, 0), ("view", 2, 2), ("iadd", 2, 1), ("mul", 3, 3)],
        [("clone", 0, 0), ("slice", 2, 0), ("iadd", 2, 1)],
    ],
    ids=["input", "view of an input", "another name read later", "a slice that is returned"],
)
def test_shared_storage_is_left_alone(steps: list[tuple[str, int, int]]) -> None:
    gm = with_values(program(steps), *inputs())
    assert functionalize(gm) == 0


def test_an_add_keeps_the_dtype_that_it_writes() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_function(operator.iadd, (graph.call_method("clone", (a,)), b)),))
    x, y = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 0.001)
    gm = with_values(fx.GraphModule({}, graph), x, y)
    assert functionalize(gm) == 1
    gm.recompile()
    assert gm(x, y)[0].dtype == torch.bfloat16


def test_aliases_follow_views_both_ways() -> None:
    gm = program([("clone", 0, 0), ("view", 2, 0), ("mul", 3, 0)])
    with_values(gm, *inputs())
    names = {n.name for n in aliases(next(n for n in gm.graph.nodes if n.name == "view"))}
    assert names == {"clone", "view", "view_1"}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (operator.add, "add"),
        (torch.add, "add"),
        (torch.ops.aten.add.Tensor, "add"),
        ("add_", "add_"),
        (operator.iadd, "iadd"),
    ],
)
def test_op_name(target: Any, name: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method(target, (x, x)) if isinstance(target, str) else graph.call_function(target, (x, x))
    assert op_name(node) == name
