"""The small part of coefficients as one call: the ops, that they compute the native body, and when they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mhc_compile import ops
from mhc_compile.config import Options
from mhc_compile.lowering import opaque
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import lower
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

N, C = 4, 6
SPECS = {
    "whole": CoefficientSpec(streams=N),
    "bfloat16": CoefficientSpec(streams=N, mix_dtype=torch.bfloat16, norm="rms_outside"),
    "no norm, no pre": CoefficientSpec(layout="res,post", streams=N, norm="none"),
}


def arguments(spec: CoefficientSpec, lead: tuple[int, ...] = (2, 3)) -> tuple[Any, ...]:
    """The flat arguments of `mhc::coefficients`."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, phi, bias = make(*lead, N, C), make(spec.rows, N * C), make(spec.rows)
    return (x, phi, bias, make(), make(1), make(), *spec.op_arguments().values())


def backward_arguments(spec: CoefficientSpec, lead: tuple[int, ...] = (2, 3)) -> tuple[Any, ...]:
    args = arguments(spec, lead)
    outs = ops.coefficients.native(*args)
    grads = [torch.randn_like(out) if out.numel() else None for out in outs[:3]]
    return (*grads, *args[:6], outs[3], [True] * 6, *args[6:])


@pytest.mark.parametrize("lead", [(2, 3), (5,), (0,)])
@pytest.mark.parametrize("name", SPECS)
def test_the_bodies_compute_the_native_ones(name: str, lead: tuple[int, ...]) -> None:
    for op, args in (("coefficients", arguments), ("coefficients_backward", backward_arguments)):
        given = args(SPECS[name], lead)
        native = ops.coefficients.native if op == "coefficients" else ops.coefficients.native_backward
        for have, want in zip(opaque.BODIES[op](*given), native(*given), strict=True):
            assert have.dtype == want.dtype
            torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_opcheck(name: str) -> None:
    spec = SPECS[name]
    *_, bias, a, b, c = arguments(spec)[:6]
    d_pre, d_post, d_res, *rest = backward_arguments(spec)
    projection, flat = rest[6], list(spec.op_arguments().values())
    tests = ("test_schema", "test_faketensor")  # below autograd, so no autograd of their own
    space = torch.ops.mhc_native
    torch.library.opcheck(space.activate.default, (projection, bias, a, b, c, *flat), test_utils=tests)
    given = (d_pre, d_post, d_res, projection, N * C, [True] * 6, bias, a, b, c, *flat)
    torch.library.opcheck(space.small_gradients.default, given, test_utils=tests)
    given = (d_pre, d_post, d_res, projection, N * C, [True, True, False, False, True, False], bias, a, b, c, *flat)
    torch.library.opcheck(space.small_gradients.default, given, test_utils=tests)


def graph_of(steps: int) -> fx.Graph:
    spec = CoefficientSpec(streams=N, sinkhorn=SinkhornSpec(steps=steps))
    args = arguments(spec)
    graph = fx.Graph()
    nodes = []
    for index, value in enumerate(args[:6]):
        nodes.append(graph.placeholder(f"a{index}"))
        nodes[-1].meta["val"] = value
    node = graph.call_function(ops.coefficients.overload, (*nodes, *args[6:]))
    node.meta["val"] = ops.coefficients.native(*args)
    graph.output(nodes[0])
    return graph


@pytest.mark.parametrize(("steps", "used"), [(4, False), (40, True)])
def test_it_is_used_where_the_sinkhorn_is_a_call_anyway(steps: int, used: bool) -> None:
    graph, log = graph_of(steps), LoweringLog()
    lower(graph, Options(), log)
    assert (torch.ops.mhc_native.activate.default in {node.target for node in graph.nodes}) is used
    entry = next(entry for entry in log.entries if entry.op == "coefficients")
    assert ("one call of the native body" in entry.reason) is used
