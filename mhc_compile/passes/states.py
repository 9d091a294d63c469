"""The stream states of a graph, found by walking our ops: which post makes X_l, and who reads it.

Works on any graph that holds ``mhc::`` ops, widened or raised: nothing is remembered from the pass that put them there.
A state may be read through operations that are cheap and the same whenever they are run (a cast, a scale, a new
layout); these belong to the state and are replayed with it. Anything else between a post and the next site (a dropout,
a norm on the streams) ends the chain: the next one starts at its result.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from torch import fx

from mhc_compile import ops
from mhc_compile.capture.graph import user_line
from mhc_compile.cost import is_view, target_name, value_of

_SAME_AGAIN = frozenset("to float half bfloat16 double type type_as mul div truediv neg".split())


@dataclasses.dataclass(eq=False)
class State:
    """One stream state X_l and the site that reads it."""

    producer: fx.Node
    """What makes the value: the post before, the expand, or anything else for the first state of a chain."""
    post: fx.Node | None
    """The post that ends the site; None where only a head reads the state (a learned collapse)."""
    paths: list[fx.Node] = dataclasses.field(default_factory=list)
    """Operations between ``producer`` and the ops that read the state, in graph order."""
    pres: list[fx.Node] = dataclasses.field(default_factory=list)
    """The pre-mixes of this state, with or without the branch's norm."""
    coefficients: list[fx.Node] = dataclasses.field(default_factory=list)
    """Coefficients computed from this state."""
    shared: bool = False
    """True where another chain starts from the same value."""

    @property
    def output(self) -> fx.Node | None:
        """The branch output y that the post takes."""
        value = self.post.args[1] if self.post is not None else None
        return value if isinstance(value, fx.Node) else None

    @property
    def where(self) -> str:
        """``file:line`` of the site's add."""
        return user_line(self.post if self.post is not None else self.producer)

    @property
    def is_expanded(self) -> bool:
        """True where the state is made by our expand, from a value n times smaller."""
        return self.producer.target is ops.expand.overload


def find_states(graph: fx.Graph) -> list[list[State]]:
    """The states of every chain, first to last, chains in graph order."""
    states: dict[fx.Node, list[State]] = {}
    chains: list[list[State]] = []
    made_by: dict[fx.Node, State] = {}
    readers: dict[fx.Node, list[tuple[fx.Node, list[fx.Node]]]] = defaultdict(list)
    for node in graph.nodes:
        if node.target in (ops.pre.overload, ops.pre_norm.overload, ops.coefficients.overload):
            producer, path = origin(node.args[0])
            readers[producer].append((node, path))
        elif node.target is ops.post.overload:
            producer, path = origin(node.args[0])
            state = State(producer, node, list(path))
            before = made_by.get(producer)
            if before is not None and before.post is None:
                before.post, state = node, before
                _add(state.paths, path)
            elif before is not None:
                before.shared = state.shared = True
                chains.append([state])
                states[producer].append(state)
            else:
                chains.append([state])
                states[producer], made_by[producer] = [state], state
            after = State(node, None)
            states[node], made_by[node] = [after], after
            next(chain for chain in chains if chain[-1] is state).append(after)
    for producer, found in readers.items():
        for node, path in found:
            for state in states.get(producer, [])[:1]:
                (state.coefficients if node.target is ops.coefficients.overload else state.pres).append(node)
                _add(state.paths, path)
    for chain in chains:
        if not chain[-1].pres and not chain[-1].coefficients:
            chain.pop()  # only collapsed (or returned): nobody needs its value in the backward
    return chains


def origin(value: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What makes a state, and the operations from there to `value` that may be run again, in graph order."""
    path: list[fx.Node] = []
    node = value
    while _may_be_run_again(node):
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]  # checked to be a node
    return node, path[::-1]


def _may_be_run_again(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if not hasattr(value_of(node.args[0]), "shape") or not hasattr(value_of(node), "shape"):
        return False
    if target_name(node) == "getitem" or not (is_view(node) or target_name(node) in _SAME_AGAIN):
        return False
    others = [other for other in node.all_input_nodes if other is not node.args[0]]
    return all(other.op in ("placeholder", "get_attr") for other in others)


def _add(nodes: list[fx.Node], more: list[fx.Node]) -> None:
    nodes.extend(node for node in more if node not in nodes)
    nodes.sort()
