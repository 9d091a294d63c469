"""post with the next site's pre and norm: compiled for sm_90, and where it is taken. Numbers: interpreted_cases.py."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.hopper import BF16, FP32, WIDTH, compile_for_hopper, compiler_missing


@pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")
def test_registers() -> None:
    from mhc_compile.lowering import post_pre_norm, pre_norm

    config = pre_norm.config(WIDTH)
    warps = config.pop("num_warps")
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "weight_ptr", "bias_ptr", "state_ptr", "out_ptr", "mixed_ptr"), BF16)
    pointers |= dict.fromkeys(("post_ptr", "res_ptr", "pre_ptr", "statistics_ptr"), FP32)
    constants = {"C": WIDTH, "N": 4, "HAS_RES": True, "TRANSPOSE": False, "LAYER": False, "EPS": 1e-6, "OFFSET": 0.0}
    constants |= {"ROUND": True, "WEIGHT": True, "BIAS": False, "KEEP": True, **config}
    made = compile_for_hopper(post_pre_norm.post_pre_norm_kernel, pointers, {}, constants, num_warps=warps)
    assert (made.stack, made.registers <= 128) == (0, True)


def graph_of(gate_first: bool) -> fx.Graph:
    """post, then pre_norm of its result with a gate that is there before it, or is computed from it."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def value(node: fx.Node, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    x = value(graph.placeholder("x"), 6, 4, 32, dtype=torch.bfloat16)
    y = value(graph.placeholder("y"), 6, 32, dtype=torch.bfloat16)
    q, h = value(graph.placeholder("q"), 6, 4), value(graph.placeholder("h"), 6, 4, 4)
    p = value(graph.placeholder("p"), 6, 4)
    state = graph.call_function(torch.ops.mhc.post.default, (x, y, q, h, False))
    value(state, 6, 4, 32, dtype=torch.bfloat16)
    gate = p if gate_first else value(graph.call_function(torch.ops.aten.sum.dim_IntList, (state, [-1])), 6, 4)
    both = graph.call_function(torch.ops.mhc.pre_norm.default, (state, gate, None, None, "rms", 1e-6, 0.0, False))
    with mode:
        both.meta["val"] = (torch.empty(6, 32, dtype=torch.bfloat16), torch.empty(6, 1))
    out = value(graph.call_function(operator.getitem, (both, 0)), 6, 32, dtype=torch.bfloat16)
    graph.output((state, out))
    return graph


@pytest.mark.skipif(not triton_version(), reason="Triton is not installed")
@pytest.mark.parametrize("gate_first", [True, False])
def test_taken_only_where_the_gate_is_there_first(gate_first: bool) -> None:
    from mhc_compile.lowering import post_pre_norm

    graph, log = graph_of(gate_first), LoweringLog()
    assert len(post_pre_norm.find(graph)) == gate_first
    assert post_pre_norm.merge(graph, log, lambda name, named: "no") == 0, "no kernel takes them"
    assert post_pre_norm.merge(graph, log, lambda name, named: "") == gate_first
    graph.lint()
    targets = [str(node.target) for node in graph.nodes]
    assert targets.count("mhc_kernel.post_pre_norm.default") == gate_first
    assert targets.count("mhc.post.default") == targets.count("mhc.pre_norm.default") == (not gate_first)
