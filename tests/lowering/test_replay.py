"""Runs of post in a backward graph: which are one replay, which are not. Numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.hopper import BF16, FP32, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")


def graph_of(sites: int, *, branch_between: bool = False, widen_at: int = -1) -> fx.Graph:
    """`sites` posts after one another; with `branch_between` the second y is computed from the state before it."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def value(node: fx.Node, *shape: int, dtype: torch.dtype = torch.bfloat16) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    state = value(graph.placeholder("x"), 6, 4, 32)
    given = []
    for index in range(sites):
        dtype = torch.float32 if index == widen_at else torch.bfloat16
        given.append(
            (
                value(graph.placeholder(f"y{index}"), 6, 32, dtype=dtype),
                value(graph.placeholder(f"q{index}"), 6, 4, dtype=torch.float32),
                value(graph.placeholder(f"h{index}"), 6, 4, 4, dtype=torch.float32),
            )
        )
    states = []
    for index, (y, q, h) in enumerate(given):
        if branch_between and index == 1:
            y = value(graph.call_function(torch.ops.aten.sum.dim_IntList, (state, [1])), 6, 32)
        state = graph.call_function(torch.ops.mhc.post.default, (state, y, q, h, False))
        value(state, 6, 4, 32, dtype=torch.float32 if 0 <= widen_at <= index else torch.bfloat16)
        states.append(state)
    graph.output(tuple(states))
    return graph


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


@pytest.mark.parametrize(("sites", "calls", "left"), [(1, 0, 1), (2, 1, 0), (4, 1, 0), (5, 1, 1), (8, 2, 0), (7, 2, 0)])
def test_runs_become_calls_of_four(sites: int, calls: int, left: int) -> None:
    from mhc_compile.lowering import replay

    graph, log = graph_of(sites), LoweringLog()
    assert replay.merge(graph, log, lambda name, named: "no") == 0
    assert replay.merge(graph, log, lambda name, named: "") == calls == log.counts()["replay", "fused"]
    graph.lint()
    assert targets(graph).count("mhc_kernel.replay.default") == calls
    assert targets(graph).count("mhc.post.default") == left


def test_a_state_that_the_branch_reads_is_no_replay() -> None:
    from mhc_compile.lowering import replay

    assert [len(run) for run in replay.find(graph_of(4, branch_between=True))] == [3], "a forward ends the run"


def test_a_change_of_dtype_ends_the_run() -> None:
    from mhc_compile.lowering import replay

    assert [len(run) for run in replay.find(graph_of(4, widen_at=2))] == [2]


@pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")
def test_registers() -> None:
    from mhc_compile.lowering import post, replay

    config = post.post_config(WIDTH)
    warps = config.pop("num_warps")
    pointers = dict.fromkeys(("x_ptr", *(f"{stem}{i}" for stem in ("y", "out") for i in range(4))), BF16)
    pointers |= dict.fromkeys((f"{stem}{i}" for stem in "qh" for i in range(4)), FP32)
    constants = {"C": WIDTH, "N": 4, "SITES": 4, "HAS_RES": True, "TRANSPOSE": False, **config}
    made = compile_for_hopper(replay.replay_kernel, pointers, {}, constants, num_warps=warps)
    assert (made.stack, made.registers <= 160) == (0, True)
    assert made.ptx.count("ld.global.v4") >= 8, "the streams once, each branch once, in 16-byte loads"
    assert made.ptx.count("st.global.v4") == 16
