"""Coefficients in the launch of the norm: the numbers of the two kernels, and where the pair is taken."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.graphs import kernels_of
from tests.lowering.interpreter import interpreted
from tests.lowering.test_activate_post import graph_of

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

NUMBERS = """
import itertools, torch
from mhc_compile.lowering import activate_beside_norm, coefficients, pre_norm
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # what nobody writes is NaN
sinkhorn = SinkhornSpec(steps=5)
log = SinkhornSpec(steps=4, positivity="log", first="row", eps=0.0, positive_eps=0.0)
kinds = [dict(sinkhorn=sinkhorn), dict(sinkhorn=None, res="linear"), dict(sinkhorn=None, res="none", layout="post,pre")]
cases = [(n, kinds[0], None, "rms", False) for n in (1, 2, 3)] + [(4, dict(sinkhorn=log), None, "rms", False)]
cases += [(4, *rest) for rest in itertools.product(kinds, (None, torch.bfloat16), ("rms", "layer"), (False, True))]
for n, kind, mix, norm, keep in cases:
    spec = CoefficientSpec(streams=n, mix_dtype=mix, pre_eps=0.01, norm="rms_outside", **kind)
    flat = tuple(spec.op_arguments().values())
    shapes = ((3, 40, torch.bfloat16), (1, 72, torch.float16), (0, 16, torch.float32), (70, 24, torch.bfloat16))
    for tokens, width, dtype in shapes[: 4 if n == 3 else 3]:
        partial = torch.randn(2, tokens, coefficients.padded_rows(spec)).abs()
        bias, (a, b, c) = torch.randn(spec.rows), [torch.randn(1) for _ in range(3)]
        c = c if "res" in spec.parts else None
        x = torch.randn(1, tokens, n, width).to(dtype)
        weight, shift = torch.randn(width).to(dtype), torch.randn(width).to(dtype) if norm == "layer" else None
        branch = (weight, shift, norm, 1e-6, 0.0, True, keep)
        four = coefficients.activate(partial, bias, a, b, c, n * width, *flat)
        normed = pre_norm.forward(x, four[0].view(1, tokens, n), *branch)
        got = activate_beside_norm.forward(x, *branch, partial, bias, a, b, c, n * width, *flat)
        for index, (one, other) in enumerate(zip(got, (*normed, *four), strict=True)):
            assert one.shape == other.shape and one.dtype == other.dtype, (index, n, kind)
            if index == 5:  # numpy adds a column in another order than a warp does
                torch.testing.assert_close(one, other, rtol=1e-2 if mix else 1e-5, atol=1e-6)
            else:
                assert torch.equal(one, other), (index, n, kind, mix, norm, keep, tokens)
print("same numbers")
"""


def test_the_numbers_of_the_two_kernels() -> None:
    assert "same numbers" in interpreted(NUMBERS)


GRAPHS = """
import torch
from mhc_compile.config import FUSIONS, Options
from mhc_compile.lowering import activate_beside_norm
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.graphs import close, gradients, inputs, kernels_of, lowered
from tests.lowering.graphs import normed_chain as sites

activate_beside_norm.LEAST = 66

def run(grad, lengths=(33,), fuse=True, **options):
    torch._dynamo.reset()
    log, seen = LoweringLog(), []
    compiled = lowered(sites, Options(fuse=fuse, **options), log, seen)
    for length in lengths:
        given = inputs(length, dtype=torch.float32)
        torch._dynamo.mark_dynamic(given[0], 1)
        exact = [one.detach().double().requires_grad_(one.requires_grad) for one in given]
        if grad:
            close(gradients(compiled, given), gradients(sites, exact), 1e-4)
        else:
            with torch.no_grad():
                close([compiled(*given)], [sites(*exact)], 1e-5)
    assert len(seen) == 1 + grad, "one compile serves every length"
    return kernels_of(seen[0].graph), log

def sites_of(*site):
    return [*site, "post", *site, "post_collapse"]

three, four = sites_of("project", "activate_beside_norm"), sites_of("project", "activate", "pre_norm")
called, log = run(True, (33, 40))
assert called == three, called
assert log.counts()["activate + pre_norm", "fused"] == 2
within = tuple(name for name in FUSIONS if name != "activate_post")
assert run(False, fuse=within)[0] == three  # where post does not make its own coefficients
assert run(True, schedule="auto")[0] == four  # Sinkhorn is the scheduler's to move
called, log = run(True, fuse=tuple(name for name in FUSIONS if name != "activate_beside_norm"))
assert called == four and "activate + pre_norm" not in {entry.op for entry in log.entries}
activate_beside_norm.LEAST = 67
called, log = run(True)
assert called == four
assert {entry.reason for entry in log.entries if entry.provider == "two kernels"} >= {
    "66 tokens, Sinkhorn beside the norm is for at least 67"}
print("fused")
"""


def test_whole_graphs() -> None:
    """Three launches a site forward, in training too; the gradients are those of float64."""
    assert "fused" in interpreted(GRAPHS)


def test_the_pair_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from mhc_compile.lowering import activate_beside_norm

    monkeypatch.setattr(activate_beside_norm, "LEAST", 96)
    for extra in ("", "pre", "post", "res", "projection"):  # whoever reads a result has it from there
        graph, log = graph_of(extra), LoweringLog()
        assert activate_beside_norm.merge(graph, log) == 1
        graph.lint()
        assert kernels_of(graph) == ["activate_beside_norm", "post"]
        assert log.counts()["activate + pre_norm", "fused"] == 1
        assert activate_beside_norm.merge(graph, log) == 0


def test_a_gate_without_a_norm_stays() -> None:
    from mhc_compile.lowering import activate_beside_norm

    graph = graph_of(norm=False)
    before = str(graph)
    assert activate_beside_norm.merge(graph, LoweringLog()) == 0
    assert str(graph) == before


@pytest.mark.parametrize(
    ("streams", "late", "why"),
    [
        (8, False, "8 streams, a thread holds a matrix of (1, 2, 4)"),
        (4, False, "96 tokens, Sinkhorn beside the norm is for at least 97"),
        (4, True, "the norm reads what is not known before the coefficients"),
    ],
)
def test_what_stays_two_kernels_says_why(streams: int, late: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight streams; few tokens; a norm whose weight is made of the coefficients."""
    from mhc_compile.lowering import activate_beside_norm

    monkeypatch.setattr(activate_beside_norm, "LEAST", 96 if late else 97)
    graph, log = graph_of(streams=streams, late=late), LoweringLog()
    before = str(graph)
    assert activate_beside_norm.merge(graph, log) == 0
    assert str(graph) == before
    assert [(entry.op, entry.provider, entry.reason) for entry in log.entries] == [
        ("activate + pre_norm", "two kernels", why)
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [1024, 2560, 4096, 1000])
@pytest.mark.parametrize(("streams", "tokens"), [(4, 96), (4, 8192), (4, 513), (2, 129), (1, 129)])
def test_the_bits_of_the_two_kernels_on_a_device(streams: int, tokens: int, width: int) -> None:
    """A thread that holds a matrix adds as the four threads do that share one."""
    from mhc_compile.lowering import activate_beside_norm, coefficients, pre_norm
    from tests.lowering.operands import operands, partials

    given = operands(tokens, width, streams)
    partial, flat = partials(given)
    four = coefficients.activate(partial, given.bias, *given.alphas, streams * width, *flat)
    branch = (given.weight, None, "rms", 1e-6, 0.0, True, False)
    normed = pre_norm.forward(given.x, four[0], *branch)
    got = activate_beside_norm.forward(given.x, *branch, partial, given.bias, *given.alphas, streams * width, *flat)
    for one, other in zip(got, (*normed, *four), strict=True):
        assert torch.equal(one, other)
