"""What a device does with two kernels at once: measured pairs, kept on disk, asked by the assignment.

A pair is a kind of task on the main stream (``matmul``, ``attention``, ``memory``, ``communication``) beside a kind on
the side stream (the name of an op). With the main task alone M, the side task alone S, and both at once B (from the
fork to the join, the cost of both events included), what counts is the part of S that vanished:

    hidden = (M + S - B) / S          1: the side task was free,  0: no gain,  negative: two streams lose time

Nothing is assumed about a pair that was not measured, and nothing about a device without a file: one stream then.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mhc_compile.cost import cache_file

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
    stretch: float
    """How much longer the side task took beside them than alone; at least 1."""


@dataclass(frozen=True)
class Case:
    """Something to measure: a kind, a call that launches it once, its bytes."""

    kind: str
    call: Callable[[], object]
    bytes: int


@dataclass(frozen=True)
class Contention:
    """All pairs of a device."""

    device: str
    pairs: tuple[Pair, ...] = ()

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
        """Measured time of a side kind of `size` bytes: the nearest measurement, scaled where it is moved by bytes."""
        measured = sorted({(one.bytes, one.side_seconds) for one in self.pairs if one.side == kind})
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
    lines = [f"{contention.device}: part of the side call that is hidden, how much longer it takes beside the main one"]
    for one in contention.pairs:
        times = f"{one.side_seconds * 1e6:8.1f} us beside {one.main_seconds * 1e6:8.1f} us"
        how = "main first" if one.priority else "same rank"
        lines.append(f"  {one.side:28} {one.main:14} {how:10} {times}  {one.hidden:+6.0%}  {one.stretch:5.1f} x")
    return "\n".join(lines)


def _near(measured: int, size: int) -> bool:
    return measured / RANGE <= max(size, 1) <= measured * RANGE


# ------------------------------------------------------------------------------------------------ on disk
def load(name: str) -> Contention | None:
    """The measured pairs of a device, None if there are none yet (or the file cannot be used)."""
    try:
        data = json.loads(cache_file("contention", name).read_text(encoding="utf-8"))
        found = Contention(data["device"], tuple(Pair(**pair) for pair in data["pairs"]))
        numbers = [number for one in found.pairs for number in (one.main_seconds, one.side_seconds, one.stretch)]
        sound = all(math.isfinite(one.hidden) and one.bytes > 0 for one in found.pairs)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    fine = all(isinstance(number, (int, float)) and math.isfinite(number) and number > 0 for number in numbers)
    return found if fine and sound and found.device == name else None


def save(contention: Contention) -> Path | None:
    """Keep the pairs for later processes; None where the directory cannot be written to."""
    path = cache_file("contention", contention.device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(contention), file, indent=1)
        os.replace(temporary, path)  # whole or not at all: another process may be reading
    except OSError:
        return None
    return path


# ------------------------------------------------------------------------------------------------ on the device
UNITS = 6
"""Forks and joins in a row in one CUDA graph: a side task of some microseconds is measured by their sum."""


def main_cases(tokens: int, width: int) -> list[Case]:
    """What a Transformer's main path is made of, in bfloat16, on the current CUDA device."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(torch.bfloat16)

    x, weight, wide = make(tokens, width), make(width, 4 * width), make(tokens, 4 * width)
    out, copy = torch.empty_like(wide), torch.empty_like(wide)
    heads = make(1, max(width // 128, 1), tokens, 128)
    attend = torch.nn.functional.scaled_dot_product_attention
    return [
        Case("matmul", lambda: torch.mm(x, weight, out=out), 2 * (x.numel() + weight.numel() + out.numel())),
        Case("attention", lambda: attend(heads, heads, heads, is_causal=True), 8 * heads.numel()),
        Case("memory", lambda: torch.mul(wide, 1.5, out=copy), 4 * wide.numel()),
    ]


def measure(sides: Sequence[Case], mains: Sequence[Case], priority: bool, repeat: int = 9) -> list[Pair]:
    """Measure every side case beside every main case on the current CUDA device; a second or two for ten by three."""
    device = torch.cuda.current_device()
    main = torch.cuda.Stream(device, priority=-1 if priority else 0)
    side = torch.cuda.Stream(device, priority=0)
    found = []
    torch.cuda.synchronize()  # the cases' tensors were made on another stream
    with torch.cuda.stream(main):
        for side_case in sides:
            alone = _replayed(_captured(functools.partial(_row, UNITS, side_case.call), main), repeat) / UNITS
            for main_case in mains:
                found.append(_pair(main_case, side_case, alone, main, side, priority, repeat))
    torch.cuda.synchronize()
    return found


SIZES = ((1024, 2560), (8192, 2560))
"""Tokens and channels that are measured where nobody says otherwise: a small batch, and the one of the benchmarks."""


def calibrate(
    sides: Callable[[int, int], Sequence[Case]],
    sizes: Sequence[tuple[int, int]] = SIZES,
    priorities: Sequence[bool] = (False, True),
    repeat: int = 5,
) -> Contention:
    """Measure the current CUDA device, keep the pairs for later processes, and return them; half a minute.

    Args:
        sides: (tokens, channels) -> what may run on the side stream at that size.
        sizes: at which sizes.
        priorities: with a main stream of the same priority, of a higher one.
        repeat: replays of a graph; the median counts.
    """
    pairs: list[Pair] = []
    for tokens, width in sizes:
        cases, mains = sides(tokens, width), main_cases(tokens, width)
        for priority in priorities:
            pairs += measure(cases, mains, priority, repeat)
    found = Contention(torch.cuda.get_device_name(), tuple(pairs))
    save(found)
    return found


def _row(count: int, *calls: Callable[[], object]) -> None:
    for _ in range(count):
        for call in calls:
            call()


def _captured(work: Callable[[], None], stream: Any) -> Any:
    """`work` as a CUDA graph; its nodes have the priority of the stream."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def _replayed(graph: Any, repeat: int) -> float:
    """Median seconds of a replay on the current stream."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat + 2)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[2:]) / 1e3


def _pair(main_case: Case, side_case: Case, alone: float, main: Any, side: Any, priority: bool, repeat: int) -> Pair:
    once = _replayed(_captured(lambda: _row(UNITS, main_case.call), main), repeat) / UNITS
    beside = max(1, math.ceil(3 * alone / once))  # enough main work for the side task to end within it

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

    graphs = [_captured(work, main) for work in (lambda: _row(UNITS * beside, main_case.call), in_a_row, together)]
    rounds = [[_replayed(graph, repeat) for graph in graphs] for _ in range(3)]  # in turns: the clock of a GPU wanders
    only, serial, both = (statistics.median(column) / UNITS for column in zip(*rounds, strict=True))
    cost = max(serial - only, 0.2 * alone)
    return Pair(
        main_case.kind, side_case.kind, side_case.bytes, priority, once, cost, (serial - both) / cost,
        _stretch(main_case, side_case, alone, beside, main, side),
    )  # fmt: skip


def _stretch(main_case: Case, side_case: Case, alone: float, beside: int, main: Any, side: Any) -> float:
    """Seconds of the side task beside the main ones, over its own."""
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # both streams are filled before either starts
        side.wait_stream(main)
        _row(2 * beside, main_case.call)
        with torch.cuda.stream(side):
            start.record()
            side_case.call()
            end.record()
        main.wait_stream(side)
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return max(1.0, statistics.median(times) / alone)
