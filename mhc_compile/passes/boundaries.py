"""Which stream states are kept for the backward: an exact choice over a chain of sites, as pure functions over data.

A plan keeps the states X_l of some sites (the *boundaries*); the sites from one boundary to the next are a *block*.
When a block's backward starts, its other states are replayed from the boundary, the kept branch outputs and the kept
coefficients. The branch input u_l (and the branch's norm) is kept or replayed site by site: when its site needs it, or
(`Site.early`) with its state, by one kernel, and then it is there from the start of the block. While site l of the
block that starts at a runs backward, this is live (`evaluate`, the definition that everything here is tested against):

    live_l  +  sum of kept states up to a  +  sum of kept inputs before l  +  states a+1 .. l of the block  +  u_l
                                                                           +  early inputs a+1 .. l - 1 of the block
                                                                           +  coefficients a .. l that are made again

(With the logits alone kept, ``Site.again`` is what gates and Sinkhorn give back; replayed states read the coefficients
of all sites behind the boundary, so these are there from the start of the block, until their site has run backward.)
Behind the branch, when u_l is gone, it is ``border_l`` in place of live_l + u_l; and between forward and backward
``head`` + everything kept. The peak is the largest of these; the time is the sum over what is replayed, each state and
input once. A call replays up to ``Chain.run`` states of a block one after another: those behind its first cost less,
the state before them is in its registers (`Site.run_seconds`).

The start is the closed form for equal sites, L_r = sqrt(L kept / replayed), the paper's sqrt(n L / (n + 2)) for states
of n C and n + 2 units of C a site in the block (`closed_form`). From there dynamic programming over the sites, with the
last boundary as its state and the undominated pairs (kept bytes, seconds) as values (`_sweep`), gives the fastest plan
under a limit of the peak; bisection over the limit gives the least peak (`least_peak`). An early input is there while
its block runs backward whether it is kept or not, so which of them are kept is decided when their block ends.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_POINTS = 100_000
"""Points that one sweep looks at, a bound of its time: with 16 sites that is more than there are, from some 50 uneven
sites on the fronts are thinned (the least peak stays exact, its fastest plan no longer is)."""


@dataclass(frozen=True)
class Site:
    """One site: bytes and seconds of what a plan may keep or replay."""

    state: int
    """Bytes of X_l while it is live."""
    branch_input: int
    """Bytes of what the branch reads and a replay gives back: u_l, and its norm where that is replayed with it."""
    live: int
    """Bytes live while this site runs backward, whatever the plan (coefficients, branch outputs, weights, ...)."""
    state_seconds: float
    """Time to replay X_l from X_{l-1} (for the first site: from what it is expanded from)."""
    input_seconds: float
    """Time to replay the branch input from X_l."""
    source: int | None = None
    """Bytes that keeping X_l costs where it is rebuilt from something smaller (the value that is expanded)."""
    pinned: bool = False
    """True where X_l has to be kept: it cannot be replayed from the state before it."""
    border: int = 0
    """Bytes live behind the branch, when its input is gone: the gradients of two states are."""
    early: bool = False
    """True where a replayed branch input is made together with its replayed state."""
    early_seconds: float | None = None
    """What an early input adds to the time of its state; None: `input_seconds`, as behind a kept state."""
    run_seconds: float | None = None
    """Time to replay X_l in the call that has replayed X_{l-1}; None where there is no such call."""
    again: int = 0
    """Bytes of this site's coefficients where they are made again from their logits."""
    ahead: int = 0
    """Of the same, those of the site before, where this site's branch input is mixed by them (``single_pass``): at a
    boundary they are made a site early."""

    @property
    def cost(self) -> int:
        """Bytes that keeping X_l takes."""
        return self.state if self.source is None else self.source

    @property
    def rebuilt(self) -> int:
        """Bytes of X_l next to its smaller source, 0 where X_l itself is kept."""
        return 0 if self.source is None else self.state

    def replay_input(self, early: bool) -> float:
        """Time to replay the branch input; `early`: together with its replayed state."""
        return self.early_seconds if early and self.early_seconds is not None else self.input_seconds


@dataclass(frozen=True)
class Chain:
    """The sites of one stream, first to last."""

    sites: tuple[Site, ...]
    head: int = 0
    """Bytes live between forward and backward, whatever the plan."""
    run: int = 1
    """States of a block that one call replays."""
    seconds: float = 0.0
    """Time that every plan takes: that of coefficients made again."""

    def state_seconds(self, index: int, boundary: int) -> float:
        """Time to replay X_index in the block that starts at `boundary`."""
        site = self.sites[index]
        first = (index - boundary - 1) % self.run == 0
        return site.state_seconds if first or site.run_seconds is None else site.run_seconds


@dataclass(frozen=True)
class Plan:
    """What is kept, and what that comes to."""

    kept: tuple[int, ...]
    """Sites whose X_l is kept, ascending; the first site always is."""
    inputs: tuple[int, ...]
    """Sites whose branch input is kept."""
    peak: int
    kept_bytes: int
    seconds: float
    """Time of the replay."""


def evaluate(chain: Chain, kept: Iterable[int], inputs: Iterable[int] = ()) -> Plan:
    """Peak, kept bytes and seconds of a plan; the first site and the pinned ones are kept anyway."""
    pinned = {index for index, site in enumerate(chain.sites) if site.pinned}
    boundaries, whole = {0} | pinned | set(kept), set(inputs)
    total, block, peak, seconds, start = 0, 0, 0, chain.seconds, 0
    held = 0  # early inputs of this block that are kept: part of `block` until it ends
    for index, site in enumerate(chain.sites):
        early = site.early and index not in boundaries
        if index in boundaries:
            total, block, held, start = total + held + site.cost, site.rebuilt + site.again, 0, index
            seconds += site.state_seconds if site.source is not None else 0.0
        else:
            block += site.state + site.again + (site.branch_input if early else 0)
            seconds += chain.state_seconds(index, start)
        own = site.branch_input if early else 0
        live = total + block - own + (site.ahead if index in boundaries else 0)
        peak = max(peak, site.live + live + site.branch_input, site.border + live)
        if index not in whole:
            seconds += site.replay_input(early)
        elif early:
            held += site.branch_input
        else:
            total += site.branch_input
    total += held
    peak = max(peak, chain.head + total)
    return Plan(tuple(sorted(boundaries)), tuple(sorted(whole)), peak, total, seconds)


def keep_all(chain: Chain) -> Plan:
    """What happens without recompute: every state and every branch input is kept, the expanded state itself too."""
    sites = tuple(dataclasses.replace(site, source=None, pinned=False, early=False) for site in chain.sites)
    every = range(len(sites))
    return evaluate(dataclasses.replace(chain, sites=sites), every, every)


def closed_form(sites: int, kept: float, replayed: float) -> int:
    """Block length that minimises ``sites / L_r * kept + L_r * replayed``, at least 1.

    With a state of n units kept a block and n + 2 live a replayed site this is sqrt(n L / (n + 2)).
    """
    if sites < 1 or replayed <= 0:
        return max(sites, 1)
    return min(max(round(math.sqrt(sites * kept / replayed)), 1), sites)


def equal_blocks(chain: Chain) -> Plan:
    """The closed form applied to a chain: blocks of one length, every input replayed."""
    count = len(chain.sites)
    kept = sum(site.cost for site in chain.sites) / count
    replayed = sum(site.state for site in chain.sites) / count
    return evaluate(chain, range(0, count, closed_form(count, kept, replayed)))


# ------------------------------------------------------------------------------------------------ the exact choice
_Trail = tuple[Any, tuple[int, ...], str] | None
"""What is kept, last first: (what came before it, sites, "state" or "input")."""
_Point = tuple[int, int, _Trail]
"""(kept bytes, femtoseconds, decisions)."""
_Saving = tuple[int, int, tuple[int, ...]]
"""Early inputs of a block that may be kept: (bytes, femtoseconds that are added: 0 or less, sites)."""


_BYTES, _BYTES_THEN_TIME = operator.itemgetter(0), operator.itemgetter(0, 1)


def _exact(seconds: float) -> int:
    """Femtoseconds: whole numbers, whose sums do not depend on their order, so that equal plans are equal."""
    return round(seconds * 1e15)


@dataclass
class _Block:
    """What a sweep knows of the block that starts at one boundary."""

    live: int
    """Replayed bytes of the block so far, early inputs included."""
    points: list[_Point]
    """Without the early inputs of the block: as if all of them were replayed. By bytes, none beats another."""
    savings: list[_Saving]
    added: int = 0
    """Femtoseconds that each of the points takes beside its own."""


def fastest(chain: Chain, peak: float = math.inf, kept: float = math.inf) -> Plan | None:
    """The plan with the least replay time whose peak and kept bytes stay within the limits; None if there is none.

    Among plans of equal time the one that keeps fewer bytes.
    """
    ends = _sweep(chain, peak, kept, replay_inputs=False)
    if not ends:
        return None
    return _plan(chain, min(ends, key=lambda point: (point[1], point[0])))


def least_peak(chain: Chain, kept: float = math.inf, tolerance: float = 0.0) -> Plan | None:
    """The fastest of the plans whose peak is at most ``1 + tolerance`` times the least there is; None if the pinned
    states exceed `kept`."""
    least = least_bytes(chain, kept)
    return fastest(chain, least * (1 + tolerance), kept) if least is not None else None


def fastest_of(chains: Sequence[Chain], peak: float) -> tuple[int, Plan] | None:
    """(which of several forms of one chain, its plan): the fastest within the limit, of equal ones the first."""
    best: tuple[int, Plan] | None = None
    for index, chain in enumerate(chains):
        if best is not None and chain.seconds >= best[1].seconds:
            continue  # what every plan of this one takes is too much
        plan = fastest(chain, peak)
        if plan is not None and (best is None or plan.seconds < best[1].seconds):
            best = index, plan
    return best


def least_peak_of(chains: Sequence[Chain], tolerance: float = 0.0) -> tuple[int, Plan] | None:
    """`fastest_of` the plans whose peak is at most ``1 + tolerance`` times the least that any of the forms has."""
    least = [found for chain in chains if (found := least_bytes(chain)) is not None]
    return fastest_of(chains, min(least) * (1 + tolerance)) if least else None


def least_bytes(chain: Chain, kept: float = math.inf) -> int | None:
    """The least peak there is; None if the pinned states exceed `kept`."""
    start = equal_blocks(chain)
    if start.kept_bytes > kept:
        start = evaluate(chain, ())
        if start.kept_bytes > kept:
            return None
    low, high = max(chain.head, max(site.live + site.branch_input for site in chain.sites)), start.peak
    while low < high:
        middle = (low + high) // 2
        if _sweep(chain, middle, kept, replay_inputs=True):
            high = middle
        else:
            low = middle + 1
    return high


def fastest_within(chain: Chain, kept: int) -> Plan | None:
    """The fastest plan that keeps at most `kept` bytes, and among those one with nearly (0.1 %) the least peak.

    None if not even the fewest bytes fit.
    """
    best = fastest(chain, kept=kept)
    if best is None:
        return None
    low, high = 0, best.peak
    while high - low > max(best.peak // 1000, 1):
        middle = (low + high) // 2
        other = fastest(chain, middle, kept)
        if other is not None and other.seconds <= best.seconds * (1 + 1e-9):
            best, high = other, other.peak
        else:
            low = middle
    return best


def _sweep(chain: Chain, peak: float, kept: float, *, replay_inputs: bool) -> list[_Point]:
    """All undominated (kept bytes, time) of the plans within the limits.

    ``replay_inputs`` looks at the fewest bytes alone: enough to know whether a plan exists.
    """
    prune: Callable[[list[_Point], int], list[_Point]] = _fewest if replay_inputs else _undominated
    first = chain.sites[0]
    time = _exact(chain.seconds) + (_exact(first.state_seconds) if first.source is not None else 0)
    blocks = {0: _Block(first.rebuilt + first.again, [(first.cost, time, None)], [(0, 0, ())])}
    for index, site in enumerate(chain.sites):
        cap = max(_POINTS // len(chain.sites) // (len(blocks) + 1), 4)
        after: dict[int, _Block] = {}
        for boundary, block in blocks.items():
            early = site.early and boundary != index
            own = site.branch_input if early else 0
            most = max(site.live + site.branch_input, site.border) + block.live - own
            most += site.ahead if boundary == index else 0
            alive = block.points[: bisect.bisect_right(block.points, min(peak - most, kept), key=_BYTES)]
            if not alive:
                continue
            replayed = _exact(site.replay_input(early))
            if replay_inputs or early:
                savings = block.savings
                if not replay_inputs:
                    savings = _with_saving(savings, site, index, max(cap // 8, 8))
                after[boundary] = _Block(block.live, _thinned(alive, cap), savings, block.added + replayed)
                continue
            choices = [(k, t + replayed, trail) for k, t, trail in alive]
            more = ((k + site.branch_input, t, (trail, (index,), "input")) for k, t, trail in alive)
            choices += [point for point in more if point[0] <= kept]
            after[boundary] = _Block(block.live, prune(choices, cap), block.savings, block.added)
        last = index + 1 == len(chain.sites)
        blocks = after if last else _step(after, chain, index + 1, prune, cap)
        if not blocks:
            return []
    limit = min(peak - chain.head, kept)
    ends = [point for block in blocks.values() for point in _ended(block) if point[0] <= limit]
    return prune(ends, len(ends) + 1)


def _step(
    blocks: dict[int, _Block],
    chain: Chain,
    index: int,
    prune: Callable[[list[_Point], int], list[_Point]],
    cap: int,
) -> dict[int, _Block]:
    """From one site to the next: its state is kept (a new boundary) or replayed (the block goes on)."""
    after: dict[int, _Block] = {}
    ended: list[_Point] = []
    site = chain.sites[index]
    rebuild = _exact(site.state_seconds) if site.source is not None else 0
    for boundary, block in blocks.items():
        if not site.pinned:
            replayed = _exact(chain.state_seconds(index, boundary))
            live = block.live + site.state + site.again + (site.branch_input if site.early else 0)
            after[boundary] = _Block(live, block.points, block.savings, block.added + replayed)
        ended += _ended(block)
    keep: list[_Point] = [(k + site.cost, t, (trail, (index,), "state")) for k, t, trail in prune(ended, cap)]
    after[index] = _Block(site.rebuilt + site.again, keep, [(0, 0, ())], rebuild)
    return after


def _with_saving(savings: list[_Saving], site: Site, index: int, cap: int) -> list[_Saving]:
    """The savings of a block when the early input of one more site may be kept."""
    saved = _exact(site.replay_input(early=True))
    more = [(size + site.branch_input, less - saved, (*which, index)) for size, less, which in savings]
    return _undominated([*savings, *more], cap)


def _ended(block: _Block) -> list[_Point]:
    """The points of a block that ends, with each choice of early inputs to keep."""
    if not any(which for _, _, which in block.savings):
        return [(k, t + block.added, trail) for k, t, trail in block.points]
    return [
        (k + size, t + block.added + less, (trail, which, "input") if which else trail)
        for k, t, trail in block.points
        for size, less, which in block.savings
    ]


def _plan(chain: Chain, point: _Point) -> Plan:
    decided: dict[str, list[int]] = {"state": [], "input": []}
    trail = point[2]
    while trail is not None:
        trail, which, what = trail
        decided[what].extend(which)
    return evaluate(chain, decided["state"], decided["input"])


def _fewest(points: list[_Point], cap: int) -> list[_Point]:
    return [min(points, key=lambda point: point[0])] if points else []


def _undominated(points: list[Any], cap: int) -> list[Any]:
    """Points that no other beats in both bytes and time, by bytes; thinned evenly to `cap`."""
    points.sort(key=_BYTES_THEN_TIME)
    front: list[Any] = []
    best = math.inf
    for point in points:
        if point[1] < best:
            best = point[1]
            front.append(point)
    return _thinned(front, cap)


def _thinned(front: Sequence[Any], cap: int) -> list[Any]:
    if len(front) <= cap:
        return list(front)
    last = len(front) - 1
    return [front[round(step * last / (cap - 1))] for step in range(cap)]
