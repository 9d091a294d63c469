"""The partitioned graph as a dependency graph of tasks with costs.

A task is what becomes one launch: an *opaque* call (a matmul, an attention, a custom op: inductor calls it as it is),
or a group of element-wise and reducing operations that inductor will fuse. Groups are guessed: operations that feed
each other and have the same number of opaque calls behind them on the longest way are one group, whose traffic is what
enters and leaves it. Contracting such a group makes no cycle: a way out of it and back in would pass through an opaque
call and come back with a higher number.

Costs are seconds of ``cost.py``; a caller that has measured a kind of task passes its own estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import networkx
import torch
from torch import fx

from mhc_compile.cost import Device, Work, bytes_of, is_view, target_name, work

_OPAQUE_ATEN = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm", "_scaled_mm")
COMMUNICATION = ("_c10d_functional", "c10d_functional")


def is_opaque(node: fx.Node) -> bool:
    """True for a call that inductor makes as it is and fuses nothing into."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace not in ("aten", "prims"):
        return True
    name = target_name(node)
    return name in _OPAQUE_ATEN or "attention" in name


def kind_of(node: fx.Node) -> str:
    """``matmul``, ``attention``, ``attention_backward``, ``wait`` (for a collective), ``communication``, ``memory``
    (fused element-wise work), or the name of a custom op such as ``library.op``."""
    if not is_opaque(node):
        return "memory"
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)  # is_opaque says so
    name = target_name(node)
    if target.namespace in COMMUNICATION:
        return "wait" if name == "wait_tensor" else "communication"
    if target.namespace != "aten":
        return f"{target.namespace}.{name}"
    if "attention" in name:
        return "attention_backward" if "backward" in name else "attention"
    return f"aten.{name}.{target._overloadname}" if target._overloadname == "dtype" else "matmul"


@dataclass
class Task:
    """One launch."""

    name: str
    seconds: float
    kind: str = "memory"
    bytes: int = 0
    """Read and written."""
    nodes: list[fx.Node] = field(default_factory=list)
    """In the order of the graph; empty in a hand-made graph."""


class Dag:
    """Tasks and what waits for what. ``order`` is the order of the program, a topological one."""

    def __init__(self, tasks: Iterable[Task] = (), edges: Iterable[tuple[str, str]] = ()) -> None:
        self.graph = networkx.DiGraph()
        self.tasks: dict[str, Task] = {}
        for task in tasks:
            self.add(task)
        for source, target in edges:
            self.graph.add_edge(source, target)
        index = self.index
        problem = next((edge for edge in self.graph.edges if index[edge[0]] >= index[edge[1]]), None)
        if problem is not None:
            raise ValueError(f"{problem[1]} stands before {problem[0]}, which it waits for")

    def add(self, task: Task) -> None:
        """Append a task to the program."""
        if task.name in self.tasks:
            raise ValueError(f"two tasks are called {task.name}")
        self.tasks[task.name] = task
        self.graph.add_node(task.name)

    @property
    def order(self) -> list[str]:
        """Names in the order of the program."""
        return list(self.tasks)

    @property
    def index(self) -> dict[str, int]:
        """Place of each task in the program."""
        return {name: index for index, name in enumerate(self.tasks)}

    def before(self, name: str) -> set[str]:
        """What a task waits for directly."""
        return set(self.graph.predecessors(name))

    def after(self, name: str) -> set[str]:
        """What waits for a task directly."""
        return set(self.graph.successors(name))

    def total(self) -> float:
        """Seconds of all tasks one behind the other."""
        return sum(task.seconds for task in self.tasks.values())

    def earliest(self) -> dict[str, float]:
        """Start of each task with any number of streams and no contention."""
        start: dict[str, float] = {}
        for name in self.tasks:
            start[name] = max((start[one] + self.tasks[one].seconds for one in self.before(name)), default=0.0)
        return start

    def span(self) -> float:
        """Seconds of the critical path."""
        start = self.earliest()
        return max((start[name] + task.seconds for name, task in self.tasks.items()), default=0.0)

    def slack(self) -> dict[str, float]:
        """How much later than at the earliest each task may start without making the critical path longer."""
        start, end = self.earliest(), self.span()
        latest: dict[str, float] = {}
        for name in reversed(self.order):
            done = min((latest[one] for one in self.after(name)), default=end)
            latest[name] = done - self.tasks[name].seconds
        return {name: latest[name] - start[name] for name in self.tasks}

    def critical_path(self) -> list[str]:
        """One longest chain of tasks, first to last."""
        start = self.earliest()
        end = {name: start[name] + task.seconds for name, task in self.tasks.items()}
        path = [max(end, key=lambda name: end[name])] if end else []
        while before := self.before(path[0]) if path else set():
            path.insert(0, max(sorted(before), key=lambda name: end[name]))
        return path

    def sunk(self, names: Iterable[str]) -> Dag:
        """The same program with the fused work that hangs on these tasks put off until somebody reads it.

        A side task has time until its first reader; where that is a handful of additions whose result is wanted much
        later, the additions wait too.
        """
        order, late = self.order, set(names)
        follows: set[str] = set()
        for name in order:
            if self.tasks[name].kind == "memory" and self.before(name) & (late | follows):
                follows.add(name)
        for name in reversed(self.order):
            if name in follows:
                order.remove(name)
                at = min((order.index(one) for one in self.after(name)), default=len(order))
                order.insert(at, name)
        return Dag([self.tasks[name] for name in order], self.graph.edges)


def base_of(node: fx.Node) -> fx.Node:
    """What a view is a view of (a getitem counts as one); any other node itself."""
    while node.op == "call_function" and is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def readers(node: fx.Node) -> set[fx.Node]:
    """Who reads a node, behind views."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= readers(user) if user.op == "call_function" and is_view(user) else {user}
    return found


def _groups(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """The nodes of each task, in the order of the graph; views are in none."""
    depth: dict[fx.Node, int] = {}
    group: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.op != "call_function" or is_view(node):
            continue
        sources = [one for one in map(base_of, node.all_input_nodes) if one in group]
        depth[node] = max((depth[one] + is_opaque(one) for one in sources), default=0)
        group[node] = [node]
        for one in sources:
            fusible = not (is_opaque(node) or is_opaque(one)) and depth[one] == depth[node]
            if fusible and group[one] is not group[node]:
                group[one].extend(group[node])
                for member in group[node]:
                    group[member] = group[one]
    place = {node: index for index, node in enumerate(nodes)}
    unique = {id(members): sorted(members, key=place.__getitem__) for members in group.values()}
    return list(unique.values())


def _work(members: list[fx.Node]) -> Work:
    """What enters and leaves a task, and its arithmetic."""
    if len(members) == 1:
        return work(members[0])
    inside = set(members)
    read = {base_of(one) for node in members for one in node.all_input_nodes} - inside
    written = [node for node in members if not readers(node) <= inside]
    return Work(sum(map(bytes_of, read)), sum(map(bytes_of, written)), sum(work(node).flops for node in members))


def from_graph(
    graph: fx.Graph, device: Device, estimate: Callable[[str, int], float | None] = lambda kind, size: None
) -> Dag:
    """The tasks of a partitioned ATen graph (nodes with ``meta["val"]``).

    Args:
        graph: not changed.
        device: whose costs.
        estimate: (kind, bytes) -> measured seconds of a task of that kind, None where nothing was measured.

    A task's name is that of its first node. Views, getitems among them, are no tasks: who reads one waits for what it
    is a view of.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    tasks: list[Task] = []
    owner: dict[fx.Node, Task] = {}
    for members in _groups(list(graph.nodes)):
        cost, kind = _work(members), kind_of(members[-1])
        measured = estimate(kind, cost.bytes)
        seconds = cost.seconds(device) if measured is None else measured
        task = Task(members[0].name, 0.0 if kind == "wait" else seconds, kind, cost.bytes, members)
        tasks.append(task)
        owner.update(dict.fromkeys(members, task))
    waits: networkx.DiGraph = networkx.DiGraph()
    by_name = {task.name: task for task in tasks}
    waits.add_nodes_from(by_name)
    for task in tasks:
        for source in (base_of(one) for node in task.nodes for one in node.all_input_nodes):
            if source in owner and owner[source] is not task:
                waits.add_edge(owner[source].name, task.name)
    # A group is launched when its last node can be: it stands where that one stands.
    last = {task.name: place[task.nodes[-1]] for task in tasks}
    order = networkx.lexicographical_topological_sort(waits, key=last.__getitem__)
    return Dag([by_name[name] for name in order], waits.edges)
