"""The last post and collapse in one kernel: the bits of the two, and where the pair is taken."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.graphs import FakeGraph
from tests.lowering.interpreter import interpreted

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")


def in_order(state: torch.Tensor, kind: str) -> torch.Tensor:
    """`collapse` with the streams added one after another, as inductor does."""
    total = state[..., 0, :].float()
    for stream in range(1, state.shape[-2]):
        total = total + state[..., stream, :].float()
    return (total / state.shape[-2] if kind == "mean" else total).to(state.dtype)


BITS = """
import itertools, torch
from mhc_compile.lowering import post, post_collapse
from tests.lowering.test_post_collapse import in_order

torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # what nobody writes is NaN
# No bfloat16: the interpreter cuts it off where a device rounds.
shapes = ((3, 40, torch.float16), (1, 72, torch.float16), (0, 16, torch.float32), (2, 600, torch.float16))
for n, has_res, transpose, kind in itertools.product((1, 2, 3, 4, 8), (True, False), (False, True), ("mean", "sum")):
    for tokens, width, dtype in shapes[: 4 if n == 4 else 3]:
        x, y = torch.randn(1, tokens, n, width).to(dtype), torch.randn(1, tokens, width).to(dtype)
        q, h = torch.randn(1, tokens, n), torch.randn(1, tokens, n, n) if has_res else None
        want = in_order(post.forward(x, y, q, h, transpose), kind)
        got = post_collapse.forward(x, y, q, h, transpose, kind)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.equal(got, want), (n, has_res, transpose, kind, tokens)
print("same bits")
"""


def test_the_bits_of_the_two_ops() -> None:
    assert "same bits" in interpreted(BITS)


def graph_of(extra: bool, other: bool) -> fx.Graph:
    """post -> collapse; `extra`: the state is read elsewhere too; `other`: it is an input."""
    made = FakeGraph()
    graph, given, call = made.graph, made.given, made.call
    x, y, q, h = given("x", 2, 3, 4, 16), given("y", 2, 3, 16), given("q", 2, 3, 4), given("h", 2, 3, 4, 4)
    state = x if other else call(torch.ops.mhc.post.default, x, y, q, h, False)
    out = call(torch.ops.mhc.collapse.default, state, "mean")
    graph.output((out, state) if extra else (out,))
    return graph


def test_the_pair_is_one() -> None:
    from mhc_compile.lowering import post_collapse

    graph, log = graph_of(False, False), LoweringLog()
    assert post_collapse.merge(graph, log, lambda name, named: "") == 1
    graph.lint()
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["mhc_kernel.post_collapse.default"]
    assert log.counts()["post + collapse", "fused"] == 1
    assert post_collapse.merge(graph, log, lambda name, named: "") == 0


@pytest.mark.parametrize(("extra", "other", "why"), [(True, False, ""), (False, True, ""), (False, False, "float64")])
def test_what_stays(extra: bool, other: bool, why: str) -> None:
    """A state that somebody else reads, one that no post makes, one that no kernel takes."""
    from mhc_compile.lowering import post_collapse

    graph = graph_of(extra, other)
    before = str(graph)
    assert post_collapse.merge(graph, LoweringLog(), lambda name, named: why) == 0
    assert str(graph) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [1024, 2560, 4096, 1000])
@pytest.mark.parametrize("tokens", [1, 129])
def test_the_bits_of_the_two_ops_on_a_device(tokens: int, width: int) -> None:
    from mhc_compile.lowering import post, post_collapse
    from tests.lowering.operands import operands

    given = operands(tokens, width)
    want = in_order(post.forward(given.x, given.y, given.q, given.h, False), "mean")
    assert torch.equal(post_collapse.forward(given.x, given.y, given.q, given.h, False, "mean"), want)
