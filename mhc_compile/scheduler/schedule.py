"""The pass: plan a partitioned graph and write the plan into it; one stream where no gain is predicted.

It runs behind all of inductor's own graph passes and behind fusion and lowering, on the forward and on the backward
graph, and is active only on a CUDA device whose contention has been measured (``python -m mhc_compile calibrate``).
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from mhc_compile import cost
from mhc_compile.compat import chain_graph_passes

from . import contention as contention_of
from .assign import LEAST_GAIN, MAIN_KINDS, Move, Plan, assign, play, unmade
from .contention import Contention
from .dag import Dag, Task, base_of, from_graph, is_opaque
from .emit import FORK, encode, gate_argument, move
from .timeline import text, write_trace

SEAM = "post_grad_custom_post_pass"
COMMUNICATION_GAIN = 0.02
"""`LEAST_GAIN` for a graph with collectives. On two H200s a plan that promised 0.84 % lost 0.87 % in a CUDA graph: what
a collective does to its neighbours is known less well than what two kernels do to each other."""

Split = tuple[fx.Node, fx.Node, Callable[[], None]]
"""A call, the call that makes early what the main stream needs of it, and how to take the latter back."""


class ScheduleLog:
    """The plans of the graphs compiled, in order; empty when inductor's caches had the artefact."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.notes: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> ScheduleLog:
        """Itself: it is written to until the last graph is compiled, and a report that is copied reads it then."""
        return self

    def write_trace(self, path: str | Path, measured: str | Path | None = None) -> Path:
        """The predicted timelines as a trace for ui.perfetto.dev or chrome://tracing.

        Args:
            path: what is written.
            measured: a trace that ``torch.profiler`` has exported of the same step, to stand beside them.
        """
        beside = Path(measured) if measured is not None else None
        return write_trace(Path(path), {plan.name: plan for plan in self.plans}, beside)

    def lines(self) -> list[str]:
        """For the report."""
        notes = list(dict.fromkeys(self.notes))
        return [*notes, *(line for plan in self.plans for line in text(plan).splitlines())]


_forced: contextvars.ContextVar[tuple[Contention, float] | None] = contextvars.ContextVar(
    "mhc_contention", default=None
)


@contextlib.contextmanager
def using(contention: Contention, least_gain: float = LEAST_GAIN) -> Iterator[None]:
    """Plan with these pairs instead of the device's own, on any device: for tests and for measuring plans that lose."""
    token = _forced.set((contention, least_gain))
    try:
        yield
    finally:
        _forced.reset(token)


def no_split(graph: fx.Graph) -> list[Split]:
    """Nothing to take apart."""
    return []


class SchedulePass(CustomGraphPass):
    """Plans and emits. ``uuid`` covers what the plan is made from. `captured`: what is compiled runs in a CUDA graph of
    the user's, and the host's time counts nothing."""

    def __init__(
        self, log: ScheduleLog, split: Callable[[fx.Graph], list[Split]], key: str, captured: bool = False
    ) -> None:
        self.log, self.split, self.key, self.captured = log, split, key, captured
        self.forced = _forced.get()
        self.high = torch.cuda.is_available() and bool(torch.cuda.current_stream().priority < 0)
        self.contention, self.reason = available()

    @property
    def priority(self) -> bool:
        """The main stream will have the higher priority: by ``main_stream``, or, in a CUDA graph of the user's, if the
        stream that compiles has it. Inductor captures on a stream of its own without one."""
        return torch.cuda.is_available() and not _cuda_graphs() and (self.high or not self.captured)

    def __call__(self, graph: fx.Graph) -> None:
        """Plan `graph`; edit it if there is a gain."""
        if not any(is_opaque(node) for node in graph.nodes):
            return
        if self.contention is None:
            self.log.notes.append(f"one stream: {self.reason}")
            return
        least = self.forced[1] if self.forced is not None else LEAST_GAIN
        free = self.captured or self.forced is not None
        plan = plan_graph(graph, self.contention, self.priority, self.split, least, free)
        inputs = [str(node.target) for node in graph.find_nodes(op="placeholder")]
        plan.name = "backward" if any(name.startswith("tangents") for name in inputs) else "forward"
        for task in plan.dag.tasks.values():
            task.nodes.clear()  # the report outlives the graph
        self.log.plans.append(plan)
        graph.eliminate_dead_code()
        graph.lint()

    def uuid(self) -> Any:
        """Identity for inductor's caches."""
        known = self.contention.fingerprint if self.contention is not None else self.reason
        forced = self.forced and self.forced[1]
        return ("mhc_compile.scheduler", self.key, known, self.priority, self.captured, forced)


def _cuda_graphs() -> bool:
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def available() -> tuple[Contention | None, str]:
    """(what is known of the current device, or why nothing is)."""
    forced = _forced.get()
    if forced is not None:
        return forced[0], ""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    name = torch.cuda.get_device_name()
    found = contention_of.load(name)
    reason = "" if found else f"{name} has not been calibrated (python -m mhc_compile calibrate)"
    return found, reason


def plan_graph(
    graph: fx.Graph,
    contention: Contention,
    priority: bool = False,
    split: Callable[[fx.Graph], list[Split]] = no_split,
    least_gain: float = LEAST_GAIN,
    forced: bool = False,
) -> Plan:
    """Plan a graph and write the plan into it. `forced` leaves out the question whether the host is the bottleneck."""
    splits = split(graph)
    where = next((t.device for node in graph.nodes for t in cost.tensors_of(node.meta.get("val"))), None)
    device = cost.device_of(where.type if where is not None else "cpu", (where.index or 0) if where is not None else 0)
    dag = from_graph(graph, device, contention.seconds)
    dag = dag.sunk(name for name, task in dag.tasks.items() if movable(task))
    extra = {late.name: early.name for late, early, _ in splits}
    if not forced and any(task.kind == "communication" for task in dag.tasks.values()):
        least_gain = max(least_gain, COMMUNICATION_GAIN)
    plan = _with_places(graph, dag, contention, priority, extra, least_gain)
    launches = len(dag.tasks) - len(extra)
    host = launches * contention.host.launch + len(plan.moves) * contention.host.move
    if plan.moves and not forced and not _cuda_graphs() and plan.serial < host:
        plan.stay(
            f"{launches} launches in {plan.serial * 1e3:.2f} ms: the host is the bottleneck without CUDA graphs "
            "(schedule='captured' for a step in a graph of yours)"
        )
    chosen = {one.task for one in plan.moves}
    undone = [undo for late, _, undo in splits if late.name not in chosen]
    kept = {late.name: undo for late, _, undo in splits if late.name in chosen}
    for undo in undone:
        undo()
    moved = emit(graph, plan)
    for name, undo in kept.items():
        if name not in moved:
            undo()
    # What was emitted before may have taken the place of another one: then the plan says what is left.
    _settle(plan, [one for one in plan.moves if one.task in moved], contention, priority, extra, least_gain=-1.0)
    return plan


def _with_places(
    graph: fx.Graph, dag: Dag, contention: Contention, priority: bool, extra: dict[str, str], least_gain: float
) -> Plan:
    """The best plan whose moves all have a place in the graph, predicted with the forks that they really get."""
    without: set[str] = set()
    gates = {name for name, task in dag.tasks.items() if is_opaque(task.nodes[0]) and _is_library(task.nodes[0])}

    def may_move(task: Task) -> bool:
        return task.name not in without and movable(task)

    while True:
        plan = assign(dag, may_move, contention, priority, extra, least_gain, gates)
        main = _main(plan)
        placed = [(one, _places(graph, plan, dag.tasks[one.task].nodes[0], one, main)) for one in plan.moves]
        lost = {one.task for one, place in placed if place is None}
        if not lost:
            break
        without |= lost
    if without and not plan.moves:
        plan.reason = f"{plan.reason}; {len(without)} moves have no place in the graph"
    _settle(plan, [replace(one, fork=place.fork) for one, place in placed if place is not None], contention, priority,
            extra, least_gain)  # fmt: skip
    return plan


def _settle(
    plan: Plan, moves: list[Move], contention: Contention, priority: bool, extra: dict[str, str], least_gain: float
) -> None:
    """Give a plan other moves, with what they promise; none if that is too little."""
    if moves == plan.moves:
        return
    predicted, timeline = play(plan.dag, moves, contention, priority, unmade(extra, moves))
    if moves and (plan.serial - predicted) >= least_gain * plan.serial:
        plan.moves, plan.predicted, plan.timeline = moves, predicted, timeline
    else:
        plan.stay("no gain predicted where the moves have a place in the graph")


def _main(plan: Plan) -> list[str]:
    """The tasks of the main stream, in order."""
    chosen = {one.task for one in plan.moves}
    return [name for name in plan.dag.order if name not in chosen]


def movable(task: Task) -> bool:
    """One opaque call that a fork can hold, and whose bits do not depend on how inductor would have compiled it."""
    node = task.nodes[0] if len(task.nodes) == 1 else None
    if node is None or not is_opaque(node) or task.kind in {*MAIN_KINDS, "wait"}:
        return False
    if task.kind.startswith("aten.") and _autotuned():
        return False
    try:
        encode(node)
    except ValueError:
        return False
    value = node.meta.get("val")
    return all(isinstance(item, Tensor) for item in (value if isinstance(value, (tuple, list)) else [value]))


def _autotuned() -> bool:
    """True where inductor may put a kernel of its own in the place of a library's matmul."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


# ------------------------------------------------------------------------------------------------ writing the plan
def emit(graph: fx.Graph, plan: Plan) -> list[str]:
    """Write the moves into the graph; returns the names of the tasks moved. A move without a place is left out."""
    moved = []
    main = _main(plan)
    for slot, one in enumerate(sorted(plan.moves, key=lambda item: item.fork)):
        node = plan.dag.tasks[one.task].nodes[0]
        place = _places(graph, plan, node, one, main)
        if place is not None:
            move(node, place.gate, place.join_before, slot, (place.gate, place.argument), place.after)
            moved.append(one.task)
    return moved


@dataclass(frozen=True)
class _Place:
    """Where a move stands in the graph."""

    gate: fx.Node
    """The call before which the fork stands,"""
    argument: fx.Node
    """its argument that passes through,"""
    join_before: fx.Node
    """the node before which the join stands, and"""
    after: list[fx.Node]
    """what the join waits for."""
    fork: int
    """The place of the gate in the program's order."""


def _places(graph: fx.Graph, plan: Plan, node: fx.Node, one: Move, main: list[str]) -> _Place | None:
    """The first place from the planned fork on; if there is none, the last one before it (the inputs are there, and a
    side task that starts too early is better than none); None if there is neither."""
    _hoist_inputs(node)
    _sink(node)
    position = {other: index for index, other in enumerate(graph.nodes)}
    index = plan.dag.index
    ready = max(position[other] for other in node.all_input_nodes)
    join = min((position[user] for user in _direct_readers(node)), default=len(position) - 1)
    calls = {name: plan.dag.tasks[name].nodes[0] for name in main}
    # A part made early may be back in its whole by now.
    calls = {name: call for name, call in calls.items() if call in position}
    opaque = {name: call for name, call in calls.items() if is_opaque(call)}
    # Fused work is no mark: `Dag.sunk` has put some of it behind where the graph has it.
    join = min([join, *(position[call] for name, call in opaque.items() if index[name] >= one.join)])
    late = [name for name in opaque if index[name] >= one.fork]
    early = [name for name in reversed(opaque) if index[name] < one.fork]
    for name in [*late, *early]:
        gate = opaque[name]
        if not _is_library(gate) or not ready < position[gate] < join:
            continue
        argument = gate_argument(gate, position, position[gate])
        if argument is None:
            continue
        between = opaque.values()
        last = max((n for n in between if position[gate] <= position[n] < join), key=position.__getitem__)
        nodes = list(graph.nodes)
        return _Place(gate, argument, nodes[join], _tensor_of(last, position, join), index[name])
    return None


def _is_library(node: fx.Node) -> bool:
    """True for a library's call, the only one that may be a gate: a collective works in its argument's own memory, and
    inductor would compile a kernel of ours anew for an argument that comes out of an opaque call, whose alignment it
    does not trust."""
    return str(node.target).startswith("aten.")


def _direct_readers(node: fx.Node) -> set[fx.Node]:
    """Users of a call, those of its getitems in the place of these."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= set(user.users) if user.target is operator.getitem else {user}
    return found


def _tensor_of(node: fx.Node, position: dict[fx.Node, int], before: int) -> list[fx.Node]:
    """A tensor that a call makes, as a list; empty if it has none that stands before a place."""
    if isinstance(node.meta.get("val"), Tensor):
        return [node]
    items = [user for user in node.users if user.target is operator.getitem and position[user] < before]
    return [item for item in items if isinstance(item.meta.get("val"), Tensor)][:1]


def _hoist_inputs(node: fx.Node) -> None:
    """Put the views that a call reads right behind what they are views of."""
    position = {other: index for index, other in enumerate(node.graph.nodes)}
    for argument in node.all_input_nodes:
        chain: list[fx.Node] = []
        while argument is not base_of(argument) and len(argument.all_input_nodes) == 1:
            chain.append(argument)
            argument = argument.all_input_nodes[0]
        if argument is not base_of(argument):
            continue
        last = _last_placeholder(node.graph) if argument.op == "placeholder" else argument
        for view in reversed(chain):
            if position[view] > position[last]:
                last.append(view)
            last = view


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return list(graph.find_nodes(op="placeholder"))[-1]


def _sink(node: fx.Node) -> None:
    """Put the views of a call's results, and the fused work on them, right before the first that reads it.

    As ``Dag.sunk`` has done with the tasks.
    """
    position = {other: index for index, other in enumerate(node.graph.nodes)}
    for user in sorted(node.users, key=position.__getitem__, reverse=True):
        if user.op == "call_function" and not is_opaque(user):
            _sink(user)
            if user.users:
                current = {other: index for index, other in enumerate(node.graph.nodes)}
                min(user.users, key=current.__getitem__).prepend(user)


def schedule_patches(
    patches: dict[str, object],
    log: ScheduleLog,
    split: Callable[[fx.Graph], list[Split]] = no_split,
    key: str = "",
    captured: bool = False,
) -> dict[str, object]:
    """`patches` (settings for ``torch._inductor.compile``) with the pass before what they have at its place.

    Args:
        patches: not changed.
        log: filled while graphs are compiled.
        split: takes calls apart of which the main stream needs a part early; see ``Split``.
        key: identity of `split` and of this package's sources, for inductor's caches.
        captured: the user captures what is compiled in a CUDA graph.
    """
    ours = SchedulePass(log, split, key, captured)
    theirs = patches.get(SEAM)
    if theirs is None:
        return {**patches, SEAM: chain_graph_passes(SEAM, ours)}
    return {**patches, SEAM: _Both(ours, theirs)}


class _Both(CustomGraphPass):
    """One pass, then another (which has the user's own before it)."""

    def __init__(self, first: SchedulePass, second: Any) -> None:
        self.first, self.second = first, second

    def __call__(self, graph: fx.Graph) -> None:
        """Run both."""
        self.first(graph)
        self.second(graph)

    def uuid(self) -> Any:
        """Both identities; None if the other has none."""
        other = self.second.uuid() if hasattr(self.second, "uuid") else None
        return None if other is None else (self.first.uuid(), other)


def forks(graph: fx.Graph) -> Iterable[str]:
    """The ops that a graph runs on the side stream, in the order of their forks."""
    for node in graph.nodes:
        if node.target is FORK:
            yield json.loads(str(node.args[1]))[0]
