from __future__ import annotations

import pytest
import torch

from mhc_compile.cost import CPU, Device
from mhc_compile.passes.boundaries import Chain, Site
from mhc_compile.passes.logits import HALF_STEP, Logits, compare, total
from mhc_compile.passes.states import find_states
from tests.passes.models import Block, Stack, conversions, tokens

GPU = Device("fast", 1e12, {"bfloat16": 1e15, "float32": 1e14}, 1e-6)
TOKENS = 2 * 5


def logits_of(**options: object) -> Logits:
    _, _, (outcome,) = conversions(Stack([Block() for _ in range(3)]), [tokens()], [options])
    (states,) = find_states(outcome.gm.graph)
    chain = Chain(tuple(Site(4 * 8 * TOKENS * 4, 0, 0, 2e-6, 0.0) for _ in states))
    return compare(states, chain, GPU)


def test_what_a_site_keeps_either_way() -> None:
    found = logits_of(sinkhorn_iters=3)
    assert found.kept == (24 + 25) * 4 * TOKENS
    assert found.alone == 25 * 4 * TOKENS
    assert found.saved == 6 * 24 * 4 * TOKENS
    assert found.seconds == pytest.approx(6 * (1e-6 + found.kept / 1e12 + 6 * HALF_STEP))
    assert found.instead == pytest.approx(2e-6 / (4 * 8 * TOKENS * 4) * found.saved)
    assert found.pays == (found.seconds < found.instead)


def test_without_a_sinkhorn_there_is_only_the_launch() -> None:
    found = logits_of(variant="identity")
    assert found.kept == (8 + 9) * 4 * TOKENS
    assert found.seconds == pytest.approx(6 * (1e-6 + found.kept / 1e12))


def test_a_graph_without_coefficients_has_no_line() -> None:
    assert compare([], Chain(()), CPU) == Logits()
    assert Logits().line(1000) == ""
    assert not Logits().pays


def test_the_line_says_what_each_way_costs() -> None:
    few = Logits(2048, 1024, 2**20, 1e-3, 1e-5)
    assert "2.0 KiB a site" in few.line(2**22)
    assert "1.00 MiB less (25.00% of the peak) for 1.000 ms" in few.line(2**22)
    assert "replayed states give the same bytes for 0.010 ms" in few.line(2**22)
    assert "no lowering of ours" in Logits(2048, 1024, 2**20, 1e-5, 1e-3).line(2**22)
    both = total([few, few])
    assert (both.kept, both.saved, both.seconds) == (2048, 2**21, 2e-3)


def test_it_is_in_the_report() -> None:
    torch.manual_seed(0)
    settings = [{"recompute": 2 * 4 * 8 * TOKENS * 4}, {}]
    _, _, (on, off) = conversions(Stack([Block() for _ in range(3)]), [tokens()], settings)
    assert "coefficients and logits kept, 1.9 KiB a site at most" in " ".join(str(on.report).split())
    assert "coefficients and logits kept" not in str(off.report)
