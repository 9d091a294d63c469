"""Both ends of a chain in the backward: one row for all streams, and their sum; the bits of what is written out."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.ends import row_of
from tests.lowering.graphs import FakeGraph
from tests.lowering.interpreter import interpreted

needs_triton = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

BITS = """
import torch
from mhc_compile.lowering import boundary, post, site_boundary
from tests.lowering.calls import calls
from tests.lowering.test_post_collapse import in_order

torch.use_deterministic_algorithms(True)  # what nobody writes is NaN

def rows(grad, n):
    return grad.unsqueeze(-2).expand(*grad.shape[:-1], n, grad.shape[-1]).clone()

def same(got, want, note):
    got, want = (one if isinstance(one, tuple) else (one,) for one in (got, want))
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape and torch.equal(one, other), note

for n, dtype in ((4, torch.bfloat16), (4, torch.float16), (4, torch.float32), (2, torch.bfloat16), (3, torch.bfloat16)):
    given = calls(5, 96, n=n, dtype=dtype, steps=4)
    x, grad, *rest = given["streams_backward"][0]
    row = grad[:, 0].contiguous()
    same(boundary.streams_backward(x, row, *rest), boundary.streams_backward(x, rows(row, n), *rest), "alike")
    plain = (None, *rest[1:])
    same(boundary.streams_backward(x, row, *plain), boundary.streams_backward(x, rows(row, n), *plain), "no H")
    # The interpreter cuts bfloat16 off where a device rounds.
    whole = boundary.streams_backward(x, grad, *rest)
    if dtype != torch.bfloat16:
        same(boundary.streams_backward(x, grad, *rest, summed=True), in_order(whole, "sum"), "summed")
    whole = boundary.streams_backward(x, rows(row, n), *rest)
    if dtype != torch.bfloat16:
        same(boundary.streams_backward(x, row, *rest, summed=True), in_order(whole, "sum"), "alike and summed")
    for _, *others in given["post_dots"][:2]:
        same(post.dots(row, *others), post.dots(rows(row, n), *others), "post_dots")
    if "site_boundary" in given:
        for _, *others in given["site_boundary"][:2]:
            kernel = site_boundary.site_boundary
            same(kernel(row, *others), kernel(rows(row, n), *others), "boundary")
print("same bits")
"""


@needs_triton
def test_the_bits_of_what_is_written_out() -> None:
    assert "same bits" in interpreted(BITS)


GRAPHS = """
import torch
from mhc_compile.config import FUSIONS, Options
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.graphs import chain, close, gradients, inputs, lowered

without = tuple(name for name in FUSIONS if name != "ends")
for dtype, boundary in ((torch.float16, True), (torch.float32, True), (torch.float16, False)):
    found = {}
    for fuse in (True, without) if boundary else (tuple(n for n in FUSIONS if n != "site_boundary"), without[:2]):
        torch._dynamo.reset()
        log, seen = LoweringLog(), []
        compiled = lowered(chain, Options(fuse=fuse), log, seen)
        given = inputs(33, dtype=dtype)
        torch._dynamo.mark_dynamic(given[0], 1)
        found[fuse] = gradients(compiled, given)
        counts = log.counts()
        on = fuse is True or "ends" in fuse
        assert counts["post + collapse", "fused"] == on, counts
        assert counts["gradient of expand", "fused"] == (on and dtype == torch.float16), counts
        assert counts["gradient of collapse", "fused"] == 2 * on, counts
        names = [str(node.target) for node in seen[1].graph.nodes]
        assert ("aten.expand.default" in names) != on, "nothing of n u is written for the gradient of collapse"
        assert len(seen) == 2
        again = inputs(40, dtype=dtype)
        close(gradients(compiled, again), gradients(chain, [one.detach().double().requires_grad_() for one in again]),
              0.05 if dtype == torch.float16 else 1e-4)
        assert len(seen) == 2, "one compile serves every length"
    one, other = found.values()
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if boundary:
            assert torch.equal(a, b), index
print("ends")
"""


@needs_triton
def test_whole_graphs() -> None:
    """Output and gradients have the same bits with and without; those of another length are those of float64."""
    assert "ends" in interpreted(GRAPHS)


def copies(axis: int, shape: tuple[int, ...], spread: tuple[int, ...], clone: bool = True) -> fx.Node:
    made, aten = FakeGraph(), torch.ops.aten
    node = made.given("row", *shape)
    steps = [(aten.unsqueeze.default, axis), (aten.expand.default, spread), (aten.clone.default,)]
    for target, *rest in steps if clone else steps[:2]:
        node = made.call(target, node, *rest)
    return node


def test_a_row_that_stands_for_all_streams() -> None:
    for axis in (-2, 2):
        found = row_of(copies(axis, (2, 3, 16), (2, 3, 4, 16)))
        assert found is not None
        assert found.op == "placeholder"
    assert row_of(copies(-1, (2, 3, 4), (2, 3, 4, 16))) is None  # copies along the channels
    assert row_of(copies(-2, (1, 3, 16), (2, 3, 4, 16))) is None  # and along the batch
    assert row_of(copies(-2, (2, 3, 16), (2, 3, 4, 16), clone=False)) is None
    assert row_of(None) is None
    assert row_of(fx.Graph().placeholder("x")) is None


@needs_triton
def test_a_gradient_that_is_read_elsewhere_is_written() -> None:
    """Its sum is left to inductor then."""
    from mhc_compile.lowering import boundary, ends  # noqa: F401  # registers the op

    for extra in (False, True):
        made = FakeGraph()
        graph, half = made.graph, functools.partial(made.given, dtype=torch.float16)
        x, du, p = half("x", 2, 4, 16), half("du", 2, 16), made.given("p", 2, 4)
        args = (x, None, None, False, du, p, None, None, None)
        state = made.call(torch.ops.mhc_kernel.streams_backward.default, *args)
        total = made.call(torch.ops.mhc.expand_backward.default, state)
        graph.output((total, state) if extra else (total,))
        log = LoweringLog()
        assert ends.sum_streams(graph, log) == (not extra)
        graph.lint()
        assert log.counts()["gradient of expand", "fused"] == (not extra)
        assert state.args[-1] == (None if extra else True)


def test_what_does_not_fit_the_registers_is_written() -> None:
    from mhc_compile.lowering.ends import sum_refusal

    assert sum_refusal(torch.empty(2, 4, 16, dtype=torch.bfloat16)) == ""
    assert "torch.float32" in sum_refusal(torch.empty(2, 4, 16))
    assert "8 streams" in sum_refusal(torch.empty(2, 8, 16, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [1024, 2560, 4096])
@pytest.mark.parametrize("tokens", [17, 1000])
def test_the_bits_on_a_device(tokens: int, width: int) -> None:
    from mhc_compile.lowering import boundary, post, site_boundary
    from tests.lowering.calls import calls
    from tests.lowering.test_post_collapse import in_order

    given = calls(tokens, width)
    x, grad, *rest = given["streams_backward"][0]
    row = grad[:, 0].contiguous()
    rows = row.unsqueeze(1).expand(grad.shape).clone()
    assert torch.equal(boundary.streams_backward(x, row, *rest), boundary.streams_backward(x, rows, *rest))
    summed = boundary.streams_backward(x, grad, *rest, summed=True)
    assert torch.equal(summed, in_order(boundary.streams_backward(x, grad, *rest), "sum"))
    pairs = [
        (post.dots, given["post_dots"][0]),
        *((site_boundary.site_boundary, one) for one in given["site_boundary"]),
    ]
    for kernel, (_, *others) in pairs:
        for one, other in zip(kernel(row, *others), kernel(rows, *others), strict=True):
            # Which of its products dy fuses with a sum is the compiler's choice: another last bit here and there.
            assert one.shape == other.shape
            assert float((one.double() - other.double()).norm()) <= 2e-4 * float(other.double().norm())
