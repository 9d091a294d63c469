"""The part of a graph between the inputs and the outputs of a match, and what would go wrong if it vanished.

A region may be replaced only if nobody outside reads its inside, if what it writes in place has no second name, and if
it lies within one grad-mode region (a node moved out of ``no_grad`` changes gradients).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mhc_compile.patterns import reading


@dataclass(frozen=True)
class Region:
    """nodes: what computes the outputs from the inputs, in graph order; leaves: parameters and constants it also reads;
    inner: those nodes that depend on an input (the others only prepare parameters)."""

    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    inner: frozenset[fx.Node]


class GraphFacts:
    """Positions, static nodes, ancestry and storage of one graph, computed once per state of the graph."""

    def __init__(self, graph: fx.Graph, is_parameter: Any) -> None:
        self.order: dict[fx.Node, int] = {}
        self.static: set[fx.Node] = set()
        self.grad_mode: dict[fx.Node, object] = {}
        self._ancestors: dict[fx.Node, int] = {}
        self._fed: set[fx.Node] = set()
        """What is computed from a tensor that is an input of the graph and no parameter."""
        self._storage: dict[int, list[fx.Node]] = {}
        self._writes: list[tuple[fx.Node, int | None]] = []
        switches = [node.args[0] for node in graph.nodes if "_set_grad_enabled" in str(node.target)]
        mode: object = not switches[0] if switches else True  # Dynamo writes down changes only
        for index, node in enumerate(graph.nodes):
            self.order[node] = index
            mask = 1 << index
            for source in node.all_input_nodes:
                mask |= self._ancestors[source]
            self._ancestors[node] = mask
            if (
                node.op == "get_attr"
                or isinstance(reading.value(node), torch.SymFloat)  # a python float, under dynamic=True
                or (node.op == "placeholder" and is_parameter(node))
                or (node.op.startswith("call") and all(source in self.static for source in node.all_input_nodes))
            ):
                self.static.add(node)
            elif node.op == "placeholder":
                if reading.is_tensor(node):
                    self._fed.add(node)
            elif not self._fed.isdisjoint(node.all_input_nodes):
                self._fed.add(node)
            if "_set_grad_enabled" in str(node.target):
                mode = node.args[0]
            elif "inference_mode" in str(node.target):
                mode = str(node.target)
            self.grad_mode[node] = mode
            key = storage_key(node)
            if key is not None:
                self._storage.setdefault(key, []).append(node)
            if reading.writes(node) and node.all_input_nodes:
                self._writes.append((node, storage_key(node.all_input_nodes[0])))

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """True if ``node`` is ``source`` or is computed from it."""
        return bool(self._ancestors[node] >> self.order[source] & 1)

    def rests_on(self, node: fx.Node, roots: Iterable[fx.Node]) -> bool:
        """True if ``node`` is computed from ``roots``, parameters and constants alone."""
        stop, seen, stack = set(roots), set(), [node]
        mask = 0
        for root in stop:
            mask |= 1 << self.order[root]
        while stack:
            current = stack.pop()
            if current in stop or current in self.static or current in seen:
                continue
            if not self._ancestors[current] & mask:  # no root is above it: what feeds it decides
                if current in self._fed:
                    return False
                continue
            seen.add(current)
            stack.extend(current.all_input_nodes)
        return True

    def write_between(self, source: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """Who writes into the buffer of ``source`` after ``first`` and before ``last``; None if nobody does."""
        key = storage_key(source)
        for node, written in self._writes:
            if written == key and key is not None and self.order[first] < self.order[node] < self.order[last]:
                return node
        return None

    def second_name(self, node: fx.Node) -> fx.Node | None:
        """Who reads the buffer that an in-place node writes under another name, later; None if nobody does."""
        written = node.all_input_nodes[0]
        for name in self._storage.get(storage_key(written) or -1, []):
            if name.op in ("placeholder", "get_attr"):
                return name
            if self.order[name] < self.order[node]:
                for user in name.users:
                    if self.order.get(user, -1) > self.order[node]:
                        return user
        return None


def storage_key(node: fx.Node) -> int | None:
    """Identity of the (fake) storage behind a tensor node."""
    fake = reading.value(node)
    if not isinstance(fake, torch.Tensor):
        return None
    try:
        return fake.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor without storage, e.g. a sparse one
        return None


def relink_writes(graph: fx.Graph) -> None:
    """``x.div_(s)`` returns x: whoever reads x afterwards reads the result. Says so in the graph; changes no value."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        op = reading.read(node)
        if op is None or not op.inplace or not reading.is_tensor(op.args[0]):
            continue
        written = op.args[0]
        if reading.shape(written) == reading.shape(node) and reading.dtype(written) == reading.dtype(node):
            written.replace_all_uses_with(node, delete_user_cb=lambda user, now=order[node]: order[user] > now)


def region(outputs: Sequence[fx.Node], inputs: Sequence[fx.Node], facts: GraphFacts) -> Region:
    """Everything between ``inputs`` and ``outputs``, following the arguments backwards."""
    stop, seen, leaves = set(inputs), set[fx.Node](), set[fx.Node]()
    stack = [node for node in outputs if node not in stop]
    while stack:
        node = stack.pop()
        if node in seen or node in leaves:
            continue
        if node in stop or node.op in ("placeholder", "get_attr"):
            leaves.add(node)
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    nodes = sorted(seen, key=facts.order.__getitem__)
    inner: set[fx.Node] = set()
    for node in nodes:
        if any(source in stop or source in inner for source in node.all_input_nodes):
            inner.add(node)
    return Region(tuple(nodes), tuple(sorted(leaves, key=facts.order.__getitem__)), frozenset(inner))


def obstacle(part: Region, outputs: Sequence[fx.Node], facts: GraphFacts) -> tuple[str, fx.Node] | None:
    """Why a region cannot be taken out, with the node to blame; None if it can."""
    members = set(part.nodes)
    for node in part.nodes:
        # What prepares parameters, and a view or copy of an input, is no intermediate result: others may read it.
        if node not in part.inner or (node not in outputs and reading.strip(node) in part.leaves):
            continue
        if node not in outputs:
            for user in node.users:
                if user not in members:
                    return f"an intermediate result is also read by `{user.name}`", node
        op = reading.read(node)
        if op is not None and op.inplace:
            other = facts.second_name(node)
            if other is not None:
                return f"an in-place write whose buffer has a second name, `{other.name}`", node
        if facts.grad_mode[node] != facts.grad_mode[outputs[-1]]:
            return "it spans a change of grad mode", node
    last = min(outputs, key=facts.order.__getitem__)
    for leaf in part.leaves:
        writer = facts.write_between(leaf, part.nodes[0], last)
        if writer is not None and writer not in members:
            return f"an input is written in place by `{writer.name}` before the op would read it", writer
    return None
