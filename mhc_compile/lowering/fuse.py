"""Fusions over several semantic ops on a partitioned graph, each pattern, check, replace.

`merge_stream_gradients`: the gradient of a stream state arrives as a sum of what came through post, through pre and
through the coefficients, each a tensor of n u, added pairwise. The sum becomes one call that reads 3 n + 1 u and writes
n u; the three backward ops keep only their small results.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from . import ends, kernels
from .base import TARGETS, LoweringLog, arguments, device_of
from .inline import give, insert_function, replace

_STATE_ARGUMENT = {
    "post_backward": "streams",
    "pre_backward": "streams",
    "pre_norm_backward": "streams",
    "coefficients_backward": "x",
}
_SLOT = {"post_backward": "post", "pre_backward": "pre", "pre_norm_backward": "pre", "coefficients_backward": "x"}
"""Backward op -> the terms of the merged gradient that it gives; a sum has each of them once."""
_ADD = torch.ops.aten.add.Tensor


@dataclass
class StreamGradient:
    """One sum to be merged: its last addition, the backward ops that feed it, and what else is added."""

    root: fx.Node
    state: fx.Node
    sources: dict[str, fx.Node] = field(default_factory=dict)
    """Slot -> the node of the backward op."""
    others: list[fx.Node] = field(default_factory=list)


def _leaves(root: fx.Node) -> list[fx.Node]:
    """The addends of a tree of additions; an inner sum that is used elsewhere counts as one addend."""
    found: list[fx.Node] = []
    stack = [node for node in reversed(root.args) if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if _is_sum(node) and len(node.users) == 1:
            stack.extend(value for value in reversed(node.args) if isinstance(value, fx.Node))
        else:
            found.append(node)
    return found


def _is_sum(node: fx.Node) -> bool:
    """A plain addition of two tensors of one shape and dtype."""
    if node.target is not _ADD or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return False
    values = [node.meta["val"], *(arg.meta["val"] for arg in node.args if isinstance(arg, fx.Node))]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    return all(value.shape == values[0].shape and value.dtype == values[0].dtype for value in values)


def _source(leaf: fx.Node) -> tuple[str, fx.Node] | None:
    """(name, node) where the leaf is the stream gradient, used once, of one of our backward ops."""
    if leaf.target is not operator.getitem or leaf.args[1] != 0 or len(leaf.users) != 1:
        return None
    node = leaf.args[0]
    if not isinstance(node, fx.Node) or TARGETS.get(node.target) not in _STATE_ARGUMENT:
        return None
    return TARGETS[node.target], node


def find_stream_gradients(graph: fx.Graph) -> list[StreamGradient]:
    """Sums of at least two of our stream gradients of one state, that kernels can compute. Changes nothing."""
    found = []
    for root in graph.nodes:
        if not _is_sum(root) or any(_is_sum(user) and len(root.users) == 1 for user in root.users):
            continue
        merged: StreamGradient | None = None
        for leaf in _leaves(root):
            source = _source(leaf)
            if source is None:
                if merged is None:
                    merged = StreamGradient(root, root)
                merged.others.append(leaf)
                continue
            name, node = source
            named = arguments(node)
            state = named[_STATE_ARGUMENT[name]]
            if merged is None or (not merged.sources and merged.state is root):
                merged = StreamGradient(root, state, others=merged.others if merged is not None else [])
            slot = _SLOT[name]
            if slot in merged.sources or state is not merged.state or kernels.refusal(name, named):
                merged.others.append(leaf)
            else:
                merged.sources[slot] = node
        if merged is not None and len(merged.sources) >= 2:
            found.append(merged)
    return found


def _without_stream_gradient(node: fx.Node) -> None:
    """Tell a backward op that nobody wants its first result any more."""
    named = arguments(node)
    give(node, named | {"needs": [False, *named["needs"][1:]]})


def _split(node: fx.Node, pieces: Callable[..., tuple[Tensor, ...]], results: int) -> list[Any]:
    """Replace a backward op by `pieces` of its arguments: first its own `results`, then what the merged gradient needs,
    whose nodes are returned."""
    outputs = insert_function(node, pieces, list(arguments(node).values()))
    replace(node, list(outputs[:results]))
    return list(outputs[results:])


def merge_stream_gradients(graph: fx.Graph, log: LoweringLog) -> int:
    """Replace every sum found by one `mhc_kernel::streams_backward`; returns how many."""
    from . import boundary, pre_norm

    merged = find_stream_gradients(graph)
    for item in merged:
        grad = h_res = du = h_pre = dm = phi = multiple = None
        transpose = False
        feeders = [TARGETS[node.target] for node in item.sources.values()]
        if "post" in item.sources:
            node = item.sources["post"]
            named = arguments(node)
            grad, h_res, transpose = named["grad"], named["h_res"], named["transpose"]
            _without_stream_gradient(node)
        if "pre" in item.sources:
            node = item.sources["pre"]
            named = arguments(node)
            name, h_pre, du = TARGETS[node.target], named["h_pre"], named["grad"]
            _without_stream_gradient(node)
            if name == "pre_norm_backward":
                (du,) = _split(node, pre_norm.pieces, 4)
                log.record(name, "triton")
        if "x" in item.sources:
            node = item.sources["x"]
            _without_stream_gradient(node)
            dm, phi, multiple = _split(node, boundary.coefficients_pieces, 6)
            log.record("coefficients_backward", "triton")
        with graph.inserting_before(item.root):
            total = graph.call_function(
                torch.ops.mhc_kernel.streams_backward.default,
                (item.state, grad, h_res, transpose, du, h_pre, dm, phi, multiple),
            )
            total.meta.update(val=item.root.meta["val"])
            for other in item.others:
                value = item.root.meta["val"]
                total = graph.call_function(_ADD, (total, other))
                total.meta.update(val=value)
        item.root.replace_all_uses_with(total)
        log.record("streams gradient", "fused", " + ".join(sorted(feeders)))
    graph.eliminate_dead_code()
    return len(merged)


def run(graph: fx.Graph, log: LoweringLog, fuses: Callable[[str], bool] = lambda name: True) -> None:
    """All fusions that are on, in order."""
    names = {TARGETS.get(node.target) for node in graph.nodes}
    if fuses("few_tokens") and "coefficients" in names and not names & set(_STATE_ARGUMENT):
        some = next(node for node in graph.nodes if TARGETS.get(node.target) == "coefficients")
        if not kernels.platform_refusal(device_of(arguments(some))):
            from . import few_tokens

            few_tokens.merge(graph, log, kernels.refusal)
    if fuses("ends") and {"post", "collapse"} <= names:
        from . import post_collapse

        post_collapse.merge(graph, log, kernels.refusal)
    # States of the forward that the backward graph rebuilds, with what the branches read of them.
    if fuses("replay") and {"post", "pre_norm"} <= names and names & set(_STATE_ARGUMENT):
        from . import replay_runs

        replay_runs.merge(graph, log, kernels.refusal)
    if fuses("post_pre_norm") and {"post", "pre_norm"} <= names:
        from . import post_pre_norm

        post_pre_norm.merge(graph, log, kernels.refusal)
    if fuses("replay") and "post" in names and names & set(_STATE_ARGUMENT):
        from . import replay

        replay.merge(graph, log, kernels.refusal)
    if fuses("stream_gradient") and names & set(_STATE_ARGUMENT):
        merge_stream_gradients(graph, log)
    if fuses("ends") and "expand_backward" in names:
        ends.sum_streams(graph, log)
