"""Pipelines of stages with hyper-connections: what their side work costs where communication is overlapped.

Two questions, two players, both for given costs in seconds:

* ``one_f_one_b`` and ``dual_pipe`` play a whole pipeline: each rank a row of chunks (a forward, a backward, a weight
  gradient, or a forward overlapped with a backward), each chunk when its neighbour's is there. Without communication
  1F1B idles (p - 1)(F + B) a rank, DualPipe (p/2 - 1)(F&B + B - 3W) (DeepSeek-V3, arXiv 2412.19437, table 2).
* ``overlapped_stage`` plays the inside of one forward overlapped with one backward of a mixture of experts: computation
  on one stream, all-to-all on the network. The kernels of the hyper-connections either wait in the row of the
  computation stream, or go to a stream of higher priority and interrupt what runs there (mHC, arXiv 2512.24880,
  section 4.3: 6.7 % with n = 4 on an overlapped stage).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PAPER_SHARE = 0.067
"""mHC's share of a training step with all its overlaps, as the paper reports it; its costs are not published."""


# ------------------------------------------------------------------------------------------------ one stage
@dataclass(frozen=True)
class Op:
    """A piece of work on a resource (``compute`` or ``network``)."""

    name: str
    resource: str
    seconds: float
    waits_for: tuple[str, ...] = ()
    side: bool = False
    """Work of the hyper-connections."""


def play_stage(ops: Sequence[Op], priority: bool = False) -> dict[str, tuple[float, float]]:
    """(start, end) of each op.

    A resource works on one op at a time, in the order given; without `priority` an op that is not ready holds up those
    behind it in its row, as a stream does. With it side ops are in a row of their own that interrupts the other one
    whenever its head is ready.
    """
    done: dict[str, float] = {}
    left = {op.name: op.seconds for op in ops}
    start: dict[str, float] = {}
    rows: dict[tuple[str, bool], list[Op]] = {}
    for op in ops:
        rows.setdefault((op.resource, op.side and priority), []).append(op)
    now = 0.0
    while any(rows.values()):
        running: dict[str, Op] = {}
        for (resource, _), row in sorted(rows.items(), key=lambda item: item[0][1]):
            if row and all(one in done for one in row[0].waits_for):
                running[resource] = row[0]  # the row of side ops comes last and wins
        if not running:
            raise ValueError(f"nothing can run: {[row[0].name for row in rows.values() if row]} wait for each other")
        step = min(left[op.name] for op in running.values())
        for op in running.values():
            start.setdefault(op.name, now)
            left[op.name] -= step
        now += step
        for key, row in rows.items():
            if row and row[0].name in start and left[row[0].name] <= 1e-15:
                done[row.pop(0).name] = now
            rows[key] = row
    return {name: (start[name], done[name]) for name in done}


@dataclass(frozen=True)
class StageCosts:
    """Seconds of one overlapped stage: one layer of a mixture of experts, forward of a batch, backward of another."""

    attention: float
    """Forward; the backward takes twice as long."""
    experts: float
    """Forward; the backward takes twice as long."""
    exchange: float
    """One all-to-all: dispatch or combine, either way."""
    mix_forward: float
    """All kernels of the hyper-connection of one sublayer, forward."""
    mix_backward: float
    send: float = 0.0
    """What goes to the next rank of the pipeline, plain; with hyper-connections `streams` times as much."""
    streams: int = 4


def overlapped_stage(costs: StageCosts, mixed: bool = True) -> list[Op]:
    """The ops of one stage in the order of their launch: DualPipe's arrangement of forward (f) and backward (b).

    Each sublayer's hyper-connection is one op behind it; the exchange of the experts waits for the one in front of it,
    the pipeline's send for the last one.
    """
    ops: list[Op] = []

    def add(name: str, resource: str, seconds: float, *waits_for: str, side: bool = False) -> None:
        if seconds > 0 or not side:
            ops.append(
                Op(name, resource, seconds, tuple(one for one in waits_for if one in {op.name for op in ops}), side)
            )

    forward, backward = (costs.mix_forward, costs.mix_backward) if mixed else (0.0, 0.0)
    add("b.combine", "network", costs.exchange)
    add("f.attention", "compute", costs.attention)
    add("f.mix0", "compute", forward, "f.attention", side=True)
    add("f.dispatch", "network", costs.exchange, "f.mix0", "f.attention")
    add("b.experts", "compute", 2 * costs.experts, "b.combine")
    add("b.dispatch", "network", costs.exchange, "b.experts")
    add("f.experts", "compute", costs.experts, "f.dispatch")
    add("f.combine", "network", costs.exchange, "f.experts")
    add("b.mix1", "compute", backward, "b.dispatch", side=True)
    add("b.attention", "compute", 2 * costs.attention, "b.mix1", "b.dispatch")
    add("f.mix1", "compute", forward, "f.combine", side=True)
    add("b.mix0", "compute", backward, "b.attention", side=True)
    send = costs.send * (costs.streams if mixed else 1)
    if send > 0:
        add("f.send", "network", send, "f.mix1", "f.combine")
        add("b.send", "network", send, "b.mix0", "b.attention")
    return ops


def share(costs: StageCosts, priority: bool, stages: int = 8) -> float:
    """Part of the time of `stages` overlapped stages in a row that the hyper-connections add.

    A stage's ops wait for those of the stage before it that make their input; the network and the computation stream
    run over the border.
    """
    return length(_chain(costs, True, stages), priority) / length(_chain(costs, False, stages), False) - 1.0


def length(ops: Sequence[Op], priority: bool) -> float:
    """Seconds until all is done."""
    return max((end for _, end in play_stage(ops, priority).values()), default=0.0)


def _chain(costs: StageCosts, mixed: bool, stages: int) -> list[Op]:
    ops: list[Op] = []
    last: dict[str, str] = {}
    for number in range(stages):
        own = overlapped_stage(costs, mixed)
        for op in own:
            before = [f"{number}.{one}" for one in op.waits_for]
            batch = op.name[0]
            if not any(one.startswith(batch) for one in op.waits_for) and batch in last:
                before.append(last[batch])
            ops.append(Op(f"{number}.{op.name}", op.resource, op.seconds, tuple(before), op.side))
        last = {op.name[0]: f"{number}.{op.name}" for op in own if not op.name.endswith("send")}
    return ops


# ------------------------------------------------------------------------------------------------ a pipeline
@dataclass(frozen=True)
class ChunkCosts:
    """Seconds of one chunk on one rank."""

    forward: float
    backward: float
    """All of it, the weight gradient included."""
    weight: float = 0.0
    """The weight gradient's part of `backward`."""
    overlapped: float = 0.0
    """A forward and a backward overlapped; 0 for their sum."""
    send: float = 0.0
    """From one rank to the next."""


@dataclass(frozen=True)
class Chunk:
    """One entry of a rank's row."""

    parts: tuple[tuple[str, int, int], ...]
    """(``F``, ``B``, ``I`` for a backward without its weight gradient, or ``W``; direction; batch)."""


@dataclass
class Pipeline:
    """A played pipeline."""

    seconds: float
    busy: list[float] = field(default_factory=list)
    """Of each rank."""
    chunks: list[list[tuple[str, float, float]]] = field(default_factory=list)
    """Of each rank: (name, start, end)."""

    def idle(self, rank: int = 0) -> float:
        """Seconds in which a rank waits."""
        return self.seconds - self.busy[rank]


def one_f_one_b(ranks: int, batches: int, costs: ChunkCosts) -> Pipeline:
    """1F1B: a rank runs ranks - rank - 1 forwards ahead, then one forward and one backward in turns."""
    rows = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, batches)
        row = [("F", 0, batch) for batch in range(ahead)]
        for batch in range(batches - ahead):
            row += [("F", 0, ahead + batch), ("B", 0, batch)]
        row += [("B", 0, batch) for batch in range(batches - ahead, batches)]
        rows.append([Chunk((part,)) for part in row])
    return _play(rows, costs, ranks)


def dual_pipe(ranks: int, batches: int, costs: ChunkCosts) -> Pipeline:
    """DualPipe: batches enter from both ends, each rank holds two stages; `batches` counts both directions.

    The order of a rank's chunks is that of deepseek-ai/DualPipe. Needs an even number of ranks and at least twice as
    many batches, an even number too; ValueError otherwise.
    """
    if ranks % 2 or batches % 2 or batches < 2 * ranks:
        raise ValueError(f"DualPipe needs even ranks and batches >= 2 ranks, not {ranks} and {batches}")
    return _play([_dual_row(rank, ranks, batches // 2) for rank in range(ranks)], costs, ranks)


def _dual_row(rank: int, ranks: int, half: int) -> list[Chunk]:
    """The row of a rank. Direction 0 is the near end's: in the second half of the ranks it is the other one."""
    near = min(rank, ranks - 1 - rank)
    middle = ranks // 2
    count: dict[tuple[str, int], int] = {}
    row: list[Chunk] = []
    pending: list[tuple[int, int]] = []

    def part(kind: str, phase: int) -> tuple[str, int, int]:
        direction = phase ^ (rank >= middle)
        if kind == "W":
            return ("W", *pending.pop(0))
        batch = count.get(("B" if kind == "I" else kind, direction), 0)
        count["B" if kind == "I" else kind, direction] = batch + 1
        if kind == "I":
            pending.append((direction, batch))
        return (kind, direction, batch)

    def add(*parts: tuple[str, int]) -> None:
        row.append(Chunk(tuple(part(kind, phase) for kind, phase in parts)))

    for _ in range((middle - near - 1) * 2):
        add(("F", 0))
    for _ in range(near + 1):
        add(("F", 0))
        add(("F", 1))
    for _ in range(middle - near - 1):
        add(("I", 1))
        add(("W", 0))
        add(("F", 1))
    for number in range(half - ranks + near + 1):
        if number == 0 and near == middle - 1:
            add(("F", 0))
            add(("B", 1))
        else:
            add(("F", 0), ("B", 1))
        add(("F", 1), ("B", 0))
    for _ in range(middle - near - 1):
        add(("B", 1))
        add(("F", 1), ("B", 0))
    lean = False
    for number in range(near + 1):
        lean = lean or (number == (near + 1) // 2 and near % 2 == 1)
        add(("I" if lean else "B", 1))
        lean = lean or (number == (near + 1) // 2 and near % 2 == 0)
        add(("I" if lean else "B", 0))
    for _ in range(middle - near - 1):
        add(("W", 0))
        add(("I", 0))
    while pending:
        add(("W", 0))
    return row


def _play(rows: list[list[Chunk]], costs: ChunkCosts, ranks: int) -> Pipeline:
    """Each chunk starts when its rank is free and what it needs has arrived."""
    end: dict[tuple[str, int, int, int], float] = {}
    free, busy = [0.0] * ranks, [0.0] * ranks
    played: list[list[tuple[str, float, float]]] = [[] for _ in rows]
    at = [0] * ranks
    while any(at[rank] < len(rows[rank]) for rank in range(ranks)):
        moved = False
        for rank in range(ranks):
            while at[rank] < len(rows[rank]):
                chunk = rows[rank][at[rank]]
                needs = [_needs(part, rank, ranks) for part in chunk.parts]
                if any(one is not None and one not in end for one in needs):
                    break
                arrived = (end[one] + (costs.send if one[3] != rank else 0.0) for one in needs if one is not None)
                start = max([free[rank], *arrived])
                seconds = _seconds(chunk, costs)
                for kind, direction, batch in chunk.parts:
                    end["B" if kind == "I" else kind, direction, batch, rank] = start + seconds
                free[rank] = start + seconds
                busy[rank] += seconds
                played[rank].append((_name(chunk), start, start + seconds))
                at[rank], moved = at[rank] + 1, True
        if not moved:
            raise ValueError("the ranks wait for each other")
    return Pipeline(max(free), busy, played)


def _needs(part: tuple[str, int, int], rank: int, ranks: int) -> tuple[str, int, int, int] | None:
    kind, direction, batch = part
    forward = 1 if direction == 0 else -1
    first, last = (0, ranks - 1) if direction == 0 else (ranks - 1, 0)
    if kind == "W":
        return ("B", direction, batch, rank)
    if kind == "F":
        return None if rank == first else ("F", direction, batch, rank - forward)
    return ("F", direction, batch, rank) if rank == last else ("B", direction, batch, rank + forward)


def _seconds(chunk: Chunk, costs: ChunkCosts) -> float:
    if len(chunk.parts) == 2 and costs.overlapped:
        return costs.overlapped
    each = {"F": costs.forward, "B": costs.backward, "I": costs.backward - costs.weight, "W": costs.weight}
    return sum(each[kind] for kind, _, _ in chunk.parts)


def _name(chunk: Chunk) -> str:
    return "&".join(f"{kind}{batch}{'>' if direction == 0 else '<'}" for kind, direction, batch in chunk.parts)


def names(chunks: Iterable[Chunk]) -> list[str]:
    """A row as text: ``F0>`` is the forward of batch 0 towards higher ranks, ``F3<&B1>`` two overlapped."""
    return [_name(chunk) for chunk in chunks]
