"""The predicted peak of a plan and the liveness of the lowered graphs, under the interpreter: test_interpreter.py."""

from __future__ import annotations

import importlib

import pytest

from mhc_compile import cost, ops
from mhc_compile.passes import logits
from mhc_compile.passes.recompute import RecomputeResult
from tests.lowering.liveness import NARROW, WIDE, Lowered, lowered_graphs, peak_of

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _norms_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too, where the interpreter has a kernel for them."""
    module = importlib.import_module("mhc_compile.passes.fold_norms")
    monkeypatch.setattr(module, "_kernel_refusal", lambda named: "")


def plan_of(lowered: Lowered) -> RecomputeResult:
    return next(result for result in lowered.conversion.report.passes if isinstance(result, RecomputeResult))


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (4, "memory"),
        (4, 10**12),
        (4, 500_000_000),
        pytest.param(12, "memory", marks=pytest.mark.slow),
        pytest.param(36, "memory", marks=pytest.mark.slow),
        pytest.param(36, 3 * 10**9, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_that_of_the_graphs(layers: int, wanted: str | int) -> None:
    """Within 5 %, with the least peak, with everything kept, and with some of it."""
    lowered = lowered_graphs(layers, recompute=wanted)
    plan = plan_of(lowered)
    assert (plan.changed > 0) == (wanted != 10**12)
    assert plan.peak <= plan.peak_without
    measured = max(peak_of(lowered.forward), peak_of(lowered.backward))
    assert plan.peak == pytest.approx(measured, rel=0.05)


def test_the_predicted_time_is_that_of_the_calls() -> None:
    """What the calls of the backward graph that replay move and launch."""
    lowered = lowered_graphs(4, recompute="memory")
    names = [f"mhc_kernel.{name}.default" for name in ("replay_normed", "post_pre_norm", "pre_norm")]
    calls = [node for node in lowered.backward.nodes if str(node.target) in names]
    assert sum("replay_normed" in str(node.target) for node in calls) == 2, "two blocks of several sites"
    expanded = next(node for node in lowered.conversion.gm.graph.nodes if node.target is ops.expand.overload)
    assert plan_of(lowered).replay_seconds == pytest.approx(
        sum(cost.seconds(node, cost.CPU) for node in (*calls, expanded)), rel=0.02
    )


@pytest.mark.parametrize(
    ("layers", "shape", "form"),
    [
        (4, WIDE, "logits"),
        (6, NARROW, "logits"),
        (6, NARROW, "coefficients"),
        pytest.param(12, WIDE, "logits", marks=pytest.mark.slow),
        pytest.param(24, NARROW, "logits", marks=pytest.mark.slow),
    ],
    ids=["wide", "narrow", "narrow, both", "12 wide", "24 narrow"],
)
def test_the_peak_with_the_logits_alone(
    layers: int, shape: dict[str, int], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 2 %: made again when their block starts, there until their site has run backward."""
    monkeypatch.setattr(logits, "FORMS", (form,))
    lowered = lowered_graphs(layers, shape, recompute="memory")
    plan = plan_of(lowered)
    assert plan.logits.chosen == (form == "logits")
    again = [node for node in lowered.backward.nodes if str(node.target) == "mhc_kernel.activate_again.default"]
    if (layers, shape) == (4, WIDE):
        calls = [node for node in lowered.backward.nodes if str(node.target) == "mhc_kernel.replay_normed.default"]
        assert len(calls) == 2, "as many as with the coefficients kept: see below"
    assert len(again) == (2 * layers if form == "logits" else 0)
    assert not any(str(node.target).startswith("mhc_kernel.activate_again") for node in lowered.forward.nodes)
    measured = max(peak_of(lowered.forward), peak_of(lowered.backward))
    assert plan.peak == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("shape", "chosen"), [(WIDE, False), (NARROW, True)], ids=["wide", "narrow"])
def test_narrow_streams_choose_the_logits(shape: dict[str, int], chosen: bool) -> None:
    plan = plan_of(lowered_graphs(4, shape, recompute="memory"))
    assert plan.changed > 0
    assert plan.logits.chosen == chosen
