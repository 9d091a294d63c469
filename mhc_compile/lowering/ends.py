"""The two ends of a chain in the backward graph, where all streams are alike: nothing of n u is written for them.

The gradient of a `collapse` is the same row for every stream: the kernels that read it as dX' take the row. The
gradient of an `expand` is the sum over the streams: the kernel that makes dX of the first site adds up, rounding each
stream as it would be in memory first. The numbers are those of what is written out; dX has the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mhc_compile import ops

from .base import LoweringLog, arguments, fake
from .inline import give, replace

aten = torch.ops.aten
READERS = ("post_dots", "streams_backward", "site_boundary")
"""Kernels that take dX' [..., n, C], or one row [..., C] where every stream has the same."""
MOST_STREAMS = 4
"""Streams beside whose rows the registers hold their sum."""


def row_of(node: object) -> fx.Node | None:
    """[..., C] where `node` [..., n, C] is n copies of it, written out as `collapse` does; else None."""
    if not isinstance(node, fx.Node) or node.target is not aten.clone.default:
        return None
    spread = node.args[0]
    if not isinstance(spread, fx.Node) or spread.target is not aten.expand.default:
        return None
    inner = spread.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not aten.unsqueeze.default:
        return None
    row = inner.args[0]
    if not isinstance(row, fx.Node):
        return None
    shape, whole = fake(row).shape, fake(node).shape
    place = inner.args[1] % len(whole)  # type: ignore[operator]  # a dimension
    alike = len(whole) == len(shape) + 1 and place == len(whole) - 2
    return row if alike and whole[:-2] == shape[:-1] and whole[-1] == shape[-1] else None


def take_rows(graph: fx.Graph, log: LoweringLog) -> int:
    """Give the kernels the row in place of its copies, on a lowered graph; returns how many took one."""
    targets = {getattr(torch.ops.mhc_kernel, name).default for name in READERS if hasattr(torch.ops.mhc_kernel, name)}
    taken = 0
    for node in graph.nodes:
        if node.target in targets and (row := row_of(arguments(node)["grad"])) is not None:
            give(node, arguments(node) | {"grad": row})
            name = str(node.target).removeprefix("mhc_kernel.").removesuffix(".default")
            log.record("gradient of collapse", "fused", f"one row for all streams into {name}")
            taken += 1
    return taken


def sum_refusal(streams: Tensor) -> str:
    """Why `streams_backward` writes dX of a state [..., n, C] for every stream; empty if it adds up."""
    if streams.element_size() != 2 or streams.shape[-2] > MOST_STREAMS:
        return f"{streams.shape[-2]} streams of {streams.dtype}: another sum does not fit the registers"
    return ""


def sum_streams(graph: fx.Graph, log: LoweringLog) -> int:
    """Have `streams_backward` add up what only the gradient of an `expand` reads; returns how many do."""
    taken = 0
    for node in graph.nodes:
        if node.target is not ops.expand.backward_overload:
            continue
        source = node.args[0]
        if str(source.target) != "mhc_kernel.streams_backward.default" or len(source.users) != 1:
            continue
        if why := sum_refusal(fake(source)):
            log.record("gradient of expand", "two kernels", why)
            continue
        give(source, arguments(source) | {"summed": True})
        source.meta["val"] = node.meta["val"]
        replace(node, source)
        log.record("gradient of expand", "fused", "the sum over the streams into streams_backward")
        taken += 1
    return taken


__all__ = ["row_of", "sum_refusal", "sum_streams", "take_rows"]
