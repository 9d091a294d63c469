"""A post that makes its own coefficients: the bits of the two kernels, and where it is taken."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.ops import CoefficientSpec
from tests.lowering.graphs import FakeGraph, kernels_of
from tests.lowering.interpreter import interpreted

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

BITS = """
import itertools, torch
from mhc_compile.lowering import activate_post, coefficients, post
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # what nobody writes is NaN
sinkhorn = SinkhornSpec(steps=5)
kinds = [dict(sinkhorn=sinkhorn), dict(sinkhorn=None, res="linear"), dict(sinkhorn=None, res="none", layout="post,pre")]
cases = [(n, kinds[0], None, False) for n in (1, 2, 3, 8)]
cases += [(4, *rest) for rest in itertools.product(kinds, (None, torch.bfloat16), (False, True))]
for n, kind, mix, transpose in cases:
    spec = CoefficientSpec(streams=n, mix_dtype=mix, post_eps=0.01, norm="rms_outside", **kind)
    flat = tuple(spec.op_arguments().values())
    shapes = ((3, 40, torch.bfloat16), (1, 72, torch.float16), (0, 16, torch.float32), (130, 600, torch.float32))
    for tokens, width, dtype in shapes[: 4 if n == 3 else 3]:
        partial = torch.randn(2, tokens, coefficients.padded_rows(spec)).abs()
        bias, (a, b, c) = torch.randn(spec.rows), [torch.randn(1) for _ in range(3)]
        c = c if "res" in spec.parts else None
        x, y = torch.randn(1, tokens, n, width).to(dtype), torch.randn(1, tokens, width).to(dtype)
        _, q, h, _ = coefficients.activate(partial, bias, a, b, c, n * width, *flat)
        h = None if c is None else h.view(1, tokens, n, n)
        want = post.forward(x, y, q.view(1, tokens, n), h, transpose)
        got = activate_post.forward(x, y, partial, bias, b, c, n * width, transpose, *flat)
        assert got.shape == want.shape and torch.equal(got, want), (n, kind, mix, transpose, tokens)
print("same bits")
"""


def test_the_bits_of_the_two_kernels() -> None:
    assert "same bits" in interpreted(BITS)


GRAPHS = """
import torch
from mhc_compile.config import FUSIONS, Options
from mhc_compile.lowering import activate_post
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.graphs import close, inputs, kernels_of, lowered
from tests.lowering.graphs import normed_chain as sites

alone = tuple(name for name in FUSIONS if name not in ("activate_beside_norm", "ends"))

def run(grad, lengths=(33,), fuse=alone, **options):
    torch._dynamo.reset()
    log, seen = LoweringLog(), []
    compiled = lowered(sites, Options(fuse=fuse, **options), log, seen)
    with torch.set_grad_enabled(grad):
        for length in lengths:
            given = inputs(length, dtype=torch.bfloat16)
            torch._dynamo.mark_dynamic(given[0], 1)
            got = compiled(*given)
            close([got], [sites(*(one.detach().double() for one in given))], 0.02)
    assert len(seen) == 1 + grad, "one compile serves every length"
    return kernels_of(seen[0].graph), log

site = ["project", "gate_pre_norm", "activate_post"]
called, log = run(False, (33, 36))
assert called == 2 * site, called
assert log.counts()["activate + post", "fused"] == 2
assert any(entry.reason == "post makes its gate and H_res, which is never written" for entry in log.entries)
four = 2 * ["project", "activate", "pre_norm", "post"]
assert run(True)[0] == four  # a backward reads the coefficients
assert run(False, schedule="auto")[0] == four
for without in ("activate_post", "gate_pre_norm"):
    called, log = run(False, fuse=tuple(name for name in alone if name != without))
    assert called == four and "activate + post" not in {entry.op for entry in log.entries}
activate_post.MOST = 65
called, log = run(False)
assert called == four
assert {e.reason for e in log.entries if e.provider == "two kernels"} == {
    "66 tokens, Sinkhorn within post is for at most 65"}
print("fused")
"""


def test_whole_graphs() -> None:
    """Three launches a site where nothing but post reads its coefficients, four elsewhere, with the reason."""
    assert "fused" in interpreted(GRAPHS)


def graph_of(extra: str = "", norm: bool = True, streams: int = 4, late: bool = False) -> fx.Graph:
    """activate -> views -> norm and post, as a forward without a backward has it; `extra`: a result read elsewhere;
    `late`: the norm's weight is made of the coefficients."""
    from mhc_compile.lowering import post, pre, pre_norm  # noqa: F401  # registers the ops
    from mhc_compile.lowering.coefficients import padded_rows

    made, spec, n = FakeGraph(), CoefficientSpec(streams=streams), streams
    graph, given, call = made.graph, made.given, made.call
    kernels, aten = torch.ops.mhc_kernel, torch.ops.aten

    x, y = given("x", 1, 96, n, 32, dtype=torch.bfloat16), given("y", 1, 96, 32, dtype=torch.bfloat16)
    partial, bias = given("partial", 2, 96, padded_rows(spec)), given("bias", spec.rows)
    alphas = [given(f"alpha_{part}", 1) for part in spec.parts]
    every = call(kernels.activate.default, partial, bias, *alphas, 32 * n, *spec.op_arguments().values())
    gate, q, h, projection = (call(operator.getitem, every, index) for index in range(4))
    gate_view = call(aten.view.default, gate, [1, 96, n])
    q_view, h_view = call(aten.view.default, q, [1, 96, n]), call(aten.view.default, h, [1, 96, n, n])
    if extra == "two":  # each post takes its gate from one and H_res from the other
        other = call(kernels.activate.default, partial, bias, *alphas, 32 * n, *spec.op_arguments().values())
        h_view = call(aten.view.default, call(operator.getitem, other, 2), [1, 96, 4, 4])
    elif extra == "given":
        h_view = given("h", 1, 96, 4, 4)
    if norm:
        weight = call(aten.sum.dim_IntList, call(aten.view.default, q, [96 * n // 32, 32]), [0]) if late else None
        mixed = call(kernels.pre_norm.default, x, gate_view, weight, None, "rms", 1e-6, 0.0, True, False)
        u = call(operator.getitem, mixed, 0)
    else:
        u = call(kernels.pre.default, x, gate_view)
    own = None if extra == "none" else h_view
    state = call(kernels.post.default, x, call(aten.add.Tensor, u, y), q_view, own, False)
    read = {"": (), "projection": (projection,), "post": (q_view,), "res": (h_view,), "pre": (gate_view,)}
    graph.output((state, *read.get(extra, ())))
    return graph


def test_both_are_taken() -> None:
    from mhc_compile.lowering import activate_post

    for extra in ("", "pre"):  # who else reads the gate behind its norm has it from there
        graph, log = graph_of(extra), LoweringLog()
        assert activate_post.merge(graph, log) == 1
        graph.lint()
        assert kernels_of(graph) == ["gate_pre_norm", "activate_post"]
        assert log.counts()["activate + post", "fused"] == log.counts()["activate_pre + pre_norm", "fused"] == 1
        assert activate_post.merge(graph, log) == 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"extra": "projection"}, ""),
        ({"extra": "post"}, "not one post alone reads what it would make"),
        ({"extra": "res"}, "not one post alone reads what it would make"),
        ({"extra": "given"}, "not one post alone reads what it would make"),
        ({"extra": "none"}, "not one post alone reads what it would make"),
        ({"norm": False}, "the gate is not read by one norm first"),
    ],
)
def test_what_is_read_elsewhere_stays(how: dict[str, object], reason: str) -> None:
    from mhc_compile.lowering import activate_post

    graph, log = graph_of(**how), LoweringLog()  # type: ignore[arg-type]  # a name or a flag
    before = str(graph)
    assert activate_post.merge(graph, log) == 0
    assert str(graph) == before
    assert [(entry.provider, entry.reason) for entry in log.entries] == ([("two kernels", reason)] if reason else [])


def test_a_post_of_two_sites_stays() -> None:
    """Its gate from one, its H_res from the other: each would make both."""
    from mhc_compile.lowering import activate_post

    graph, log = graph_of("two"), LoweringLog()
    assert activate_post.merge(graph, log) == 0
    assert {entry.reason for entry in log.entries} == {"not one post alone reads what it would make"}


def test_few_programs_share_a_token_only_where_there_are_few_tokens() -> None:
    from mhc_compile.lowering import activate_post

    assert [activate_post.config(tokens, 2560)["EACH"] for tokens in (65, 128, 129, 512)] == [1, 1, 5, 5]
    assert activate_post.config(512, 4096) == {"BC": 1024, "num_warps": 4, "EACH": 4}
    assert activate_post.refusal(torch.empty(512, 4, 1)) == ""
    assert "513 tokens" in activate_post.refusal(torch.empty(513, 4, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [1024, 2560, 4096, 1000])
@pytest.mark.parametrize("tokens", [96, 129, 2048])
def test_the_numbers_of_the_two_kernels_on_a_device(tokens: int, width: int) -> None:
    from mhc_compile.lowering import activate_post, coefficients, post
    from tests.lowering.operands import operands, partials

    given = operands(tokens, width)
    (partial, flat), x, y, bias, alphas = partials(given), given.x, given.y, given.bias, given.alphas
    _, q, h, _ = coefficients.activate(partial, bias, *alphas, 4 * width, *flat)
    want = post.forward(x, y, q, h, False)
    got = activate_post.forward(x, y, partial, bias, *alphas[1:], 4 * width, False, *flat)
    # Sinkhorn adds four numbers across threads here and within one there: another order, another last bit of float32.
    assert float((got.double() - want.double()).norm() / want.double().norm()) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [96, 512])
def test_a_compiled_chain_on_a_device(tokens: int) -> None:
    """Through inductor's launches and in a CUDA graph, with the error of four launches a site."""
    from benchmarks import decode

    three, four = (decode.measure(name, tokens, 1024) for name in ("three launches", "four launches"))
    assert three["error"] <= 1.01 * four["error"] < 0.01
