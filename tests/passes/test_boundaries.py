from __future__ import annotations

import dataclasses
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.passes.boundaries import (
    Chain,
    Site,
    closed_form,
    equal_blocks,
    evaluate,
    fastest,
    fastest_of,
    fastest_within,
    keep_all,
    least_bytes,
    least_peak,
    least_peak_of,
)


def equal(count: int, n: int = 4, unit: int = 100, branch: int = 300) -> Chain:
    """Equal sites: what the branches save shrinks as the backward goes down."""
    sites = [
        Site(n * unit, unit, live=branch * (index + 1), state_seconds=9e-6, input_seconds=5e-6)
        for index in range(count)
    ]
    first = Site(n * unit, unit, branch, 5e-6, 5e-6, source=unit)
    return Chain((first, *sites[1:]), head=branch * count)


small = st.integers(0, 1000)


@st.composite
def chains(draw: st.DrawFn, most: int, inputs: bool) -> Chain:
    count = draw(st.integers(1, most))
    sites = []
    for index in range(count):
        seconds = draw(st.integers(1, 50))
        source = draw(st.one_of(st.none(), small)) if index == 0 else None
        sites.append(
            Site(
                state=draw(st.integers(1, 1000)),
                branch_input=draw(small) if inputs else 0,
                live=draw(st.integers(0, 5000)),
                state_seconds=float(seconds),
                input_seconds=float(draw(st.integers(1, 50))) if inputs else 0.0,
                source=source,
                pinned=draw(st.integers(0, 9)) == 0,
            )
        )
    return Chain(tuple(sites), draw(st.integers(0, 8000)))


def brute(chain: Chain, inputs: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(peak, kept bytes, seconds) of every choice of boundaries: `evaluate`, for all at once. With `inputs`, every
    choice of branch inputs to keep as well; without, all of them are replayed."""
    count = len(chain.sites)
    masks = np.arange(2 ** (2 * count if inputs else count))
    total, block, held, peak, start = (np.zeros(len(masks), int) for _ in range(5))
    seconds, legal = np.full(len(masks), chain.seconds), np.ones(len(masks), bool)
    for index, site in enumerate(chain.sites):
        kept = (masks >> index & 1).astype(bool)
        whole = (masks >> (count + index) & 1).astype(bool)
        if index == 0 or site.pinned:
            legal &= kept
        early = ~kept & site.early
        own = np.where(early, site.branch_input, 0)
        total = total + np.where(kept, held + site.cost, 0)
        held = np.where(kept, 0, held)
        block = np.where(kept, site.rebuilt, block + site.state + own) + site.again
        goes_on = (index - start - 1) % chain.run != 0
        again = np.where(goes_on, site.run_seconds or site.state_seconds, site.state_seconds)
        seconds += np.where(kept, 0.0 if site.source is None else site.state_seconds, again)
        start = np.where(kept, index, start)
        seconds += np.where(whole, 0.0, np.where(early, site.replay_input(True), site.input_seconds))
        live = np.maximum(site.live + site.branch_input, site.border)
        peak = np.maximum(peak, live + total + block - own + np.where(kept, site.ahead, 0))
        held = held + np.where(whole & early, site.branch_input, 0)
        total = total + np.where(whole & ~early, site.branch_input, 0)
    total = total + held
    peak = np.maximum(peak, chain.head + total)
    return peak[legal], total[legal], seconds[legal]


@st.composite
def chains_with_early_inputs(draw: st.DrawFn, most: int, free: bool = False) -> Chain:
    """Chains of all that there is; with `free` a branch input takes no time to replay: none is worth keeping."""
    chain = draw(chains(most, inputs=True))
    alone = draw(st.booleans())  # the logits, without the coefficients
    sites = [
        dataclasses.replace(
            site,
            border=draw(st.integers(0, 6000)),
            again=draw(small) if alone else 0,
            ahead=draw(small) if alone else 0,
            early=index > 0 and draw(st.booleans()),
            input_seconds=0.0 if free else site.input_seconds,
            early_seconds=None if free else draw(st.one_of(st.none(), st.integers(1, 50).map(float))),
            run_seconds=draw(st.one_of(st.none(), st.integers(1, 50).map(float))),
        )
        for index, site in enumerate(chain.sites)
    ]
    extra = float(draw(st.integers(0, 50))) if alone else 0.0
    return Chain(tuple(sites), chain.head, draw(st.integers(1, 4)), extra)


@given(chains_with_early_inputs(6), st.integers(0, 2**12 - 1))
@settings(max_examples=100, deadline=None)
def test_brute_force_is_what_evaluate_says(chain: Chain, choice: int) -> None:
    count = len(chain.sites)
    bits = choice % 4**count
    kept = [index for index in range(count) if bits >> index & 1]
    inputs = [index for index in range(count) if bits >> (count + index) & 1]
    forced = {0} | {index for index, site in enumerate(chain.sites) if site.pinned}
    plan = evaluate(chain, kept, inputs)
    legal = [mask for mask in range(4**count) if all(mask >> index & 1 for index in forced)]
    whole = bits | sum(1 << index for index in forced)
    found = [values[legal.index(whole)] for values in brute(chain, inputs=True)]
    assert found == [plan.peak, plan.kept_bytes, pytest.approx(plan.seconds)]


def assert_least_peak(chain: Chain) -> None:
    """The least that there is, and of those plans the fastest."""
    peak, _, seconds = brute(chain)
    plan = least_peak(chain)
    assert plan is not None
    assert plan.peak == peak.min()
    assert plan.seconds <= 1.01 * seconds[peak == peak.min()].min()


@given(chains(16, inputs=False))
@settings(max_examples=60, deadline=None)
def test_least_peak_is_that_of_brute_force(chain: Chain) -> None:
    assert_least_peak(chain)


@given(chains(16, inputs=False), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_fastest_within_a_peak_is_that_of_brute_force(chain: Chain, share: float) -> None:
    peak, _, seconds = brute(chain)
    limit = peak.min() + share * (peak.max() - peak.min())
    plan = fastest(chain, limit)
    assert plan is not None
    assert plan.peak <= limit
    assert plan.seconds <= 1.01 * seconds[peak <= limit].min()
    assert fastest(chain, peak.min() - 1) is None


@given(chains(12, inputs=False), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_fastest_within_kept_bytes_is_that_of_brute_force(chain: Chain, share: float) -> None:
    peak, kept, seconds = brute(chain)
    limit = int(kept.min() + share * (kept.max() - kept.min()))
    plan = fastest_within(chain, limit)
    assert plan is not None
    assert plan.kept_bytes <= limit
    best = seconds[kept <= limit].min()
    assert plan.seconds <= 1.01 * best
    assert plan.peak <= 1.01 * peak[(kept <= limit) & (seconds <= best + 1e-9)].min() + 1
    assert fastest_within(chain, int(kept.min()) - 1) is None


@pytest.mark.parametrize("seed", range(10))
def test_sixteen_uneven_sites(seed: int) -> None:
    rng = random.Random(seed)
    sites = [Site(rng.randrange(1, 10**6), 0, rng.randrange(10**6), rng.random(), 0.0) for _ in range(16)]
    chain = Chain(tuple(sites), head=rng.randrange(10**7))
    peak, kept, seconds = brute(chain)
    plan = least_peak(chain)
    assert plan is not None
    assert plan.peak == peak.min()
    for share in (0.01, 0.1, 0.3, 0.7):
        limit = int(peak.min() + share * (peak.max() - peak.min()))
        quick = fastest(chain, limit)
        assert quick is not None
        assert quick.seconds <= 1.01 * seconds[peak <= limit].min()
        small_kept = fastest_within(chain, int(kept.min() + share * (kept.max() - kept.min())))
        assert small_kept is not None
        assert small_kept.seconds <= 1.01 * seconds[kept <= kept.min() + share * (kept.max() - kept.min())].min()


def assert_as_brute_force(chain: Chain, inputs: bool, share: float, tolerance: float) -> None:
    """The least peak, the fastest plan near it, the fastest within a peak and within kept bytes."""
    peak, kept, seconds = brute(chain, inputs)
    plan = least_peak(chain, tolerance=tolerance)
    assert plan is not None
    assert peak.min() <= plan.peak <= peak.min() * (1 + tolerance)
    assert plan.seconds == pytest.approx(seconds[peak <= peak.min() * (1 + tolerance)].min())
    limit = peak.min() + share * (peak.max() - peak.min())
    quick = fastest(chain, limit)
    assert quick is not None
    assert quick.peak <= limit
    assert quick.seconds == pytest.approx(seconds[peak <= limit].min())
    allowed = int(kept.min() + share * (kept.max() - kept.min()))
    small = fastest_within(chain, allowed)
    assert small is not None
    assert small.kept_bytes <= allowed
    best = seconds[kept <= allowed].min()
    assert small.seconds == pytest.approx(best)
    assert small.peak <= 1.01 * peak[(kept <= allowed) & (seconds <= best * (1 + 1e-9))].min() + 1


TOLERANCES = (0.0, 0.01, 0.2)


@given(chains_with_early_inputs(8), st.floats(0, 1), st.sampled_from(TOLERANCES))
@settings(max_examples=200, deadline=None)
def test_branch_inputs_early_ones_and_borders(chain: Chain, share: float, tolerance: float) -> None:
    """Each choice of branch inputs to keep, of up to 8 sites."""
    assert_as_brute_force(chain, True, share, tolerance)


@given(chains_with_early_inputs(16, free=True), st.floats(0, 1), st.sampled_from(TOLERANCES))
@settings(max_examples=200, deadline=None)
def test_replayed_branch_inputs_early_ones_and_borders(chain: Chain, share: float, tolerance: float) -> None:
    """Up to 16 sites, where to replay an input is free."""
    assert_as_brute_force(chain, False, share, tolerance)


@pytest.mark.parametrize("seed", range(12))
def test_uneven_sites_with_everything(seed: int) -> None:
    """Eight sites with each choice of branch inputs; sixteen where to replay one is free."""
    rng = random.Random(seed)
    for count, inputs in ((8, True), (16, False)):
        sites = [
            Site(
                state=rng.randrange(1, 10**6),
                branch_input=rng.randrange(3 * 10**5),
                live=rng.randrange(10**6),
                state_seconds=rng.random(),
                input_seconds=rng.random() if inputs else 0.0,
                source=rng.randrange(10**5) if index == 0 and seed % 2 else None,
                pinned=rng.random() < 0.1,
                border=rng.randrange(10**6),
                early=index > 0 and rng.random() < 0.5,
                early_seconds=rng.random() if inputs and rng.random() < 0.5 else None,
                run_seconds=rng.random() if rng.random() < 0.5 else None,
            )
            for index in range(count)
        ]
        chain = Chain(tuple(sites), head=rng.randrange(5 * 10**6), run=1 + seed % 4)
        for share, tolerance in zip((0.02, 0.2, 0.6), TOLERANCES, strict=True):
            assert_as_brute_force(chain, inputs, share, tolerance)


@given(chains_with_early_inputs(16))
@settings(max_examples=60, deadline=None)
def test_the_least_peak_of_everything(chain: Chain) -> None:
    """To keep a branch input never lowers the peak, so that of all plans is that of the plans that replay them all."""
    assert_least_peak(chain)


def test_a_call_replays_several_states() -> None:
    """Of a block's states every fourth reads the state before it from memory; a boundary begins a call anew."""
    chain = Chain(tuple(Site(400, 100, 0, 9.0, 1.0, early=True, run_seconds=5.0) for _ in range(12)), run=4)
    assert evaluate(chain, ()).seconds == 3 * 9 + 8 * 5 + 12
    assert evaluate(chain, (), range(12)).seconds == 3 * 9 + 8 * 5, "a kept input does not cut a call"
    assert evaluate(chain, (3,)).seconds == (9 + 5) + (2 * 9 + 6 * 5) + 12
    assert evaluate(dataclasses.replace(chain, run=1), ()).seconds == 11 * 9 + 12
    early = [dataclasses.replace(site, early_seconds=0.5) for site in chain.sites]
    assert evaluate(dataclasses.replace(chain, sites=tuple(early)), ()).seconds == 3 * 9 + 8 * 5 + 1 + 11 * 0.5
    alone = dataclasses.replace(chain.sites[2], run_seconds=None)
    mixed = dataclasses.replace(chain, sites=(*chain.sites[:2], alone, *chain.sites[3:]))
    assert evaluate(mixed, ()).seconds == 4 * 9 + 7 * 5 + 12


@st.composite
def two_forms(draw: st.DrawFn) -> tuple[Chain, Chain]:
    """A chain, and the same with less live and something to make again."""
    kept = draw(chains_with_early_inputs(6))
    plain = tuple(dataclasses.replace(site, again=0, ahead=0) for site in kept.sites)
    kept = dataclasses.replace(kept, sites=plain, seconds=0.0)
    sites = []
    for index, site in enumerate(kept.sites):
        saved = draw(st.integers(0, 500)) * (index + 1)
        less = {"live": max(site.live - saved, 0), "border": max(site.border - saved, 0)}
        more = {"again": draw(st.integers(0, 500)), "ahead": draw(st.integers(0, 500))}
        sites.append(dataclasses.replace(site, **less, **more))
    more = {"head": max(kept.head - 500, 0), "seconds": draw(st.floats(0, 100))}
    return kept, dataclasses.replace(kept, sites=tuple(sites), **more)


@given(two_forms(), st.floats(0, 1), st.sampled_from(TOLERANCES))
@settings(max_examples=150, deadline=None)
def test_of_two_forms_the_fastest(forms: tuple[Chain, Chain], share: float, tolerance: float) -> None:
    """Each choice of what is kept in both forms: those near the least peak of all, those within a limit."""
    every = [brute(form, inputs=True) for form in forms]
    peak, seconds = (np.concatenate([found[index] for found in every]) for index in (0, 2))
    assert min(map(least_bytes, forms)) == peak.min()
    near, some = peak.min() * (1 + tolerance), peak.min() + share * (peak.max() - peak.min())
    for limit, found in ((near, least_peak_of(forms, tolerance)), (some, fastest_of(forms, some))):
        assert found is not None
        which, plan = found
        assert plan.peak <= limit
        assert plan.seconds == pytest.approx(seconds[peak <= limit].min())
        assert evaluate(forms[which], plan.kept, plan.inputs) == plan
    assert fastest_of(forms, peak.min() - 1) is None


def test_of_equals_the_first_form() -> None:
    chain = equal(4)
    assert least_peak_of([chain, chain], 0.5)[0] == 0
    assert least_peak_of([chain, dataclasses.replace(chain, seconds=1e-9)], 0.5)[0] == 0
    assert least_peak_of([]) is None


def test_what_is_made_again_is_live_with_its_block() -> None:
    """From the start of the block, above the boundary too; a site early where the boundary is mixed by it."""
    sites = [Site(100, 0, 0, 1.0, 0.0, again=10 ** (index + 3)) for index in range(3)]
    chain = Chain(tuple(sites), seconds=5.0)
    assert evaluate(chain, (0,)).peak == 111_000 + 300
    assert evaluate(chain, (0, 1, 2)).peak == 10**5 + 300
    assert evaluate(chain, (0, 1, 2)).seconds == 5.0
    ahead = dataclasses.replace(sites[2], ahead=7)
    assert evaluate(Chain((*sites[:2], ahead)), (0, 2)).peak == 10**5 + 200 + 7
    assert evaluate(Chain((*sites[:2], ahead)), (0,)).peak == 111_000 + 300


def test_the_paper_s_closed_form() -> None:
    """sqrt(n L / (n + 2)): 6.9 sites a block for 36 layers of two sites."""
    n, layers = 4, 72
    assert closed_form(layers, n, n + 2) == round(math.sqrt(n * layers / (n + 2))) == 7
    assert closed_form(1, 4, 6) == 1
    assert closed_form(4, 1e9, 1) == 4
    assert closed_form(5, 1, 0) == 5


def test_equal_sites_with_nothing_else_live_give_blocks_near_the_closed_form() -> None:
    chain = Chain(tuple(Site(400, 100, 0, 9e-6, 5e-6) for _ in range(72)))
    plan, start = least_peak(chain), equal_blocks(chain)
    assert plan is not None
    assert plan.peak <= start.peak
    assert plan.peak >= 0.7 * start.peak  # blocks that shrink towards the end beat equal ones, by this much at most
    lengths = np.diff([*plan.kept, 72])
    assert lengths[0] >= lengths[-1]


def test_a_model_whose_branches_save_much_needs_few_states() -> None:
    """Where the head dominates, the blocks may be long: only what is kept counts at the peak."""
    plan = least_peak(equal(72, branch=1000))
    everything = keep_all(equal(72, branch=1000))
    assert plan is not None
    assert len(plan.kept) <= 6
    assert plan.kept_bytes < 0.1 * everything.kept_bytes


def test_keep_all_keeps_the_expanded_state_itself() -> None:
    chain = equal(3)
    plan = keep_all(chain)
    assert plan.kept == plan.inputs == (0, 1, 2)
    assert plan.kept_bytes == 3 * 400 + 3 * 100
    assert plan.seconds == 0.0


def test_pinned_states_are_kept() -> None:
    sites = [Site(100, 10, 0, 1.0, 1.0, pinned=index == 2) for index in range(4)]
    plan = least_peak(Chain(tuple(sites)))
    assert plan is not None
    assert 2 in plan.kept
    assert evaluate(Chain(tuple(sites)), ()).kept == (0, 2)


def test_one_site() -> None:
    plan = least_peak(Chain((Site(10, 1, 5, 1.0, 1.0),), head=3))
    assert plan is not None
    assert (plan.kept, plan.inputs, plan.peak, plan.seconds) == ((0,), (0,), 16, 0.0)  # its input costs no peak


@pytest.mark.parametrize("count", [72, 200])
def test_long_chains_take_little_time(count: int) -> None:
    rng = random.Random(0)
    chain = equal(count)
    uneven = Chain(
        tuple(
            Site(s.state, s.branch_input, s.live + rng.randrange(900), s.state_seconds, s.input_seconds, s.source)
            for s in chain.sites
        ),
        chain.head,
    )
    start = time.perf_counter()
    for each in (chain, uneven):
        plan = least_peak(each)
        assert plan is not None
        assert plan.peak <= equal_blocks(each).peak
    assert time.perf_counter() - start < 30


@given(chains(16, inputs=False), st.sampled_from([0.01, 0.05]))
@settings(max_examples=40, deadline=None)
def test_the_fastest_plan_near_the_least_peak(chain: Chain, tolerance: float) -> None:
    peak, _, seconds = brute(chain)
    plan = least_peak(chain, tolerance=tolerance)
    assert plan is not None
    assert plan.peak <= peak.min() * (1 + tolerance)
    assert plan.seconds <= 1.01 * seconds[peak <= peak.min() * (1 + tolerance)].min()


def test_early_inputs_are_there_from_the_start_of_their_block() -> None:
    late = Chain(tuple(Site(100, 30, 0, 1.0, 1.0) for _ in range(4)))
    early = Chain(tuple(dataclasses.replace(site, early=True) for site in late.sites))
    assert evaluate(late, ()).peak == 4 * 100 + 30
    assert evaluate(early, ()).peak == 4 * 100 + 3 * 30  # that of the first site, which is kept, comes by itself
    assert evaluate(early, (), (1, 2, 3)).peak == evaluate(early, ()).peak
    assert evaluate(early, (2,), (1,)).peak == 100 + 30 + 100 + 100 + 30  # the first block's is kept beside the second
    assert evaluate(early, (), (1, 2, 3)).seconds == evaluate(early, ()).seconds - 3
