"""Which sites of a backward graph one call of `replay_normed` rebuilds, and what it need not write.

A run is what `replay` finds: `post` after `post` whose branch outputs and coefficients stand before the first of them.
A block of a recompute plan is such a run: its boundary state is saved, so the next block's run begins anew. All that a
call makes is there from its place on, that of its first `post` at the start of the block, where a call a site would
make it as well: no more is live at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import replay, replay_normed
from .base import LoweringLog, arguments
from .inline import give, insert_function, replace
from .replay import MOST

Site = tuple[fx.Node, fx.Node | None]
"""A `post`, and the `pre_norm` of what it makes."""
_SHARED = ("kind", "eps", "offset", "round_first", "keep")
"""Attributes of `mhc::pre_norm` that the norms of one call have in common."""


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """One kernel serves both norms."""
    first, second = arguments(a), arguments(b)
    same = all(first[name] == second[name] for name in _SHARED)
    return same and all((first[name] is None) == (second[name] is None) for name in ("weight", "bias"))


def find(graph: fx.Graph) -> list[list[Site]]:
    """Two to `MOST` sites after one another, at least one of them with a norm, that need nothing computed between them.
    Changes nothing."""
    found: list[list[Site]] = []
    for run in replay.find(graph):
        parts: list[list[Site]] = [[]]
        for post in run:
            norm = replay.reader(post, run[0], "pre_norm")
            last = next((other for _, other in reversed(parts[-1]) if other is not None), None)
            unlike = norm is not None and last is not None and not _alike(last, norm)
            if unlike or len(parts[-1]) == MOST:
                parts.append([])
            parts[-1].append((post, norm))
        found += [part for part in parts if len(part) > 1 and any(norm is not None for _, norm in part)]
    return found


def merge(graph: fx.Graph, log: LoweringLog, refused: Callable[[str, dict[str, Any]], str]) -> int:
    """Replace every part of a run by one call; returns how many. `refused(name, named)` gives the reason why no kernel
    takes a node."""
    calls = 0
    for part in find(graph):
        norms = [norm for _, norm in part if norm is not None]
        if any(refused("post", arguments(post)) for post, _ in part):
            continue
        if any(refused("pre_norm", arguments(norm)) for norm in norms):
            continue
        reason = replay_normed.refusal(part[0][0].meta["val"])
        if reason:
            log.record("replay", "a kernel a site", reason)
            continue
        _replace(part)
        log.record("replay", "fused", f"{len(part)} sites, {len(norms)} with the norm of the branch input")
        calls += 1
    return calls


def _replace(part: list[Site]) -> None:
    named = [arguments(post) for post, _ in part]
    norms = [norm for _, norm in part if norm is not None]
    after = [arguments(norm) for norm in norms]
    first = named[0]
    mixes = [] if first["h_res"] is None else [each["h_res"] for each in named]
    weights, biases = ([each[name] for each in after if each[name] is not None] for name in ("weight", "bias"))
    outputs = insert_function(
        part[0][0], torch.ops.mhc_kernel.replay_normed.default,
        (first["streams"], [each["y"] for each in named], [each["h_post"] for each in named], mixes,
         first["transpose"], [norm is not None for _, norm in part], [True] * len(part),
         [each["h_pre"] for each in after], weights, biases, *(after[0][name] for name in _SHARED)),
    )  # fmt: skip
    for index, norm in enumerate(norms):
        replace(norm, outputs[len(part) + 3 * index : len(part) + 3 * index + 3])
    for (post, _), state in reversed(list(zip(part, outputs[: len(part)], strict=True))):
        replace(post, state)


def drop_unread(graph: fx.Graph) -> int:
    """Have no call write a state that nobody reads, once it is known what the backward reads; returns how many."""
    graph.eliminate_dead_code()
    dropped = 0
    for node in graph.nodes:
        if node.target is not torch.ops.mhc_kernel.replay_normed.default:
            continue
        named = arguments(node)
        read = {user.args[1] for user in node.users if user.target is operator.getitem}
        written = [wanted and index in read for index, wanted in enumerate(named["written"])]
        if written != named["written"]:
            dropped += sum(named["written"]) - sum(written)
            give(node, named | {"written": written})
            values = node.meta["val"]
            states = [value if wanted else value.new_empty(0) for value, wanted in zip(values, written, strict=False)]
            node.meta["val"] = [*states, *values[len(written) :]]
    return dropped


__all__ = ["drop_unread", "find", "merge"]
