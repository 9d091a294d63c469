"""A gate that its norm computes for itself: the bits of the two calls, and where it is taken."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.ops import CoefficientSpec
from tests.lowering.interpreter import interpreted

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

BITS = """
import itertools, torch
from mhc_compile.lowering import coefficients, gate_pre_norm, pre_norm
from mhc_compile.lowering.activate_pre import activate_pre
from mhc_compile.ops import CoefficientSpec

torch.manual_seed(0)
layouts, kinds = ("pre,post,res", "post,pre,res"), ("rms", "layer")
for n, layout, splits, kind, keep in itertools.product((4, 3), layouts, (1, 4), kinds, (False, True)):
    spec = CoefficientSpec(streams=n, layout=layout, pre_eps=0.01, pre_scale=1.5)
    flat = tuple(spec.op_arguments().values())
    for tokens, width, dtype in ((11, 40, torch.bfloat16), (1, 200, torch.float32), (0, 16, torch.float16)):
        partial = torch.randn(splits, tokens, coefficients.padded_rows(spec)).abs()
        bias, alpha = torch.randn(spec.rows), torch.randn(1)
        x = torch.randn(1, tokens, n, width).to(dtype)
        weight, offset = torch.randn(width).to(dtype), torch.randn(width).to(dtype) if kind == "layer" else None
        own = (weight, offset, kind, 1e-6, 0.0, kind == "rms")
        gate = activate_pre(partial, bias, alpha, n * width, *flat)
        want = (*pre_norm.forward(x, gate.view(1, tokens, n), *own, keep), gate)
        got = gate_pre_norm.forward(x, *own, keep, partial, bias, alpha, n * width, *flat)
        for one, other in zip(got, want, strict=True):
            assert one.shape == other.shape and torch.equal(one, other), (n, layout, splits, kind, keep, tokens)
print("same bits")
"""


def test_the_bits_of_the_two_calls() -> None:
    assert "same bits" in interpreted(BITS)


def graph_of(early_reader: bool = False, norms: int = 1) -> fx.Graph:
    """activate_pre -> a view -> pre_norm; the gate is also a result, as for a backward."""
    from mhc_compile.lowering import activate_pre, pre_norm  # noqa: F401  # registers the ops

    graph, mode, spec = fx.Graph(), FakeTensorMode(), CoefficientSpec()

    def value(node: fx.Node, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    x = value(graph.placeholder("x"), 1, 6, 4, 32, dtype=torch.bfloat16)
    partial = value(graph.placeholder("partial"), 2, 6, 32)
    bias, alpha = value(graph.placeholder("bias"), spec.rows), value(graph.placeholder("alpha"), 1)
    flat = spec.op_arguments().values()
    kernels, aten = torch.ops.mhc_kernel, torch.ops.aten
    gate = value(graph.call_function(kernels.activate_pre.default, (partial, bias, alpha, 128, *flat)), 6, 4)
    view = value(graph.call_function(aten.view.default, (gate, [1, 6, 4])), 1, 6, 4)
    results = []
    if early_reader:
        results.append(value(graph.call_function(aten.neg.default, (view,)), 1, 6, 4))
    for _ in range(norms):
        norm = graph.call_function(kernels.pre_norm.default, (x, view, None, None, "rms", 1e-6, 0.0, True, False))
        with mode:
            norm.meta["val"] = kernels.pre_norm.default(*fx.map_arg(norm.args, lambda node: node.meta["val"]))
        results.append(value(graph.call_function(operator.getitem, (norm, 0)), 1, 6, 32, dtype=torch.bfloat16))
    graph.output((*results, view))
    return graph


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in graph.nodes if node.op == "call_function"]


def test_the_gate_is_made_where_it_is_read() -> None:
    from mhc_compile.lowering import gate_pre_norm

    graph, log = graph_of(), LoweringLog()
    assert gate_pre_norm.merge(graph, log) == 1
    graph.lint()
    named = [name for name in targets(graph) if "getitem" not in name]
    assert named == ["mhc_kernel.gate_pre_norm", "aten.view"]
    assert log.counts()["activate_pre + pre_norm", "fused"] == 1
    assert gate_pre_norm.merge(graph, log) == 0


@pytest.mark.parametrize("how", [{"early_reader": True}, {"norms": 2}, {"norms": 0}])
def test_a_gate_that_is_wanted_elsewhere_first_stays(how: dict[str, int]) -> None:
    from mhc_compile.lowering import gate_pre_norm

    graph = graph_of(**how)  # type: ignore[arg-type]  # a flag or a number
    before = str(graph)
    assert gate_pre_norm.merge(graph, LoweringLog()) == 0
    assert str(graph) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [1024, 2560, 4096, 1000])
@pytest.mark.parametrize("tokens", [96, 1024])
def test_the_bits_of_the_two_calls_on_a_device(tokens: int, width: int) -> None:
    from mhc_compile.lowering import activate_pre, gate_pre_norm, pre_norm
    from tests.lowering.operands import operands, partials

    given = operands(tokens, width)
    (partial, flat), x, alpha = partials(given), given.x, given.alphas[0]
    own = (given.weight, None, "rms", 1e-6, 0.0, True)
    gate = activate_pre.activate_pre(partial, given.bias, alpha, 4 * width, *flat)
    want = (*pre_norm.forward(x, gate, *own, True), gate)
    got = gate_pre_norm.forward(x, *own, True, partial, given.bias, alpha, 4 * width, *flat)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
