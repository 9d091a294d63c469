"""Sums that a kernel reads as addends: what is taken, what is left. Numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")
MODE = FakeTensorMode()


def graph_of(count: int, *, read_twice: bool = False) -> tuple[fx.Graph, fx.Node]:
    """A sum of `count` matrix products [6, 8], viewed as [2, 3, 8], into pre_norm_dots."""
    from mhc_compile.lowering import pre_norm  # noqa: F401  # registers the op

    graph = fx.Graph()

    def node(target: object, args: tuple[object, ...], shape: tuple[int, ...]) -> fx.Node:
        made = graph.placeholder(str(target)) if not args else graph.call_function(target, args)  # type: ignore[arg-type]  # operators
        with MODE:
            made.meta["val"] = torch.empty(shape, dtype=torch.bfloat16)
        return made

    a, b = node("a", (), (6, 4)), node("b", (), (4, 8))
    x, p, s = node("x", (), (2, 3, 4, 8)), node("p", (), (2, 3, 4)), node("s", (), (2, 3, 1))
    total = None
    for _ in range(count):
        product = node(torch.ops.aten.mm.default, (a, b), (6, 8))
        part = node(torch.ops.aten.view.default, (product, [2, 3, 8]), (2, 3, 8))
        total = part if total is None else node(torch.ops.aten.add.Tensor, (total, part), (2, 3, 8))
    dots = graph.call_function(
        torch.ops.mhc_kernel.pre_norm_dots.default, (total, x, p, None, s, "rms", 0.0, False, True, False, False)
    )
    graph.output((dots, total) if read_twice else dots)
    return graph, dots


@pytest.mark.parametrize("count", [1, 2, 3])
def test_addends_replace_the_sum(count: int) -> None:
    from mhc_compile.lowering.addends import take_addends

    graph, dots = graph_of(count)
    log = LoweringLog()
    assert take_addends(graph, log) == (count > 1)
    graph.eliminate_dead_code()
    targets = [node.target for node in graph.nodes]
    assert torch.ops.aten.add.Tensor not in targets
    assert targets.count(torch.ops.aten.mm.default) == count
    if count > 1:
        assert all(part.target is torch.ops.aten.mm.default for part in (dots.args[0], *dots.args[11:]) if part)
        assert log.counts()["gradient sum", "fused"] == 1
        assert take_addends(graph, log) == 0, "once is enough"


def test_at_most_three() -> None:
    from mhc_compile.lowering.addends import take_addends

    graph, dots = graph_of(4)
    assert take_addends(graph, LoweringLog()) == 1
    graph.eliminate_dead_code()
    assert [node.target for node in graph.nodes].count(torch.ops.aten.add.Tensor) == 1
    assert all(isinstance(part, fx.Node) for part in (dots.args[0], *dots.args[11:13]))


def test_a_sum_that_others_read_stays() -> None:
    from mhc_compile.lowering.addends import take_addends

    graph, _ = graph_of(2, read_twice=True)
    assert take_addends(graph, LoweringLog()) == 0
