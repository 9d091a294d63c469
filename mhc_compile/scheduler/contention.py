"""What a device does with two kernels at once: measured pairs, kept on disk, asked by the assignment.

A pair is a kind of task on the main stream (``matmul``, ``attention``, ``attention_backward``, ``memory``,
``communication``) beside a kind on the side stream (the name of an op). With the main task alone M, the side task alone
S, and both at once B (from the fork to the join, the cost of both events included), what counts is the part of S that
vanished:

    hidden = (M + S - B) / S          1: the side task was free,  0: no gain,  negative: two streams lose time

A GPU's clock wanders by more than a side task of some microseconds takes. So the three rows are CUDA graphs that are
replayed in turns, each round gives one difference, and what counts is the median of these differences with the
interval in which the true median lies in 95 of 100 measurements. A share whose interval holds 0 is planned with as 0.

Nothing is assumed about a pair that was not measured, and nothing about a device without a file: one stream then.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mhc_compile.cost import cache_file, keep_json

from . import host as host_of
from .host import Host
from .main_stream import PRIORITY

LEAST_SHARE = 0.5
"""Less than that is planned with as nothing. A pair is measured warm: in a step both tasks meet an L2 that others have
filled, and blocks of the main task wait for a multiprocessor that a side task sits on. Plans that lived on shares of a
quarter (gradients beside matmuls) made a step 0.9 % longer where they promised 0.9 % less."""
RANGE = 3.0
"""A measured side task stands for those of a third of its bytes up to three times as many."""


@dataclass(frozen=True)
class Pair:
    """One measurement."""

    main: str
    side: str
    bytes: int
    """Read and written by the side task."""
    priority: bool
    """The main stream had the higher priority."""
    main_seconds: float
    """Of the main tasks that the side task ran beside."""
    side_seconds: float
    """Of the side task in one row with them."""
    hidden: float
    low: float
    """The interval of ``hidden``: its lower end."""
    high: float
    stretch: float
    """From the fork to the side task's end, main tasks waiting behind the fork, over its time alone; at least 1."""

    @property
    def share(self) -> float:
        """The hidden part to plan with: at most all, and 0 where the measurement does not say on which side of 0, or
        where it is less than `LEAST_SHARE`."""
        return 0.0 if self.low <= 0.0 <= self.high or 0.0 < self.hidden < LEAST_SHARE else min(self.hidden, 1.0)


@dataclass(frozen=True)
class Alone:
    """The time of a kind of task that stays on the main stream, but is there only if another one moves."""

    kind: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """Something to measure: a kind, a call that launches it once, its bytes."""

    kind: str
    call: Callable[[], object]
    bytes: int
    instead_of: Callable[[], object] | None = None
    """A call that it takes the place of: what counts is how much longer it takes."""


LEAST_SECONDS = 1e-7
"""Of a call that takes the place of another one: less is noise."""


@dataclass(frozen=True)
class Contention:
    """All pairs of a device."""

    device: str
    pairs: tuple[Pair, ...] = ()
    alone: tuple[Alone, ...] = ()
    host: Host = field(default_factory=Host)

    def pair(self, main: str, side: str, size: int, priority: bool = False) -> Pair | None:
        """The measurement nearest in bytes to a side task of `size`, None where nothing near was measured."""
        fitting = [
            one
            for one in self.pairs
            if (one.main, one.side, one.priority) == (main, side, priority) and _near(one.bytes, size)
        ]
        return min(fitting, key=lambda one: abs(math.log(one.bytes / max(size, 1))), default=None)

    def knows(self, side: str, size: int, priority: bool = False) -> bool:
        """True if a side task of that kind and size was measured beside anything."""
        return any(one.side == side and one.priority == priority and _near(one.bytes, size) for one in self.pairs)

    def seconds(self, kind: str, size: int) -> float | None:
        """Measured time of a kind of `size` bytes: the nearest measurement, scaled where it is moved by bytes."""
        found = {(one.bytes, one.side_seconds) for one in self.pairs if one.side == kind}
        measured = sorted(found | {(one.bytes, one.seconds) for one in self.alone if one.kind == kind})
        fitting = [item for item in measured if _near(item[0], size)]
        if not fitting:
            return None
        near = min(fitting, key=lambda item: abs(math.log(item[0] / max(size, 1))))[0]
        mean = statistics.mean(seconds for nbytes, seconds in fitting if nbytes == near)
        return mean * max(size / near, 1.0) if size > near else mean

    @property
    def fingerprint(self) -> str:
        """Identity for inductor's caches: another measurement may make another plan."""
        return json.dumps(asdict(self), sort_keys=True)


def table(contention: Contention) -> str:
    """The pairs as text, a line each."""
    lines = [f"{contention.device}: part of the side call that is hidden, with its interval; latency over time alone"]
    for one in contention.pairs:
        times = f"{one.side_seconds * 1e6:8.1f} us beside {one.main_seconds * 1e6:8.1f} us"
        how = "main first" if one.priority else "same rank"
        share = f"{one.hidden:+6.0%} ({one.low:+.0%} .. {one.high:+.0%})"
        lines.append(f"  {one.side:32} {one.main:14} {how:10} {times}  {share:26} {one.stretch:5.1f} x")
    lines += [f"  {one.kind:32} {one.seconds * 1e6:8.1f} us on the main stream" for one in contention.alone]
    host = contention.host
    lines.append(f"  the host: {host.launch * 1e6:.0f} us a launch of a step, {host.move * 1e6:.0f} us a move")
    return "\n".join(lines)


def _near(measured: int, size: int) -> bool:
    return measured / RANGE <= max(size, 1) <= measured * RANGE


# ------------------------------------------------------------------------------------------------ on disk
def load(name: str) -> Contention | None:
    """The measured pairs of a device, None if there are none yet (or the file cannot be used)."""
    try:
        data = json.loads(cache_file("contention", name).read_text(encoding="utf-8"))
        pairs, alone = (Pair(**one) for one in data["pairs"]), (Alone(**one) for one in data["alone"])
        found = Contention(data["device"], tuple(pairs), tuple(alone), Host(**data["host"]))
        numbers = [number for one in found.pairs for number in (one.main_seconds, one.side_seconds, one.stretch)]
        numbers += [*(one.seconds for one in found.alone), found.host.launch, found.host.move]
        sound = all(math.isfinite(one.low + one.hidden + one.high) and one.bytes > 0 for one in found.pairs)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    fine = all(isinstance(number, (int, float)) and math.isfinite(number) and number > 0 for number in numbers)
    return found if fine and sound and found.device == name else None


def save(contention: Contention) -> Path | None:
    """Keep the pairs for later processes; None where the directory cannot be written to."""
    return keep_json(cache_file("contention", contention.device), asdict(contention))


# ------------------------------------------------------------------------------------------------ on the device
UNITS = 6
"""Forks and joins in a row in one CUDA graph: a side task of some microseconds is measured by their sum."""
MOST_BESIDE = 12
"""Main tasks behind a fork at most."""
ROUNDS = 15
"""Rounds in which the three graphs of a pair are replayed in turns."""
TOKENS = 2048
"""A main task of more tokens than that is no other task, only one whose own time hides what is measured."""


def main_cases(tokens: int, width: int) -> list[Case]:
    """What a Transformer's main path is made of, in bfloat16, on the current CUDA device."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(torch.bfloat16)

    some = min(tokens, TOKENS)
    x, weight, wide = make(some, width), make(width, 4 * width), make(tokens, 4 * width)
    out, copy = torch.empty_like(wide[:some]), torch.empty_like(wide)
    heads = make(1, max(width // 128, 1), some, 128)
    attend = torch.nn.functional.scaled_dot_product_attention
    return [
        Case("matmul", lambda: torch.mm(x, weight, out=out), 2 * (x.numel() + weight.numel() + out.numel())),
        Case("attention", lambda: attend(heads, heads, heads, is_causal=True), 8 * heads.numel()),
        Case("attention_backward", _attention_backward(heads), 16 * heads.numel()),
        Case("memory", lambda: torch.mul(wide, 1.5, out=copy), 4 * wide.numel()),
    ]


def _attention_backward(heads: torch.Tensor) -> Callable[[], object]:
    """The backward of causal attention by the kernels that torch chooses. Several: they fill and convert memory before
    and behind the one that computes, and a side task beside these costs more than beside a forward."""
    q, k, v = (heads.detach().clone().requires_grad_() for _ in range(3))
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def call() -> object:
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in made:  # autograd runs a backward on the stream that its forward was on
            with torch.enable_grad():
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            made[stream] = (out, torch.ones_like(out))
        out, grad = made[stream]
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    return call


def measure(sides: Sequence[Case], mains: Sequence[Case], priority: bool, rounds: int = ROUNDS) -> list[Pair]:
    """Measure every side case beside every main case on the current CUDA device; a second or two for ten by three."""
    device = torch.cuda.current_device()
    main = torch.cuda.Stream(device, priority=PRIORITY if priority else 0)
    side = torch.cuda.Stream(device, priority=0)
    found = []
    torch.cuda.synchronize()  # the cases' tensors were made on another stream
    with torch.cuda.stream(main):
        times = [time_alone(case, main, rounds) for case in mains]
        for side_case in sides:
            alone = time_alone(side_case, main, rounds)
            for main_case, once in zip(mains, times, strict=True):
                found.append(_pair(main_case, side_case, once, alone, main, side, priority, rounds))
            torch.cuda.empty_cache()  # each graph had memory of its own
    torch.cuda.synchronize()
    return found


SIZES = ((1024, 2560), (8192, 2560))
"""Tokens and channels that are measured where nobody says otherwise: a small batch, and the one of the benchmarks."""


def calibrate(
    sides: Callable[[int, int], Sequence[Case]],
    others: Callable[[int, int], Sequence[Case]] = lambda tokens, width: (),
    sizes: Sequence[tuple[int, int]] = SIZES,
    priorities: Sequence[bool] = (False, True),
    rounds: int = ROUNDS,
) -> Contention:
    """Measure the current CUDA device, keep the pairs for later processes, and return them; a quarter of a minute.

    Args:
        sides: (tokens, channels) -> what may run on the side stream at that size.
        others: likewise, what the main stream has to do in addition if a side task moves.
        sizes: at which sizes.
        priorities: with a main stream of the same priority, of a higher one.
        rounds: see ``ROUNDS``.
    """
    pairs: list[Pair] = []
    alone: list[Alone] = []
    stream = torch.cuda.Stream()
    for tokens, width in sizes:
        cases, mains = sides(tokens, width), main_cases(tokens, width)
        for priority in priorities:
            pairs += measure(cases, mains, priority, rounds)
        # Bytes say little of attention, whose blocks are few: its time is measured too.
        more = [*others(tokens, width), *(case for case in mains if case.kind.startswith("attention"))]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            alone += [Alone(case.kind, case.bytes, time_more(case, stream, rounds)) for case in more]
    calls = [case.call for case in sides(*sizes[0])]
    found = Contention(torch.cuda.get_device_name(), tuple(pairs), tuple(alone), host_of.measure(calls))
    save(found)
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower, upper end of its interval of 95 %), by the ranks that a fair coin gives: nothing is assumed of
    how the values are spread. Fewer than six values: the least and the greatest."""
    ordered, count = sorted(values), len(values)
    rank, below = 0, 0.5**count
    while count >= 6 and below + math.comb(count, rank + 1) * 0.5**count <= 0.025:
        rank += 1
        below += math.comb(count, rank) * 0.5**count
    return statistics.median(ordered), ordered[rank], ordered[count - 1 - rank]


def _row(count: int, *calls: Callable[[], object]) -> None:
    for _ in range(count):
        for call in calls:
            call()


def _captured(work: Callable[[], None], stream: Any) -> Any:
    """`work` as a CUDA graph; its nodes have the priority of the stream. Without the garbage collection of
    ``torch.cuda.graph``, which takes longer than what is measured."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may ask the device: NCCL's does
        try:
            work()
        finally:
            graph.capture_end()
    return graph


def _in_turns(graphs: Sequence[Any], rounds: int) -> list[list[float]]:
    """Seconds of a replay of each graph, round by round, on the current stream; every other round backwards."""
    spans: list[list[tuple[Any, Any]]] = []
    for number in range(rounds + 1):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in graphs]
        for index in range(len(graphs)) if number % 2 else reversed(range(len(graphs))):
            events[index][0].record()
            graphs[index].replay()
            events[index][1].record()
        spans.append(events)
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) / 1e3 for start, end in events] for events in spans[1:]]


def compared(works: Sequence[Callable[[], None]], stream: Any, rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each piece of work, round by round, each a CUDA graph. `stream` is the current one."""
    return _in_turns([_captured(work, stream) for work in works], rounds)


def time_alone(case: Case, stream: Any, rounds: int = ROUNDS) -> float:
    """Median seconds of a call behind another of its kind. `stream` is the current one."""
    return statistics.median(one for (one,) in compared([lambda: _row(UNITS, case.call)], stream, rounds)) / UNITS


def time_more(case: Case, stream: Any, rounds: int = ROUNDS) -> float:
    """Median seconds that a call takes, more than the one whose place it takes. `stream` is the current one."""
    if case.instead_of is None:
        return time_alone(case, stream, rounds)
    calls = (case.call, case.instead_of)
    turns = compared([functools.partial(_row, UNITS, call) for call in calls], stream, rounds)
    return max(LEAST_SECONDS, statistics.median(one - other for one, other in turns) / UNITS)


def _pair(
    main_case: Case, side_case: Case, once: float, alone: float, main: Any, side: Any, priority: bool, rounds: int
) -> Pair:
    latency, beside = _room(main_case, side_case, once, alone, main, side)

    def together() -> None:
        for _ in range(UNITS):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                side_case.call()
            _row(beside, main_case.call)
            main.wait_stream(side)

    def in_a_row() -> None:
        for _ in range(UNITS):
            side_case.call()
            _row(beside, main_case.call)

    turns = compared([lambda: _row(UNITS * beside, main_case.call), in_a_row, together], main, rounds)
    cost = max(statistics.median(serial - only for only, serial, _ in turns) / UNITS, 0.2 * alone)
    hidden, low, high = (value / UNITS / cost for value in interval([serial - both for _, serial, both in turns]))
    kinds = (main_case.kind, side_case.kind, side_case.bytes)
    return Pair(*kinds, priority, once, cost, hidden, low, high, max(1.0, latency / alone))


def _room(main_case: Case, side_case: Case, once: float, alone: float, main: Any, side: Any) -> tuple[float, int]:
    """(seconds from a fork to the end of the side task, main tasks enough for it to end within them). Without that room
    what is measured is a main stream that waits."""
    beside = max(1, math.ceil(3 * alone / once))
    while True:
        latency = _latency(main_case, side_case, beside, main, side)
        if latency is None:  # behind everything, the most that it can be
            latency = 2 * beside * once + alone
        needed = math.ceil(1.2 * latency / once)
        if needed <= beside or beside >= MOST_BESIDE:
            return latency, beside
        beside = min(needed, MOST_BESIDE)


def _latency(main_case: Case, side_case: Case, beside: int, main: Any, side: Any) -> float | None:
    """Median seconds from a fork to the end of the side task, with main tasks waiting behind the fork.

    The device sleeps until the host has filled both streams: else what is measured is the host. None if it never was
    ahead.
    """
    times: list[float] = []
    cycles = 1_000_000
    for _ in range(12):
        slept, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(cycles)
        slept.record(main)
        side.wait_stream(main)
        start.record(main)
        with torch.cuda.stream(side):
            side_case.call()
            end.record()
        _row(2 * beside, main_case.call)
        asleep = not slept.query()
        main.wait_stream(side)
        torch.cuda.synchronize()
        if asleep:
            times.append(start.elapsed_time(end) / 1e3)
        else:
            cycles = min(4 * cycles, 64_000_000)
        if len(times) == 5:
            break
    return statistics.median(times) if times else None
