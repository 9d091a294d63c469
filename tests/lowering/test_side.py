"""What is taken apart for a side stream, under Triton's interpreter and on graphs."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mhc_compile.compat import triton_version
from mhc_compile.lowering.kernels import register_kernels
from mhc_compile.lowering.side import split_coefficients
from mhc_compile.ops import CoefficientSpec

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")


def activate_graph(layout: str = "pre,post,res") -> fx.Graph:
    """partial -> activate -> pre to a branch, post and res behind it."""
    from mhc_compile.lowering import coefficients  # noqa: F401  # registers the op

    spec = CoefficientSpec(layout=layout, **({} if "res" in layout else {"res": "none", "sinkhorn": None}))
    graph = fx.Graph()
    partial, bias, alpha = (graph.placeholder(name) for name in ("partial", "bias", "alpha"))
    for node, shape in ((partial, (1, 6, 32)), (bias, (spec.rows,)), (alpha, (1,))):
        node.meta["val"] = torch.ones(shape, device="meta")
    alphas = [alpha if part in spec.parts else None for part in ("pre", "post", "res")]
    with graph.inserting_after(alpha):
        node = graph.call_function(
            torch.ops.mhc_kernel.activate.default, (partial, bias, *alphas, 64, *spec.op_arguments().values())
        )
    n = spec.streams
    shapes = [(6, n), (6, n), (6, n, n), (6, spec.rows + 1)]
    node.meta["val"] = tuple(torch.ones(shape, device="meta") for shape in shapes)
    parts = []
    for index, value in enumerate(node.meta["val"]):
        parts.append(graph.call_function(operator.getitem, (node, index)))
        parts[-1].meta["val"] = value
    branch = graph.call_function(torch.ops.aten.neg.default, (parts[0],))
    branch.meta["val"] = parts[0].meta["val"]
    graph.output((branch, *parts[1:]))
    return graph


def names(graph: fx.Graph) -> list[str]:
    return [
        str(node.target) for node in graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)
    ]


def test_pre_is_made_on_its_own_and_put_back() -> None:
    graph = activate_graph()
    before = str(graph)
    ((late, early, undo),) = split_coefficients(graph)
    assert names(graph)[:2] == ["mhc_kernel.activate_pre.default", "mhc_kernel.activate.default"]
    assert [str(user.target) for user in early.users] == ["aten.neg.default"]
    assert late.name == "activate_default"
    assert early.meta["val"].shape == (6, 4)
    graph.lint()
    undo()
    assert str(graph) == before


def test_nothing_to_take_out() -> None:
    assert split_coefficients(activate_graph("pre")) == []
    empty = fx.Graph()
    empty.output(empty.placeholder("x"))
    assert split_coefficients(empty) == []


def test_the_backward_is_left_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2, 2)
    product: fx.Node = graph.call_function(torch.ops.aten.mm.default, (x, x))
    graph.output(product)
    assert split_coefficients(graph) == []


@pytest.mark.gpu
def test_every_case_of_the_calibration_runs() -> None:
    from mhc_compile.lowering.side import main_parts, side_cases

    for kind, call, size, *instead in [*side_cases(64, 256), *main_parts(64, 256)]:
        assert size > 0, kind
        for one in (call, *instead):
            result: Any = one()
            first = result if isinstance(result, Tensor) else result[0]
            assert bool(torch.isfinite(first.float()).all()), kind


REGISTER = """
import torch
from mhc_compile.lowering.kernels import register_kernels
register_kernels(torch.device("meta"))
assert not hasattr(torch.ops.mhc_kernel, "activate"), "no kernels there, Triton is not imported"
register_kernels(torch.device("cpu"))
torch.ops.mhc_kernel.activate.default, torch.ops.mhc_kernel.logits_backward.default
"""


def test_a_fresh_process_knows_the_ops_that_a_cached_graph_names() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", REGISTER], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    register_kernels(None)


def logits_graph(layout: str = "pre,post,res", d_pre: bool = True, streams: int = 4) -> fx.Graph:
    """Gradients of the coefficients -> logits_backward -> three results."""
    from mhc_compile.lowering import coefficients_backward  # noqa: F401  # registers the op

    spec = CoefficientSpec(layout=layout, streams=streams)
    graph, n, tokens = fx.Graph(), streams, 6
    shapes = {
        "d_pre": (tokens, n), "d_post": (tokens, n), "d_res": (tokens, n, n), "projection": (tokens, spec.rows + 1),
        "bias": (spec.rows,), "alpha": (1,),
    }  # fmt: skip
    nodes = {name: graph.placeholder(name) for name in shapes}
    for name, node in nodes.items():
        node.meta["val"] = torch.ones(shapes[name], device="meta")
    grads = [nodes["d_pre"] if d_pre else None, nodes["d_post"], nodes["d_res"]]
    node = graph.call_function(
        torch.ops.mhc_kernel.logits_backward.default,
        (*grads, nodes["projection"], nodes["bias"], *[nodes["alpha"]] * 3, 64, True, *spec.op_arguments().values()),
    )
    node.meta["val"] = tuple(torch.ones(shape, device="meta") for shape in ((6, 32), (6,), (1, spec.rows + 3)))
    parts = []
    for index, value in enumerate(node.meta["val"]):
        parts.append(graph.call_function(operator.getitem, (node, index)))
        parts[-1].meta["val"] = value
    graph.output(tuple(parts))
    return graph


def test_the_backward_of_post_and_res_is_cut_off_and_put_back() -> None:
    graph = logits_graph()
    before = names(graph)
    ((late, rest, undo),) = split_coefficients(graph)
    graph.lint()
    assert names(graph) == ["mhc_kernel.logits_backward_early.default", "mhc_kernel.logits_backward_rest.default"]
    assert "d_pre" not in [str(node) for node in late.all_input_nodes], "it need not wait for the gradient of pre"
    assert [value.shape for value in late.meta["val"]] == [(6, 32), (6, 2), (1, 27)]
    assert next(str(node) for node in rest.all_input_nodes) == "d_pre"
    assert len(rest.users) == 3
    undo()
    graph.lint()
    assert names(graph) == before
    (whole,) = [node for node in graph.nodes if "logits_backward" in str(node.target)]
    assert [str(node) for node in whole.all_input_nodes[:3]] == ["d_pre", "d_post", "d_res"]
    assert len(whole.users) == 3


def test_a_backward_that_waits_for_one_thing_is_not_cut() -> None:
    assert split_coefficients(logits_graph(d_pre=False)) == []
    assert split_coefficients(logits_graph(streams=1)) == []
    assert split_coefficients(logits_graph("post,res")) == []
