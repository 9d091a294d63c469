"""How far a residual stream goes: which values are still the stream, and what cuts the way to the others.

One step of a trace is one node. Linear operations keep the stream, a product with weights ends it, anything else is a
*barrier* in it. Under ``post_norm="per_stream"`` a norm is no barrier, whether it is one call or spelled out: the
widening applies it to every stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import fx

from mhc_compile.capture.graph import meta_value
from mhc_compile.capture.mutation import op_name
from mhc_compile.passes.roles import LINEAR, NORM, RANDOM, WEIGHTED, Roles

_REDUCTIONS = frozenset("mean sum norm vector_norm var var_mean std".split())
_ROOTS = frozenset("rsqrt sqrt var var_mean std".split())


@dataclasses.dataclass(frozen=True)
class Trace:
    """Where a value comes from along the stream: the last sum, the way from it, and what cuts the way."""

    root: fx.Node
    path: frozenset[fx.Node] = frozenset()
    barrier: fx.Node | None = None
    barrier_role: str = ""


def follow(node: fx.Node, traces: Mapping[fx.Node, Trace], roles: Roles, *, per_stream: bool) -> Trace | None:
    """The trace of ``node`` from those of its inputs; None if no one stream goes on in it.

    Args:
        node: any node of the graph.
        traces: the traces of the nodes before it.
        roles: of the same graph.
        per_stream: True where norms on the stream are applied to every stream.
    """
    if not isinstance(meta_value(node), (torch.Tensor, tuple, list)):
        return None
    found = [traces[arg] for arg in roles.values(node) if arg in traces]
    if not found:
        return None
    role = roles.role(node)
    roots = {trace.root for trace in found}
    if role == WEIGHTED or len(roots) > 1:
        return None
    barrier = next(((t.barrier, t.barrier_role) for t in found if t.barrier is not None), None)
    if barrier is None and role != LINEAR and not (role == NORM and per_stream):
        barrier = (node, role)
    if barrier is None and len(found) > 1 and op_name(node) in ("mul", "imul", "div", "truediv", "matmul"):
        barrier = (node, "non-linear")
    root = next(iter(roots))
    path = frozenset().union(*(t.path for t in found), {node})
    if barrier is None or (per_stream and barrier[1] != RANDOM and _is_whole_norm(root, path, node)):
        return Trace(root, path)
    return Trace(root, path if per_stream and barrier[1] != RANDOM else frozenset(), *barrier)


def carried(
    gm: fx.GraphModule, source: fx.Node, roles: Roles, *, per_stream: bool
) -> dict[fx.Node, frozenset[fx.Node]]:
    """``source`` and every value that its stream is carried to without a barrier, each with the nodes on the way."""
    traces = {source: Trace(source)}
    for node in gm.graph.nodes:
        trace = follow(node, traces, roles, per_stream=per_stream) if node not in traces else None
        if trace is not None:
            traces[node] = trace
    return {node: trace.path for node, trace in traces.items() if trace.barrier is None}


def _is_whole_norm(root: fx.Node, path: frozenset[fx.Node], last: fx.Node) -> bool:
    """True when a spelled-out norm is complete: its scale (1/rms or the like) has been applied to the stream again."""
    names = {op_name(node) for node in path}
    if not names & _REDUCTIONS or not names & _ROOTS or op_name(last) not in ("mul", "div", "truediv"):
        return False
    value = meta_value(last)
    operands = [meta_value(arg) for arg in last.all_input_nodes if arg is root or arg in path]
    return len(operands) == 2 and all(isinstance(v, torch.Tensor) and v.dim() == value.dim() for v in operands)
