"""Gradients that arrive as a sum: a kernel that reads one reads its addends instead.

What flows back into the norm of a branch is the sum over the matrices that read it (q, k and v; gate and up). Written
out, the sum costs a kernel that reads two or three tensors and writes one, which our kernel reads again: 2 u more.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .base import VIEWS, LoweringLog, arguments
from .inline import give

MOST = 3
"""Addends that `mhc_kernel::pre_norm_dots` takes."""


def _below_views(node: fx.Node) -> fx.Node:
    """The node under views that nobody else reads and that keep the last dimension: the same rows in the same order."""
    width = node.meta["val"].shape[-1]
    while node.target in VIEWS and len(node.users) == 1:
        below = node.args[0]
        if not isinstance(below, fx.Node) or below.meta["val"].shape[-1:] != (width,):
            break
        node = below
    return node


def addends(node: fx.Node, most: int) -> list[fx.Node]:
    """At most `most` nodes whose sum `node` is; the node itself where it is no sum that only one reads."""
    top = _below_views(node)
    if top.target is not torch.ops.aten.add.Tensor or top.kwargs or len(top.users) != 1 or most < 2:
        return [node]
    left, right = top.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return [node]
    values = [part.meta["val"] for part in (top, left, right)]
    if any(not isinstance(value, Tensor) or value.shape != values[0].shape for value in values):
        return [node]
    if any(value.dtype != values[0].dtype for value in values):
        return [node]
    first = addends(left, most - 1)
    return [*first, *addends(right, most - len(first))]


def take_addends(graph: fx.Graph, log: LoweringLog) -> int:
    """Give every `pre_norm_dots` the addends of its gradient; returns how many sums went."""
    from . import pre_norm  # noqa: F401  # registers the op

    taken = 0
    target = torch.ops.mhc_kernel.pre_norm_dots.default
    for node in graph.nodes:
        if node.target is not target:
            continue
        named = arguments(node)
        parts = [_below_views(part) for part in addends(named["grad"], MOST)]
        if len(parts) == 1 or named["second"] is not None:
            continue
        named.update(zip(("grad", "second", "third"), parts, strict=False))
        give(node, named)
        log.record("gradient sum", "fused", f"{len(parts)} addends into pre_norm_backward")
        taken += 1
    return taken


__all__ = ["addends", "take_addends"]
