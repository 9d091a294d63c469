"""The norms of the streams, before or after the projection, weighted or not.

    rms          x * rsqrt(mean(x^2) + eps) · x / sqrt(mean(x^2) + eps) · F.rms_norm(x) · (x phi) * rsqrt(...)
    rms_outside  x / (|x| / sqrt(nC) + eps)

The norm of ``coefficients`` runs over all streams and channels of a token at once; its weight is handed on, to be
folded into phi. A norm of each stream on its own is another function, refused there with that reason: on a state it
becomes ``mhc::stream_norm``, and what reads it starts behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import ops
from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes, without
from mhc_compile.patterns.base import Candidate, Editor, Refused, arrange, in_dtype, last_cast
from mhc_compile.patterns.reading import Op, read, strip

if TYPE_CHECKING:
    from mhc_compile.patterns.mix import State

WHAT = "coefficients"


@dataclass(frozen=True)
class Norm:
    """kind and eps as in ``CoefficientSpec``; weight is a static node of n·C elements or None."""

    kind: str = "none"
    eps: float = 0.0
    weight: fx.Node | None = None


@dataclass(frozen=True)
class Streams:
    """The state that a norm may be taken of: the nodes that stand for it and its atoms."""

    names: tuple[fx.Node, ...]
    axes: Axes
    stream: int
    channel: int
    static: frozenset[fx.Node] | set[fx.Node]
    each: bool = False
    """Read norms of each stream on its own instead."""

    def covers(self, before: fx.Node, after: fx.Node) -> bool:
        """True if a reduction took away exactly the streams and the channels; Refused if the channels alone.

        With ``each``: True for the channels alone.
        """
        return self.takes(set(self.axes.atoms(before)) - set(self.axes.atoms(after)), after)

    def takes(self, gone: set[int], after: fx.Node) -> bool:
        """``covers`` for axes that are known by name."""
        streams, channels = (set(self.axes.resolve((atom,))) for atom in (self.stream, self.channel))
        if self.each:
            return gone == channels
        if gone == channels:
            raise Refused(WHAT, "the norm is taken of each stream on its own, not of all streams of a token", after)
        return gone == streams | channels

    def width(self) -> int:
        """Elements that a norm runs over: n * C, or C."""
        size = self.axes.size
        return int(size(self.channel)) * (1 if self.each else int(size(self.stream)))

    def is_state(self, node: fx.Node) -> bool:
        """True if a node is the state, up to views and casts."""
        return strip(node) in self.names


def read_normalised(node: fx.Node, streams: Streams) -> Norm | None:
    """The norm that a node applied to the state; ``none`` for the state itself, None for anything else."""
    node = strip(node)
    if node in streams.names:
        return Norm()
    op = read(node)
    if op is None:
        return None
    if op.kind == "rms_norm" and streams.is_state(op.args[0]):
        dims = streams.axes.dims(op.args[0])
        if not streams.takes({atom for i in op.dims for atom in dims[i]}, node):
            return None
        if streams.each and op.args[1] is not None:
            streams.axes.pin(op.args[1], tuple(dims[i] for i in op.dims))
        return Norm("rms", op.number or 0.0, op.args[1])
    if op.kind not in ("mul", "div") or len(op.nodes) != 2:
        return None
    for a, b in (op.args, op.args[::-1]) if op.kind == "mul" else (op.args,):
        if streams.is_state(a):
            return read_inverse(b, streams) if op.kind == "mul" else read_length(b, streams)
        if op.kind == "mul" and strip(b) in streams.static:
            inner = read_normalised(a, streams)
            if inner is not None and inner.weight is None and inner.kind != "none":
                return Norm(inner.kind, inner.eps, b)
    return None


def read_inverse(node: fx.Node, streams: Streams) -> Norm | None:
    """1 / r as a factor."""
    op = read(strip(node))
    if op is None or not op.nodes:
        return None
    if op.kind == "rsqrt":
        eps = _mean_square(op.args[0], streams)
        return None if eps is None else Norm("rms", eps)
    return read_length(op.args[0], streams) if op.kind == "reciprocal" else None


def read_length(node: fx.Node, streams: Streams) -> Norm | None:
    """r itself, as a divisor."""
    op = read(strip(node))
    if op is None or not op.nodes:
        return None
    if op.kind == "sqrt":
        eps = _mean_square(op.args[0], streams)
        return None if eps is None else Norm("rms", eps)
    eps = 0.0
    if op.kind == "add" and len(op.nodes) == 1:
        eps = _number(op)
        op = read(strip(op.nodes[0]))
    return Norm("rms_outside", eps) if op is not None and _is_length(op, streams) else None


def _number(op: Op) -> float:
    return float(next(arg for arg in op.args if not isinstance(arg, fx.Node)))


def _mean_square(node: fx.Node, streams: Streams) -> float | None:
    """eps of mean(x^2) + eps over the whole token; None if the node is something else."""
    op, eps, current = read(strip(node)), 0.0, strip(node)
    if op is not None and op.kind == "add" and len(op.nodes) == 1:
        eps, current = _number(op), strip(op.nodes[0])
        op = read(current)
    if op is None:
        return None
    total, size = current, None
    if op.kind in ("div", "mul") and len(op.nodes) == 1 and isinstance(op.args[0], fx.Node):
        size = _number(op) if op.kind == "div" else 1.0 / _number(op)
        total = strip(op.args[0])
        op = read(total)
    if op is None or op.kind != ("mean" if size is None else "sum"):
        return None
    square = read(strip(op.args[0]))
    if square is None or square.kind != "square" or not streams.is_state(square.args[0]):
        return None
    if not streams.covers(op.args[0], total) or (size is not None and size != streams.width()):
        return None
    return eps


def _is_length(op: Op, streams: Streams) -> bool:
    """True for |x| / sqrt(nC): the root of the mean square without an eps inside."""
    if op.kind == "sqrt":
        return _mean_square(op.args[0], streams) == 0.0
    if op.kind not in ("div", "mul") or len(op.nodes) != 1 or not isinstance(op.args[0], fx.Node):
        return False
    factor = _number(op) if op.kind == "div" else 1.0 / _number(op)
    norm = read(strip(op.args[0]))
    if norm is None or norm.kind != "norm" or norm.number != 2 or not streams.is_state(norm.args[0]):
        return False
    return streams.covers(norm.args[0], strip(op.args[0])) and math.isclose(factor, math.sqrt(streams.width()))


def describe(node: fx.Node) -> str:
    """The name of what a node calls, for a reason."""
    return reading.called_name(node)[0] or str(getattr(node.target, "__name__", node.target))


# --- the norm of each stream, as an op -------------------------------------------------------------------------------


def find_each(
    graph: fx.Graph, states: Iterable[State], static: set[fx.Node]
) -> tuple[list[Candidate], dict[fx.Node, State]]:
    """The norms of each stream of a state that has a site: candidates, and which state each of their nodes is of."""
    of = {name: state for state in states for name in state.names}
    if not of:
        return [], {}
    found: list[Candidate] = []
    normed: dict[fx.Node, State] = {}
    inside: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        inner = _unweighted(node, static)
        state = None if node in inside else _state_below(node, of) or (inner and _state_below(inner, of))
        candidate = _each(node, state, static) if state else None
        if state and candidate:
            found.append(candidate)
            normed.update(dict.fromkeys((*candidate.names, *candidate.outputs), state))
            inside.update([inner] if inner else [])  # the same norm without its weight is a part of this one
    return found[::-1], normed


def _unweighted(node: fx.Node, static: set[fx.Node]) -> fx.Node | None:
    """What a node multiplies by a weight."""
    op = read(node)
    if op is None or op.kind != "mul" or len(op.nodes) != 2:
        return None
    own, other = (strip(arg) for arg in op.args)
    return own if other in static and own not in static else (other if own in static else None)


def _state_below(node: fx.Node, of: dict[fx.Node, State]) -> State | None:
    """The state that a product or a norm is made of."""
    op = read(node)
    if op is None or op.kind not in ("mul", "div", "rms_norm"):
        return None
    return next((of[strip(below)] for below in op.nodes if strip(below) in of), None)


def _each(node: fx.Node, state: State, static: set[fx.Node]) -> Candidate | None:
    axes = Axes()
    stream, channel = state.name(axes)
    norm = read_normalised(node, Streams(state.names, axes, stream, channel, static, each=True))
    if norm is None or norm.kind != "rms":
        return None
    out = axes.dims(node)
    (i,), (c,) = axes.resolve((stream,)), axes.resolve((channel,))
    offset, weight = _offset(norm.weight)
    own = set(axes.atoms(weight)) if weight is not None else {c}
    if own - {i} != {c} or {i, c} - set(axes.atoms(node)):
        return None
    batch = without(out, (i, c))
    names = last_cast(node)
    wanted = reading.dtype(names[-1])

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        x = arrange(edit, axes, state.node, axes.dims(state.node), (*batch, (i,), (c,)))
        if reading.is_lossless(names[-1], x):
            x = in_dtype(edit, x, wanted)
        gain = weight
        if gain is not None:
            gain = arrange(edit, axes, gain, axes.dims(gain), ((i,), (c,)) if i in own else ((c,),))
            gain = gain if i in own else edit.method("expand", gain, int(axes.size(i)), -1)
        result = edit.call(ops.stream_norm.overload, x, gain, offset, norm.eps)
        # It costs one pass over the streams and is as large as they are: replayed, as inductor replays the spelling.
        result.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return (in_dtype(edit, arrange(edit, axes, result, (*batch, (i,), (c,)), out), wanted),)

    return Candidate("stream_norm", names[-1:], state.names, build, names[:-1])


def _offset(weight: fx.Node | None) -> tuple[float, fx.Node | None]:
    """(offset, w) of a weight that is spelled offset + w."""
    op = None if weight is None else read(strip(weight))
    if op is not None and op.kind == "add" and len(op.nodes) == 1:
        return _number(op), strip(op.nodes[0])
    return 0.0, None if weight is None else strip(weight)
