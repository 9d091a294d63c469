"""Keep the projection of a site for the backward and none of its coefficients: ``leave`` on the joint graph, ``merge``
and ``gather`` on the two that AOTAutograd's partitioner makes of it.

A recompute plan that wants it tags ``mhc::coefficients`` with `TAG`. In the joint graph every reader of pre, post and
res, forward and backward, is then given the results of an ``mhc::activate`` of the projection, which has to be
recomputed; the projection has to be saved. So the partitioner hands K + 1 numbers a token to the backward in place of
2 K + 1, and puts gates and Sinkhorn, never the product with phi, where the backward first wants them. In the forward
graph both ops are there, one behind the other, and are made the one that they come from: its kernels and fusions are
those of a plan that keeps the coefficients.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import ops

from .base import BACKWARD_TARGETS, VIEWS, arguments, fake, origin
from .inline import faking

TAG = CheckpointPolicy.PREFER_SAVE
"""On the coefficients of a plan that keeps the logits alone (those of one that keeps both are MUST_SAVE). Where nobody
acts on it, it is what partitioners do with our ops anyway: they save what they read of them."""

PROJECTION = 3
"""Which of the results of ``mhc::coefficients``."""


def result_of(node: fx.Node, index: int) -> fx.Node:
    """The node that picks a result of a call with several; made right behind the call if nobody has."""
    found = [user for user in node.users if user.target is operator.getitem and user.args[1] == index]
    if found:
        return found[0]
    with node.graph.inserting_after(node):
        made = node.graph.call_function(operator.getitem, (node, index))
    made.meta.update(origin(node), val=node.meta["val"][index])
    return made


def leave(graph: fx.Graph) -> int:
    """In a joint graph: give the readers of tagged coefficients what `activate` makes of the projection; returns how
    many coefficients there were. A graph without a backward of ours is left alone."""
    if not any(node.target in BACKWARD_TARGETS for node in graph.nodes):
        return 0
    found = [node for node in graph.nodes if node.target is ops.coefficients.overload]
    found = [node for node in found if node.meta.get("recompute") == TAG]
    for node in found:
        _leave(node)
    return len(found)


def _leave(node: fx.Node) -> None:
    graph, save = node.graph, CheckpointPolicy.MUST_SAVE
    projection = result_of(node, PROJECTION)
    node.append(projection)  # in front of whoever reads another result
    for kept in (node, projection):
        _tag(kept, save)
    named = arguments(node)
    args = (projection, *(value for name, value in named.items() if name not in ("x", "phi")))
    read = [user for user in node.users if user is not projection]
    with graph.inserting_after(projection):
        again = graph.call_function(ops.activate.overload, args)
    again.meta.update(_forward(node), val=_value(again))
    _tag(again, CheckpointPolicy.MUST_RECOMPUTE)
    for user in read:
        index: Any = user.args[1]
        if index == PROJECTION:
            user.replace_all_uses_with(projection)
            graph.erase_node(user)
            continue
        with graph.inserting_after(again):
            part = graph.call_function(operator.getitem, (again, index))
        part.meta.update(_forward(user), val=again.meta["val"][index])
        _tag(part, CheckpointPolicy.MUST_RECOMPUTE)
        user.replace_all_uses_with(part)
        graph.erase_node(user)


def _tag(node: fx.Node, policy: CheckpointPolicy) -> None:
    node.meta["recompute"] = policy
    node.meta.pop("ac_graph_id", None)  # else the ends of a checkpoint of the user's count


def _forward(node: fx.Node) -> dict[str, Any]:
    """What AOTAutograd has noted of a forward node."""
    found = origin(node)
    return found | {key: node.meta[key] for key in ("partitioner_tag", "custom") if key in node.meta}


def _value(node: fx.Node) -> Any:
    """The fake results of a call, of its own."""
    values = [fake(value) for value in node.args]
    with faking(values), torch.no_grad():
        return node.target(*values)  # type: ignore[operator]  # an overload


def merge(graph: fx.Graph) -> int:
    """In a partitioned graph: `activate` of a projection that is computed there becomes the coefficients that computed
    it; returns how many. In the backward, where the projection is an input, nothing changes."""
    count = 0
    for node in [node for node in graph.nodes if node.target is ops.activate.overload]:
        source = _made_here(node)
        if source is None:
            continue
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(result_of(source, index))
            graph.erase_node(user)
        graph.erase_node(node)
        count += 1
    return count


def _made_here(node: fx.Node) -> fx.Node | None:
    """The coefficients, of the same parameters and attributes, whose projection an `activate` reads."""
    named = arguments(node)
    projection = named.pop("projection")
    if projection.target is not operator.getitem or projection.args[1] != PROJECTION:
        return None
    source = projection.args[0]
    if not isinstance(source, fx.Node) or source.target is not ops.coefficients.overload:
        return None
    theirs = arguments(source)
    same = all(theirs[name] is value or (not isinstance(value, fx.Node) and theirs[name] == value)
               for name, value in named.items())  # fmt: skip
    return source if same else None


def gather(graph: fx.Graph) -> int:
    """In a backward graph: what is made again for a run of replayed states, `post` after `post`, and for the norms of
    their branch inputs, goes in front of the first of them; returns how many calls moved.

    The partitioner puts each right before its reader, between two states. One call replays several states only if they
    need nothing computed between them. No more is live than the plan counts: it has a block's coefficients from the
    block's start.
    """
    first: dict[Any, fx.Node] = {}
    moved = 0
    for node in list(graph.nodes):
        if node.target not in (ops.post.overload, ops.pre_norm.overload):
            continue
        state = node.args[0]
        head = first.get(state)
        needed = _needed(node, state, head) if head is not None else None
        if node.target is ops.post.overload:
            first[node] = node if head is None or needed is None else head
        for other in needed or []:
            first[state].prepend(other)
            moved += other.target is ops.activate.overload
    return moved


def _needed(node: fx.Node, state: Any, head: fx.Node) -> list[fx.Node] | None:
    """What a call reads beside a state that stands behind `head`, if it is coefficients made again from what stands
    before it: their calls and results, in order. None if there is anything else."""
    found: set[fx.Node] = set()
    for value in node.all_input_nodes:
        if value is state or value < head:
            continue
        path = [value]
        while path[-1].target is operator.getitem or path[-1].target in VIEWS:
            path.append(path[-1].args[0])  # type: ignore[arg-type]  # the value picked from, or seen
        made = path[-1]
        if made.target is not ops.activate.overload:
            return None
        if not made < head and any(not source < head for source in made.all_input_nodes):
            return None
        found |= {other for other in path if not other < head}
    return sorted(found)


__all__ = ["TAG", "gather", "leave", "merge"]
