"""The pass itself, on CPU: what is lowered and why, dynamic lengths, cache identity, the user's own passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from mhc_compile.config import Options
from mhc_compile.lowering import inductor
from mhc_compile.lowering.base import TARGETS, LoweringLog
from mhc_compile.lowering.inductor import LaunchPass, LowerPass, config_patches
from tests.lowering.graphs import chain, close, gradients, inputs, lowered


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_native_bodies_are_traced_for_every_length() -> None:
    log, seen = LoweringLog(), []
    compiled = lowered(chain, Options(lowering="native"), log, seen)
    for tokens in (5, 9):
        tensors = inputs(tokens)
        torch._dynamo.mark_dynamic(tensors[0], 1)
        close(gradients(compiled, tensors), gradients(chain, inputs(tokens)), 1e-5)
    assert len(seen) == 2, "a forward and a backward graph, once"
    assert not any(node.target in TARGETS for gm in seen for node in gm.graph.nodes)
    assert {entry.provider for entry in log.entries} == {"inductor"}
    assert {entry.reason for entry in log.entries if entry.op == "pre"} == {"lowering='native'"}


def test_long_sinkhorn_loops_stay_one_call() -> None:
    reason = inductor.opaque_reason("sinkhorn", {"steps": 40})
    assert "40 half steps" in reason
    assert inductor.opaque_reason("sinkhorn", {"steps": 4}) == ""


def test_cpu_reasons_are_recorded() -> None:
    log = LoweringLog()
    gradients(lowered(chain, Options(), log, []), inputs(3))
    reasons = {entry.reason for entry in log.entries if entry.op == "coefficients"}
    assert len(reasons) == 1
    assert "cpu" in reasons.pop() or "Triton" in next(iter(log.reasons())).reason
    assert log.counts()["pre_backward", "inductor"] == 2


def test_triton_alone_is_an_error_where_there_is_no_kernel() -> None:
    with pytest.raises(Exception, match="has no kernel"):
        gradients(lowered(chain, Options(lowering="triton"), LoweringLog(), []), inputs(3))


def test_pass_leaves_other_graphs_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.neg.default, (x,)))
    before = str(graph)
    LowerPass(Options(), LoweringLog())(graph)
    LaunchPass(LoweringLog())(graph)
    assert str(graph) == before


def test_identity_follows_options_and_plan() -> None:
    log = LoweringLog()
    assert LowerPass(Options(), log).uuid() == LowerPass(Options(), LoweringLog()).uuid()
    assert LowerPass(Options(), log).uuid() != LowerPass(Options(fuse=False), log).uuid()
    assert LowerPass(Options(), log, "a").uuid() != LowerPass(Options(), log, "b").uuid()
    assert len(inductor.source_hash()) == 64


def test_the_users_pass_runs_first() -> None:
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Theirs(CustomGraphPass):
        calls = 0

        def __call__(self, graph: fx.Graph) -> None:
            Theirs.calls += 1
            assert any(node.target in TARGETS for node in graph.nodes)

        def uuid(self) -> str:
            return "theirs"

    log = LoweringLog()
    with config.patch(post_grad_custom_pre_pass=Theirs()):
        step: Any = config_patches(Options(), log)["post_grad_custom_pre_pass"]
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2, 3, device="meta")
    out = graph.call_function(torch.ops.mhc.collapse.default, (x, "mean"))
    out.meta["val"] = torch.ones(3, device="meta")
    graph.output(out)
    step(graph)
    assert Theirs.calls == 1
    assert log.counts()["collapse", "inductor"] == 1
    assert step.uuid()[0] == "theirs"


@pytest.mark.slow
def test_through_inductor() -> None:
    """The whole way on CPU: one compile, two lengths, gradients."""
    log = LoweringLog()
    patches: Any = config_patches(Options(), log)
    compiled = torch.compile(chain, fullgraph=True, options=patches)
    for tokens in (5, 9):
        tensors = inputs(tokens)
        torch._dynamo.mark_dynamic(tensors[0], 1)
        close(gradients(compiled, tensors), gradients(chain, inputs(tokens)), 1e-5)
    assert log.counts()["coefficients", "inductor"] == 2
