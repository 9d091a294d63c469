"""The coefficients of a site: norm, projection, split, affine, activation and Sinkhorn become one op.

The matcher starts at the gates that ``mix`` found on a state and walks down each of them:

    gate    scale * act(logits) + eps            sinkhorn(logits) | logits
    logits  (rows start:stop of the projection) / r * alpha + bias
    rows    linear | matmul | einsum of the (normalised) streams with phi

Gates that rest on one projection must take all of its rows; their order is the layout. Separate projections are put
together into one phi. Where the norm of the projection's input is none of ours, the op starts behind it (norm "none").
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mhc_compile import ops
from mhc_compile.ops.spec import CoefficientSpec, SinkhornSpec
from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes, Dim, Dims, flat, without
from mhc_compile.patterns.base import Candidate, Editor, Refused, arrange, in_dtype
from mhc_compile.patterns.mix import State
from mhc_compile.patterns.reading import read, strip
from mhc_compile.patterns.region import GraphFacts
from mhc_compile.patterns.stream_norm import Norm, Streams, describe, read_inverse, read_length, read_normalised

WHAT = "coefficients"
PARTS = ("pre", "post", "res")


@dataclass(frozen=True)
class Piece:
    """Rows start:start+length of a parameter, all of it where length is None."""

    node: fx.Node
    start: int = 0
    length: int | None = None

    def cut(self, start: int, length: int) -> Piece:
        """A part of this piece."""
        return Piece(self.node, self.start + start, length)


@dataclass
class Part:
    """One gate, read down to its projection: scale * act((rows of phi x / r) * number * alpha + bias) + eps."""

    role: str
    output: fx.Node
    act: str = "linear"
    scale: float = 1.0
    eps: float = 0.0
    sinkhorn: fx.Node | None = None
    number: float = 1.0
    alpha: fx.Node | None = None
    bias: Piece | None = None
    rows: tuple[int, int] | None = None
    """(first row, number of rows) of the projection; None until a slice or the projection itself says so."""
    axis: Dim = ()
    """The axis of these rows; cut into (row, column) by the view that makes a matrix of them."""
    norm: Norm = field(default_factory=Norm)
    source: fx.Node | None = None
    """What is projected, where it is not the state itself."""
    phi: fx.Node | None = None
    total: int = 0
    """Rows of phi."""


# --- walking down a gate ---------------------------------------------------------------------------------------------


def read_part(role: str, output: fx.Node, streams: Streams) -> Part:
    """Read a gate down to its projection; Refused with the first thing that does not fit."""
    part = Part(role, output)
    streams.axes.dims(output)
    node = strip(output)
    op = read(node)
    if op is not None and op.kind == "cast":  # the last rounding is the op's dtype, anything earlier is not
        node = strip(op.args[0])
    if role == "res":
        op = read(node)
        if op is not None and op.kind == "sinkhorn":
            part.sinkhorn = node
            node = op.args[0]
    else:
        node = _read_activation(node, part)
    _read_logits(node, part, streams)
    return part


def _read_activation(node: fx.Node, part: Part) -> fx.Node:
    """scale * sigmoid(logits) + eps; without a sigmoid the gate is linear, and numbers belong to the logits."""
    start, scale, eps = node, 1.0, 0.0
    while True:
        node = strip(node)
        op = read(node)
        if op is not None and op.kind == "sigmoid":
            part.act, part.scale, part.eps = "sigmoid", scale, eps
            return op.args[0]
        if op is None or op.kind not in ("add", "mul", "div") or len(op.nodes) != 1:
            return start
        number = float(next(x for x in op.args if not isinstance(x, fx.Node)))
        if op.kind == "add":
            eps += scale * number
        elif op.kind == "mul":
            scale *= number
        elif op.args[0] is op.nodes[0]:
            scale /= number
        else:
            return start
        node = op.nodes[0]


def _read_logits(node: fx.Node, part: Part, streams: Streams) -> None:
    """rows / r * alpha + bias, from the outside in."""
    while True:
        node = strip(node)
        op = read(node)
        if op is None:
            raise Refused(WHAT, f"the {part.role} logits pass through `{describe(node)}`", node)
        if op.kind == "slice":
            start, length = part.rows or (0, op.length)
            part.rows = (op.start + start, length)
            part.axis = part.axis or streams.axes.dims(node)[op.dims[0]]
            node = op.args[0]
        elif op.kind == "add" and len(op.nodes) == 2:
            node = _read_bias(node, op.args, part, streams)
        elif op.kind in ("mul", "div"):
            node = _read_factor(node, op.kind, op.args, part, streams)
        elif op.kind in ("linear", "matmul", "einsum"):
            if op.kind == "linear" and op.args[2] is not None:
                _set_bias(part, op.args[2], node)
            _read_projection(node, op.args[0], op.args[1], part, streams)
            return
        else:
            raise Refused(WHAT, f"the {part.role} logits pass through `{describe(node)}`", node)


def _set_bias(part: Part, bias: fx.Node, node: fx.Node) -> None:
    if part.bias is not None:
        raise Refused(WHAT, f"the {part.role} logits have two biases", node)
    if part.alpha is not None or part.number != 1.0 or part.norm.kind != "none":
        raise Refused(WHAT, f"the {part.role} bias is scaled together with the logits", node)
    piece = Piece(bias)
    inner = read(strip(bias))
    if inner is not None and inner.kind == "slice" and inner.dims == (0,):
        piece = Piece(strip(inner.args[0]), inner.start, inner.length)
    part.bias = piece if part.rows is None or reading.shape(bias)[-1:] == () else piece.cut(*part.rows)


def _read_bias(node: fx.Node, args: Sequence[Any], part: Part, streams: Streams) -> fx.Node:
    for bias, rest in (args, args[::-1]):
        if bias in streams.static:
            _set_bias(part, bias, node)
            return rest
    raise Refused(WHAT, f"the {part.role} logits are a sum of two things that depend on the input", node)


def _read_factor(node: fx.Node, kind: str, args: Sequence[Any], part: Part, streams: Streams) -> fx.Node:
    for factor, rest in (args[::-1], args) if kind == "mul" else (args[::-1],):
        if not isinstance(rest, fx.Node):
            continue
        if not isinstance(factor, fx.Node):
            part.number *= float(factor) if kind == "mul" else 1.0 / float(factor)
            return rest
        if factor in streams.static:
            if part.alpha is not None or kind == "div" or reading.value(factor).numel() != 1:
                raise Refused(WHAT, f"the {part.role} logits are scaled by more than one number", node)
            part.alpha = strip(factor)
            return rest
        norm = read_inverse(factor, streams) if kind == "mul" else read_length(factor, streams)
        if norm is not None:
            part.norm = norm
            return rest
    raise Refused(WHAT, f"the {part.role} logits are multiplied by what is no norm of the streams", node)


def _read_projection(node: fx.Node, a: fx.Node, b: fx.Node, part: Part, streams: Streams) -> None:
    """The contraction of the streams with phi."""
    source, phi = (a, b) if strip(b) in streams.static or b in streams.static else (b, a)
    if phi not in streams.static and strip(phi) not in streams.static:
        raise Refused(WHAT, f"{part.role} comes from `{describe(node)}`, which is no projection of the streams", node)
    result = streams.axes.dims(node)
    try:
        norm = read_normalised(source, streams)
    except Refused:
        norm = None
    if norm is not None and "none" not in (norm.kind, part.norm.kind):
        raise Refused(WHAT, "the streams are normalised twice", node)
    part.phi = strip(phi)
    if norm is None:
        part.source = strip(source)
    elif norm.kind != "none":
        part.norm = norm
    atoms = set(streams.axes.atoms(source)) & set(streams.axes.atoms(part.phi))
    whole = {*streams.axes.resolve((streams.stream,)), *streams.axes.resolve((streams.channel,))}
    if atoms != whole:
        raise Refused(WHAT, f"{part.role} comes from `{describe(node)}`, which is no projection of the streams", node)
    own = [atom for atom in flat(result) if atom in streams.axes.atoms(part.phi)]
    part.total = math.prod(streams.axes.size(atom) for atom in own)
    part.axis = part.axis or tuple(own)
    part.rows = part.rows or (0, part.total)


# --- putting the parts together --------------------------------------------------------------------------------------


def _layout(parts: Sequence[Part], n: int) -> list[Part]:
    """The parts in the order of their rows; Refused if they leave rows of a projection to somebody else."""
    sizes = {"pre": n, "post": n, "res": n * n}
    for part in parts:
        if part.rows is None or part.rows[1] != sizes[part.role]:
            raise Refused(WHAT, f"{part.role} does not take {sizes[part.role]} rows of the projection", part.output)
        if part.source is not parts[0].source or part.norm != parts[0].norm:
            raise Refused(WHAT, "the gates rest on differently normalised streams", part.output)
    shared = len({part.phi for part in parts}) == 1
    ordered = sorted(parts, key=lambda part: part.rows if shared and part.rows else (PARTS.index(part.role), 0))
    end = 0
    for part in ordered:
        first, count = part.rows or (0, 0)
        if first != (end if shared else 0) or (not shared and count != part.total):
            raise Refused(WHAT, f"rows from {end} on of the projection are used for something else", part.output)
        end += count
    if shared and end != ordered[0].total:
        raise Refused(WHAT, f"rows from {end} on of the projection are used for something else", ordered[-1].output)
    return ordered


def _specify(parts: Sequence[Part], n: int) -> CoefficientSpec:
    roles = {part.role: part for part in parts}
    acts = {part.act for part in parts if part.role != "res"}
    if len(acts) > 1:
        raise Refused(WHAT, "pre and post have different activations", parts[0].output)
    pre, post, res = (roles.get(role) for role in PARTS)
    wanted = {reading.dtype(part.output) for part in (post, res) if part is not None}
    return CoefficientSpec(
        layout=",".join(part.role for part in parts),
        streams=n,
        norm=parts[0].norm.kind,  # type: ignore[arg-type]  # one of the literals by construction
        norm_eps=parts[0].norm.eps,
        gate=acts.pop() if acts else "sigmoid",  # type: ignore[arg-type]  # "sigmoid" or "linear"
        pre_scale=pre.scale if pre else 1.0,
        pre_eps=pre.eps if pre else 0.0,
        post_scale=post.scale if post else 1.0,
        post_eps=post.eps if post else 0.0,
        res="none" if res is None else ("linear" if res.sinkhorn is None else "sinkhorn"),
        sinkhorn=SinkhornSpec.from_op_arguments(res.sinkhorn.kwargs) if res and res.sinkhorn else None,
        mix_dtype=wanted.pop() if len(wanted) == 1 and wanted <= {torch.bfloat16, torch.float16} else None,
    )


def find(states: Sequence[State], facts: GraphFacts) -> Iterator[Candidate | Refused]:
    """The coefficients of every state that has gates, or why they stay as they are."""
    for state in states:
        if not state.gates:
            continue
        axes = Axes()
        stream, channel = state.name(axes)
        streams = Streams(state.names, axes, stream, channel, facts.static)
        parts: list[Part] = []
        for output, role in state.gates.items():
            if output in facts.static:
                continue  # a gate that is a parameter needs no coefficients
            try:
                parts.append(read_part(role, output, streams))
            except Refused as refusal:
                yield refusal
        if parts:
            try:
                yield candidate(parts, state, streams)
            except Refused as refusal:
                yield refusal


def candidate(parts: Sequence[Part], state: State, streams: Streams) -> Candidate:
    """The op that a site's gates become; Refused if they do not fit one set of attributes."""
    axes = streams.axes
    if len({part.role for part in parts}) != len(parts):
        raise Refused(WHAT, "a state has two gates of one kind", parts[-1].output)
    (i,), (c,) = axes.resolve((streams.stream,)), axes.resolve((streams.channel,))
    n = int(axes.size(i))
    ordered = _layout(parts, n)
    spec = _specify(ordered, n)
    batch = without(axes.dims(state.node), (i, c))
    source = ordered[0].source or state.node
    layouts = {part.role: _result_axes(part, axes, batch) for part in ordered}
    outputs = tuple(part.output for part in parts)

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        x = arrange(edit, axes, source, axes.dims(source), (*batch, (i,), (c,)))
        phi = _phi(edit, axes, ordered, (i, c))
        bias = _bias(edit, axes, ordered, phi)
        alphas = {part.role: _alpha(edit, part, phi) for part in ordered}
        first = next(iter(alphas.values()))
        result = edit.call(
            ops.coefficients.overload,
            x,
            phi,
            bias,
            alphas.get("pre", first),
            alphas.get("post"),
            alphas.get("res"),
            **spec.op_arguments(),
        )
        values = []
        for part in parts:
            item = edit.call(operator.getitem, result, PARTS.index(part.role))
            item = arrange(edit, axes, item, layouts[part.role], axes.dims(part.output))
            values.append(in_dtype(edit, item, reading.dtype(part.output)))
        return tuple(values)

    return Candidate(
        WHAT, outputs, (*state.names, *((source,) if source is not state.node else ())), build, (), {"spec": spec}
    )


def _result_axes(part: Part, axes: Axes, batch: Dims) -> Dims:
    """Axes of the op's result for a part: [..., n], or [..., n, n] with the rows of phi in row-major order."""
    own = axes.resolve(part.axis)
    if part.role != "res":
        return (*batch, own)
    if len(own) != 2:
        raise Refused(WHAT, "the res logits are not made a matrix of n x n", part.output)
    if part.sinkhorn is not None and axes.dims(part.sinkhorn)[-2:] != ((own[0],), (own[1],)):
        raise Refused(WHAT, "the res logits are transposed before the Sinkhorn", part.output)
    return (*batch, (own[0],), (own[1],))


# --- building the arguments ------------------------------------------------------------------------------------------


def _phi(edit: Editor, axes: Axes, parts: Sequence[Part], token: Dim) -> fx.Node:
    """phi [K, n * C]: one weight as it is, or the weights of several projections one below the other."""
    rows = []
    for phi in dict.fromkeys(part.phi for part in parts):
        assert phi is not None
        own = tuple(atom for atom in axes.atoms(phi) if atom not in token)
        rows.append(arrange(edit, axes, phi, axes.dims(phi), (own, token)))
    result = rows[0] if len(rows) == 1 else edit.call(torch.cat, rows, 0)
    weight = parts[0].norm.weight
    if weight is None:
        return result
    flat_weight = weight if len(reading.shape(weight)) == 1 else edit.method("flatten", weight)
    return edit.call(torch.mul, result, flat_weight)


def _bias(edit: Editor, axes: Axes, parts: Sequence[Part], phi: fx.Node) -> fx.Node:
    """bias [K]: the parameter itself where the parts split all of it in order, else its pieces put together."""
    pieces = [part.bias for part in parts]
    nodes = {piece.node if piece is not None else None for piece in pieces}
    (only,) = nodes if len(nodes) == 1 else (None,)
    starts = [piece.start for piece in pieces if piece is not None and piece.length is not None]
    whole = (sum(part.rows[1] for part in parts if part.rows),)
    in_order = len(starts) == len(parts) and starts == [part.rows[0] for part in parts if part.rows]
    if only is not None and in_order and reading.shape(only) == whole:
        return strip(only)
    if only is not None and len(parts) == 1 and pieces[0] is not None and pieces[0].length is None:
        return _flat(edit, strip(only))
    flat_pieces = []
    for part, piece in zip(parts, pieces, strict=True):
        count = part.rows[1] if part.rows else 0
        if piece is None:
            like = reading.value(phi)
            flat_pieces.append(edit.call(torch.zeros, count, dtype=like.dtype, device=like.device))
        elif piece.length is None:
            flat_pieces.append(_flat(edit, strip(piece.node)))
        else:
            flat_pieces.append(edit.method("narrow", _flat(edit, strip(piece.node)), 0, piece.start, piece.length))
    return flat_pieces[0] if len(flat_pieces) == 1 else edit.call(torch.cat, flat_pieces, 0)


def _flat(edit: Editor, node: fx.Node) -> fx.Node:
    return node if len(reading.shape(node)) == 1 else edit.method("flatten", node)


def _alpha(edit: Editor, part: Part, phi: fx.Node) -> fx.Node:
    """The scale of a part as a tensor of one element."""
    if part.alpha is None:
        like = reading.value(phi)
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return edit.call(torch.full, (), part.number, dtype=wide, device=like.device)
    return part.alpha if part.number == 1.0 else edit.call(torch.mul, part.alpha, part.number)
