"""The norm of the flattened streams, before or after the projection, weighted or not.

    rms          x * rsqrt(mean(x^2) + eps) · x / sqrt(mean(x^2) + eps) · F.rms_norm(x) · (x phi) * rsqrt(...)
    rms_outside  x / (|x| / sqrt(nC) + eps)

It runs over all streams and channels of a token at once; a norm of each stream on its own is another function, and is
refused with that reason. A weight is handed on, to be folded into phi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes
from mhc_compile.patterns.base import Refused
from mhc_compile.patterns.reading import Op, read, strip

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

    def covers(self, before: fx.Node, after: fx.Node) -> bool:
        """True if a reduction took away exactly the streams and the channels; Refused if the channels alone."""
        gone = set(self.axes.atoms(before)) - set(self.axes.atoms(after))
        streams, channels = (set(self.axes.resolve((atom,))) for atom in (self.stream, self.channel))
        if gone == channels:
            raise Refused(WHAT, "the norm is taken of each stream on its own, not of all streams of a token", after)
        return gone == streams | channels

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
        gone = {atom for i in op.dims for atom in dims[i]}
        whole = {*streams.axes.resolve((streams.stream,)), *streams.axes.resolve((streams.channel,))}
        if gone != whole:
            raise Refused(WHAT, "the norm is taken of each stream on its own, not of all streams of a token", node)
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
    if not streams.covers(op.args[0], total) or (size is not None and size != _width(streams)):
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
    return streams.covers(norm.args[0], strip(op.args[0])) and math.isclose(factor, math.sqrt(_width(streams)))


def _width(streams: Streams) -> int:
    """n * C."""
    size = streams.axes.size
    return int(size(streams.stream)) * int(size(streams.channel))


def describe(node: fx.Node) -> str:
    """The name of what a node calls, for a reason."""
    return reading.called_name(node)[0] or str(getattr(node.target, "__name__", node.target))
