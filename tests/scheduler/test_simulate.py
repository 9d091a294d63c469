"""Pipelines against their closed forms, one stage against a hand-made timeline."""

from __future__ import annotations

import pytest

from mhc_compile.scheduler.simulate import (
    PAPER_SHARE,
    ChunkCosts,
    Op,
    StageCosts,
    dual_pipe,
    length,
    one_f_one_b,
    overlapped_stage,
    play_stage,
    share,
)


@pytest.mark.parametrize(("ranks", "batches"), [(1, 3), (2, 4), (4, 8), (8, 8)])
def test_1f1b_idles_as_its_formula_says(ranks: int, batches: int) -> None:
    played = one_f_one_b(ranks, batches, ChunkCosts(1.0, 2.0))
    assert played.seconds == pytest.approx((batches + ranks - 1) * 3.0)
    assert all(played.idle(rank) == pytest.approx((ranks - 1) * 3.0) for rank in range(ranks))


def test_sending_takes_its_time() -> None:
    plain = one_f_one_b(2, 1, ChunkCosts(1.0, 2.0)).seconds
    assert one_f_one_b(2, 1, ChunkCosts(1.0, 2.0, send=0.5)).seconds == pytest.approx(plain + 1.0)


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_dual_pipe_idles_as_its_formula_says(ranks: int, weight: float) -> None:
    """(p/2 - 1)(F&B + B - 3W) on the ranks in the middle."""
    costs = ChunkCosts(1.0, 2.0, weight, overlapped=2.4)
    played = dual_pipe(ranks, 4 * ranks, costs)
    expected = (ranks / 2 - 1) * (2.4 + 2.0 - 3 * weight)
    if weight == 1.0:  # with F = W nothing else idles
        assert played.idle(ranks // 2) == pytest.approx(expected)
    assert played.idle(ranks // 2) <= expected + 1e-9
    names = [name for row in played.chunks for name, _, _ in row]
    forwards = sum(name.count("F") for name in names)
    backwards = sum(name.count("B") + name.count("I") for name in names)
    assert forwards == backwards == 4 * ranks * ranks, "every batch once on every rank, both ways"


def test_dual_pipe_refuses_what_it_cannot_play() -> None:
    for ranks, batches in ((3, 12), (4, 6), (4, 9)):
        with pytest.raises(ValueError, match="DualPipe needs"):
            dual_pipe(ranks, batches, ChunkCosts(1.0, 2.0))


def test_a_row_waits_for_its_head_and_a_priority_row_interrupts() -> None:
    ops = [
        Op("transfer", "network", 2.0),
        Op("long", "compute", 5.0),
        Op("mix", "compute", 1.0, ("transfer",), side=True),
        Op("send", "network", 1.0, ("mix",)),
    ]
    plain = play_stage(ops)
    assert plain["mix"] == (5.0, 6.0)
    assert plain["send"] == (6.0, 7.0)
    first = play_stage(ops, priority=True)
    assert first["mix"] == (2.0, 3.0)
    assert first["long"] == (0.0, 6.0), "interrupted for one"
    assert first["send"] == (3.0, 4.0)
    assert (length(ops, False), length(ops, True)) == (7.0, 6.0)


def test_ops_that_wait_for_each_other() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        play_stage([Op("a", "compute", 1.0, ("b",)), Op("b", "network", 1.0, ("a",))])


def test_one_stage_by_hand() -> None:
    """Compute bound: attention 1, experts backward 2, experts 1, attention backward 2, and four mixes."""
    costs = StageCosts(1.0, 1.0, 0.5, 0.1, 0.2)
    assert length(overlapped_stage(costs, mixed=False), False) == pytest.approx(6.0)
    assert length(overlapped_stage(costs), False) == pytest.approx(6.6)
    assert share(costs, priority=False) == pytest.approx(0.1)


def test_without_cost_there_is_no_share() -> None:
    assert share(StageCosts(1.0, 1.0, 1.0, 0.0, 0.0), priority=False) == pytest.approx(0.0)


def test_priority_keeps_the_network_from_waiting() -> None:
    """The residual of n streams is sent to the next rank: late in the row of the computation, at once with priority."""
    costs = StageCosts(1.0, 1.0, 1.0, 0.05, 0.12, send=0.05)
    late, early = share(costs, priority=False), share(costs, priority=True)
    assert early < late
    assert abs(early - PAPER_SHARE) < abs(late - PAPER_SHARE)
