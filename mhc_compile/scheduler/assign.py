"""Which tasks go to the side stream, where each starts, and where the main stream waits for it.

The main stream runs the program in its order; a moved task starts on the side stream at its *fork*, a place in that
order behind everything it waits for, and the main stream waits for it at its *join*, before its first reader. While a
side task s runs beside a main task m, with what was measured of the pair (``contention``):

    the side task advances at 1 / stretch of its own speed,
    the main task at 1 - (1 - hidden) / stretch,

so that a side task that runs under m from end to end costs the main stream (1 - hidden) of its seconds. When the main
stream comes to wait for it, it goes on at the speed it has: a small kernel that began beside a matmul sits on the few
multiprocessors that were free (Sinkhorn beside a matmul of 9 us took 20 us for 5 on an H200). Custom ops on the main
stream count as ``memory``. Of a pair that was not measured nothing is known: the main task stands still then, which is
one stream. While the main stream waits for communication the pair ``communication`` counts.

Of a few movable tasks every subset is played; of more the search is greedy in the order of the program: a task is moved
if the predicted end comes earlier. Where it starts is a question of what it runs beside (a matmul of a gradient hides
little of itself beside another matmul, most of it beside attention), then of memory (see ``place``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .contention import Contention, Pair
from .dag import Dag, Task

LEAST_GAIN = 0.002
"""Of the graph's seconds: a plan that promises less is noise, and one stream is taken."""
MAIN_KINDS = ("matmul", "attention", "attention_backward", "memory", "communication")
EXACT = 8
"""Up to so many moves all subsets are compared."""
ROOM = 2.0
"""Room left for a side task before its reader, over its predicted time: measured warm, it takes up to twice as long in
a step."""
ALIKE = 0.02
"""Of what lies between the best and the worst place: one that loses no more than this above the best is as good."""
LOOKAHEAD = 200.0
"""A task that nobody waits for is put off by so many times its own time at most: its inputs are held until then."""


@dataclass(frozen=True)
class Move:
    """A task on the side stream. Places are numbers of tasks in the program's order, its length for the end."""

    task: str
    fork: int
    join: int


@dataclass(frozen=True)
class Interval:
    """A task, or the rest of one, on a stream."""

    stream: str
    """``main``, ``side``, ``communication``, or ``wait`` for a main stream that waits."""
    name: str
    kind: str
    start: float
    end: float


@dataclass
class Plan:
    """What to do with one graph."""

    dag: Dag
    name: str = ""
    """``forward`` or ``backward``, where the graph is one."""
    moves: list[Move] = field(default_factory=list)
    serial: float = 0.0
    """Predicted seconds of one stream."""
    predicted: float = 0.0
    """Predicted seconds with the moves."""
    timeline: list[Interval] = field(default_factory=list)
    alone: list[Interval] = field(default_factory=list)
    """The timeline of one stream."""
    reason: str = ""
    """Why there is one stream, empty if there are two."""

    @property
    def gain(self) -> float:
        """Predicted gain as a part of one stream's seconds."""
        return (self.serial - self.predicted) / self.serial if self.serial else 0.0

    def stay(self, reason: str) -> None:
        """One stream after all."""
        self.moves, self.predicted, self.timeline, self.reason = [], self.serial, self.alone, reason


@dataclass
class _Running:
    move: Move
    task: Task
    left: float
    """Seconds of its own."""
    rates: _Rates
    speed: float = 1.0
    """The one that it had last."""


class _Rates:
    """Speeds of a main task of some kind, and of one side task beside it."""

    def __init__(self, contention: Contention, priority: bool, side: Task) -> None:
        self.contention, self.priority, self.side = contention, priority, side
        self.known: dict[str, tuple[float, float]] = {}

    def __call__(self, main: str) -> tuple[float, float]:
        """(main, side), each as a part of what it does alone."""
        main = main if main in MAIN_KINDS else "memory"
        if main not in self.known:
            self.known[main] = self._measured(main)
        return self.known[main]

    def _measured(self, main: str) -> tuple[float, float]:
        pair = self.contention.pair(main, self.side.kind, self.side.bytes, self.priority)
        if pair is None:
            return (1.0, 0.0) if main == "communication" else (0.0, 1.0)
        stretch = max(pair.stretch, 1.0 - pair.share)
        return 1.0 - (1.0 - pair.share) / stretch, 1.0 / stretch


class _Clock:
    """Plays a program with moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.side: list[_Running] = []
        self.done: set[str] = set()
        self.intervals: list[Interval] = []

    def _log(self, stream: str, task: Task, start: float) -> None:
        if self.now > start:
            self.intervals.append(Interval(stream, task.name, task.kind, start, self.now))

    def advance(self, kind: str, seconds: float) -> None:
        """Let the main stream do `seconds` of work of a kind (its own time), the side stream what it can meanwhile."""
        while seconds > 1e-12:
            if not self.side:
                self.now += seconds
                return
            head = self.side[0]
            main_rate, side_rate = head.rates(kind)
            step = head.left / side_rate if side_rate > 0 else seconds / main_rate
            if main_rate > 0:
                step = min(step, seconds / main_rate)
            start = self.now
            self.now += step
            seconds -= step * main_rate
            self._side(head, step * side_rate, start)

    def _side(self, head: _Running, work: float, start: float) -> None:
        head.left -= work
        if work > 0:
            head.speed = work / (self.now - start)
            self._log("side", head.task, start)
        if head.left <= 1e-12:
            self.side.pop(0)
            self.done.add(head.task.name)

    def finish(self, name: str) -> None:
        """The main stream waits until a side task is done."""
        while name not in self.done:
            head, start = self.side[0], self.now
            self.now += head.left / head.speed
            self._log("wait", head.task, start)
            self._side(head, head.left, start)


def play(
    dag: Dag, moves: Iterable[Move], contention: Contention, priority: bool = False, skipped: Iterable[str] = ()
) -> tuple[float, list[Interval]]:
    """(predicted seconds, timeline) of a program with moves; tasks in `skipped` are left out."""
    clock, moved, left_out = _Clock(), {move.task: move for move in moves}, set(skipped)
    pending = sorted(moved.values(), key=lambda move: (move.fork, move.join))
    communication: dict[str, float] = {}
    wire = 0.0
    order = dag.order
    for index in range(len(order) + 1):
        while pending and pending[0].fork <= index:
            move = pending.pop(0)
            task = dag.tasks[move.task]
            clock.side.append(_Running(move, task, task.seconds, _Rates(contention, priority, task)))
        for move in moved.values():
            if move.join <= index and move.task not in clock.done:
                clock.finish(move.task)
        if index == len(order) or order[index] in moved or order[index] in left_out:
            continue
        task, start = dag.tasks[order[index]], clock.now
        if task.kind == "communication":
            wire = max(wire, clock.now) + task.seconds
            communication[task.name] = wire
            clock.intervals.append(Interval("communication", task.name, task.kind, wire - task.seconds, wire))
        elif task.kind == "wait":
            until = max((communication.get(name, 0.0) for name in dag.before(task.name)), default=0.0)
            clock.advance("communication", max(until - clock.now, 0.0))
            clock._log("wait", task, start)
        else:
            clock.advance(task.kind, task.seconds)
            clock._log("main", task, start)
    return clock.now, clock.intervals


def _window(dag: Dag, name: str, index: Mapping[str, int]) -> tuple[int, int, bool]:
    """(first place where a task may start, place of its first reader, whether anything waits for that reader).

    Fused work on this task alone, which nothing waits for (two halves of a gradient added), stands where it was sunk
    to: at the end.
    """
    first = max((index[one] + 1 for one in dag.before(name)), default=0)
    last = min((index[one] for one in dag.after(name)), default=len(index))
    readers = [one for one in dag.after(name) if dag.tasks[one].kind != "memory" or dag.before(one) != {name}]
    return first, last, bool(readers) or any(dag.after(one) for one in dag.after(name))


def _delay(dag: Dag, task: Task, order: Sequence[str], rates: _Rates) -> float:
    """Seconds that the main stream loses if a task, with its room, runs beside what `order` names and is waited for
    behind that."""
    left, lost, speed = ROOM * task.seconds, 0.0, 1.0
    for name in order:
        beside = dag.tasks[name]
        kind, seconds = beside.kind, beside.seconds
        if name == task.name or kind == "communication":
            continue  # the main stream goes on at once
        if kind == "wait":
            kind = "communication"
            seconds = sum(dag.tasks[one].seconds for one in dag.before(name) if dag.tasks[one].kind == kind)
        main_rate, side_rate = rates(kind)
        if main_rate <= 0.0:
            return lost + left / speed
        run = min(seconds / main_rate, left / side_rate if side_rate > 0 else math.inf)
        left -= run * side_rate
        lost += run * (1.0 - main_rate)
        if left <= 1e-12:
            return lost
        speed = side_rate or speed
    return lost + left / speed


def place(
    dag: Dag, name: str, contention: Contention, priority: bool = False, gates: Container[str] | None = None
) -> Move | None:
    """Where a task would start and have to be done on the side stream; None if there is nothing to run beside.

    Of the places where the main stream loses least (alike within `ALIKE`), for a task that somebody waits for: the
    first one from its own in the program, which holds nothing longer than one stream does and leaves it all the time
    there is; if they are all before that, the last, and its results are held no longer than needed (a replay that is
    brought forward). For a task that nobody waits for the first one, and the main stream waits for it only when it has
    long been done. A task starts before one of the tasks `gates`, if they are given.
    """
    index, order, task = dag.index, dag.order, dag.tasks[name]
    first, last, wanted = _window(dag, name, index)
    if not wanted:
        first = max(first, index[name])

    def seconds(at: int) -> float:
        return 0.0 if order[at] == name else dag.tasks[order[at]].seconds

    if not any(seconds(at) for at in range(first, last)):
        return None
    rates = _Rates(contention, priority, task)
    delays: dict[int, float] = {}
    passed = 0.0
    for fork in range(first, last):
        if gates is None or order[fork] in gates:
            delays[fork] = _delay(dag, task, order[fork:last], rates)
        passed += seconds(fork)
        if not wanted and passed > LOOKAHEAD * task.seconds:
            break
    if not delays:
        return None
    least, most = min(delays.values()), max(delays.values())
    fine = least + ALIKE * (most - least)
    forks = [fork for fork, delay in delays.items() if delay <= fine]
    if wanted:
        return Move(name, next((fork for fork in forks if fork >= index[name]), forks[-1]), last)
    pairs = [contention.pair(kind, task.kind, task.bytes, priority) for kind in MAIN_KINDS]
    need = ROOM * task.seconds * max((pair.stretch for pair in pairs if isinstance(pair, Pair)), default=1.0)
    join, room = forks[0], 0.0
    while join < last and room < 2 * need:
        room += seconds(join)
        join += 1
    return Move(name, forks[0], join)


def best_subset(moves: Sequence[Move], seconds: Callable[[Sequence[Move]], float]) -> list[Move]:
    """The moves with the least predicted seconds, of all subsets; the smaller one of two alike."""
    best: tuple[Move, ...] = ()
    least = seconds(best)
    for size in range(1, len(moves) + 1):
        for subset in itertools.combinations(moves, size):
            predicted = seconds(subset)
            if predicted < least - 1e-9:
                best, least = subset, predicted
    return list(best)


def grown_subset(moves: Sequence[Move], seconds: Callable[[Sequence[Move]], float]) -> list[Move]:
    """One move after the other in program order, each kept if it is a gain beside those before it."""
    chosen: list[Move] = []
    least = seconds(chosen)
    for move in moves:
        predicted = seconds([*chosen, move])
        if predicted < least - 1e-9:
            chosen, least = [*chosen, move], predicted
    return chosen


def unmade(extra: Mapping[str, str], moves: Iterable[Move]) -> list[str]:
    """Of the early parts that `assign` speaks of those that are not in the program: their tasks stay."""
    moved = {move.task for move in moves}
    return [early for late, early in extra.items() if late not in moved]


def assign(
    dag: Dag,
    movable: Callable[[Task], bool],
    contention: Contention,
    priority: bool = False,
    extra: Mapping[str, str] | None = None,
    least_gain: float = LEAST_GAIN,
    gates: Container[str] | None = None,
) -> Plan:
    """Choose the moves.

    Args:
        dag: the program.
        movable: tasks that may leave the main stream.
        contention: what was measured on the device.
        priority: the main stream has the higher priority.
        extra: movable task -> a task that is in the program only if it is moved (the part of it that the main stream
            needs early, made on its own).
        least_gain: part of the program's seconds below which nothing is moved.
        gates: tasks before which a side task may start; any of them if None.
    """
    extra = dict(extra or {})
    serial, alone = play(dag, [], contention, priority, unmade(extra, []))
    plan = Plan(dag, serial=serial, predicted=serial, timeline=alone, alone=alone)
    candidates = [task for task in dag.tasks.values() if movable(task) and task.seconds > 0]
    known = [task for task in candidates if contention.knows(task.kind, task.bytes, priority)]
    if not known:
        kinds = ", ".join(sorted({task.kind for task in candidates}))
        plan.reason = f"nothing was measured of {kinds}" if candidates else "no call of this graph can move"
        return plan
    found = [move for task in known if (move := place(dag, task.name, contention, priority, gates)) is not None]

    def seconds(moves: Sequence[Move]) -> float:
        return play(dag, moves, contention, priority, unmade(extra, moves))[0]

    plan.moves = best_subset(found, seconds) if len(found) <= EXACT else grown_subset(found, seconds)
    plan.predicted, plan.timeline = play(dag, plan.moves, contention, priority, unmade(extra, plan.moves))
    if not plan.moves:
        plan.reason = "no gain predicted" if found else f"{len(known)} calls could move and have no place to start"
    elif plan.gain < least_gain:
        plan.stay(f"a gain of {plan.gain:.2%} is predicted, below the {least_gain:.2%} that can be told from noise")
    return plan
