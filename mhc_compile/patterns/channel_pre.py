"""Pre-apply with a gate for every channel: the branch input of sites whose weights are of low rank.

    u = scale * sum_i sigmoid(silu(vec(X) down^T * inner) up^T)_i * X_i          scale: a mean has 1/n

X is a stream state, or the norm of each of its streams (``stream_norm``), and the gate must be made of the very X that
it multiplies. Products, transposed weights and the layout of the streams are read over named axes, as in ``mix``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mhc_compile import ops
from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes, without
from mhc_compile.patterns.base import Candidate, Editor, Refused, arrange, in_dtype, last_cast
from mhc_compile.patterns.mix import State
from mhc_compile.patterns.reading import Op, read, strip
from mhc_compile.patterns.stream_norm import describe

WHAT = "channel_pre"


@dataclass(frozen=True)
class Gate:
    """The weights of a gate per channel and the numbers around them."""

    down: fx.Node
    up: fx.Node
    inner: float
    outer: float


def find(
    graph: fx.Graph, states: Sequence[State], normed: dict[fx.Node, State], static: set[fx.Node]
) -> Iterator[Candidate | Refused]:
    """The sums over streams with a gate per channel; ``normed`` says of which state a node is the norm."""
    of = {**{name: state for state in states for name in state.names}, **normed}
    for node in graph.nodes if of else ():
        weighted = _weighted_sum(node)
        if weighted is None:
            continue
        scale, factors = weighted
        for streams, gate in (factors, factors[::-1]):
            source = strip(streams)
            state = of.get(source)
            if state is None or strip(gate) in of:
                continue
            try:
                read_gate = _gate(gate, source, static)
                found = None if read_gate is None else _candidate(node, source, state, gate, read_gate, scale)
            except Refused as refusal:
                yield refusal
                break
            if found is not None:
                state.per_channel = True
                yield found
                break


def _weighted_sum(node: fx.Node) -> tuple[float, tuple[fx.Node, fx.Node]] | None:
    """(1 for a sum, 0 for a mean, whose number the axes tell; the factors) of a sum of products of two tensors."""
    op = read(node)
    if op is None:
        return None
    if op.kind == "einsum":
        return (1.0, (op.nodes[0], op.nodes[1])) if len(op.nodes) == 2 else None
    if op.kind not in ("sum", "mean"):
        return None
    product = read(strip(op.args[0]))
    if product is None or product.kind != "mul" or len(product.nodes) != 2:
        return None
    return float(op.kind == "sum"), (product.nodes[0], product.nodes[1])


def _numbers(node: fx.Node) -> tuple[float, fx.Node, Op | None]:
    """(product of the numbers that a node is multiplied by, the node below, its meaning)."""
    factor = 1.0
    while True:
        node = strip(node)
        op = read(node)
        if op is None or op.kind not in ("mul", "div") or len(op.nodes) != 1:
            return factor, node, op
        number = float(next(arg for arg in op.args if not isinstance(arg, fx.Node)))
        if op.kind == "div" and op.args[0] is not op.nodes[0]:
            return factor, node, op
        factor = factor * number if op.kind == "mul" else factor / number
        node = op.nodes[0]


def _product(op: Op | None, static: set[fx.Node]) -> tuple[Any, fx.Node] | None:
    """(input, weight) of a product with a weight, no bias."""
    if op is None or op.kind not in ("linear", "matmul", "einsum") or len(op.nodes) != 2:
        return None
    a, b = op.nodes
    if strip(b) in static:
        return a, strip(b)
    return (b, strip(a)) if strip(a) in static and op.kind != "linear" else None


def _gate(gate: fx.Node, source: fx.Node, static: set[fx.Node]) -> Gate | None:
    """The gate of ``source``; None if it is none of low rank, Refused if it is one that the op does not compute."""
    outer, node, op = _numbers(gate)
    act = op.kind if op is not None and op.kind in ("sigmoid", "tanh", "relu", "softplus", "silu") else ""
    own = node
    upper = _product(read(strip(op.args[0])) if act and op is not None else op, static)
    if upper is None:
        return None
    hidden = strip(upper[0])
    op = read(hidden)
    between = op.kind if op is not None and op.kind in reading.UNARY else ""
    inner, node, op = _numbers(op.args[0] if between and op is not None else hidden)
    lower = _product(op, static)
    if lower is None or strip(lower[0]) is not source:
        return None
    if act != "sigmoid":
        raise Refused(WHAT, f"the gate per channel ends in {act or 'no activation'}, not in sigmoid", own)
    if between != "silu":
        raise Refused(WHAT, f"there is {between or 'no activation'} between the weights of the gate, not silu", hidden)
    return Gate(lower[1], upper[1], inner, outer)


def _candidate(
    node: fx.Node, source: fx.Node, state: State, gate: fx.Node, parts: Gate, summed: float
) -> Candidate | None:
    axes = Axes()
    i, c = state.name(axes)
    out = axes.dims(node)
    axes.dims(gate)
    (i,), (c,) = axes.resolve((i,)), axes.resolve((c,))
    have = axes.dims(source)
    if set(axes.atoms(source)) - set(axes.atoms(node)) != {i} or c not in axes.atoms(node):
        return None
    ranks = [set(axes.atoms(weight)) - {i, c} for weight in (parts.down, parts.up)]
    if ranks[0] != ranks[1] or len(ranks[0]) != 1 or any(len(axes.atoms(w)) != 3 for w in (parts.down, parts.up)):
        raise Refused(WHAT, f"`{describe(strip(gate))}` is no gate of low rank over all streams and channels", gate)
    (rank,) = ranks[0]
    batch = without(have, (i, c))
    names = last_cast(node)
    wanted = reading.dtype(names[-1])
    scale = parts.outer * (1.0 if summed else 1.0 / float(axes.size(i)))

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        x = arrange(edit, axes, source, have, (*batch, (i,), (c,)))
        if reading.is_lossless(names[-1], x):
            x = in_dtype(edit, x, wanted)
        down = arrange(edit, axes, parts.down, axes.dims(parts.down), ((rank,), (i, c)))
        up = arrange(edit, axes, parts.up, axes.dims(parts.up), ((i, c), (rank,)))
        result = edit.call(ops.channel_pre.overload, x, down, up, parts.inner, scale)
        result = edit.call(operator.getitem, result, 0)
        return (in_dtype(edit, arrange(edit, axes, result, (*batch, (c,)), out), wanted),)

    inputs = (source, *(name for name in state.names if name is not source))  # a cast may ask the state for its type
    return Candidate(WHAT, names[-1:], inputs, build, names[:-1])
