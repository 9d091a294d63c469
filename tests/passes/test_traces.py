"""Traces on graphs of functions: what is still the stream, and what cuts it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mhc_compile.passes.roles import NONLINEAR, NORM, Roles
from mhc_compile.passes.traces import Trace, carried, follow
from tests.passes.graphs import by_name, is_parameter, traced


def graph(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, Roles, fx.Node, fx.Node]:
    """The graph of a function of x [2, 3, 4] and w [4, 4], its roles, x, and the result."""
    gm = traced(function, torch.randn(2, 3, 4), torch.randn(4, 4))
    (result,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    return gm, Roles(gm, is_parameter), by_name(gm)["x"], result


def whole(function: Callable[..., Tensor], *, per_stream: bool) -> Trace | None:
    """The trace of the result from x."""
    gm, roles, x, result = graph(function)
    traces = {x: Trace(x)}
    for node in gm.graph.nodes:
        trace = follow(node, traces, roles, per_stream=per_stream) if node is not x else None
        if trace is not None:
            traces[node] = trace
    return traces.get(result)


def one_call(x: Tensor, w: Tensor) -> Tensor:
    return 2 * F.layer_norm(x.reshape(6, 4), (4,))


def spelled_out(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(("norm", "role"), [(one_call, NORM), (spelled_out, NONLINEAR)])
def test_a_norm_cuts_the_stream_unless_it_is_applied_to_every_stream(norm: Callable[..., Tensor], role: str) -> None:
    cut = whole(norm, per_stream=False)
    assert cut is not None
    assert cut.barrier_role == role
    through = whole(norm, per_stream=True)
    assert through is not None
    assert through.barrier is None
    assert len(through.path) >= 3


def test_a_layer_ends_the_stream() -> None:
    assert whole(lambda x, w: F.linear(x, w), per_stream=True) is None


@pytest.mark.parametrize("per_stream", [False, True])
@pytest.mark.parametrize(
    "function", [lambda x, w: torch.tanh(x), lambda x, w: x * torch.sqrt(x.abs()), lambda x, w: F.dropout(x, 0.5)]
)
def test_what_is_neither_linear_nor_a_norm_cuts_the_stream(function: Callable[..., Tensor], per_stream: bool) -> None:
    trace = whole(function, per_stream=per_stream)
    assert trace is not None
    assert trace.barrier is not None


def test_the_reduction_of_a_norm_is_not_carried_but_its_result_is() -> None:
    gm, roles, x, result = graph(spelled_out)
    mean = by_name(gm)["mean"]
    found = carried(gm, x, roles, per_stream=True)
    assert found[x] == frozenset()
    assert mean not in found
    assert mean in found[result]
    assert carried(gm, x, roles, per_stream=False).keys() == {x}
