"""The two ends of the carrier: the copy of x to n streams, and the mean or sum that makes one stream of them.

    expand    x.unsqueeze(-2).expand(..., n, C) · x.repeat(1, 1, n) · torch.stack([x] * n, -2), then any copy of it
    collapse  X.mean(-2) · X.sum(-2)

Both are only taken around a state that a site has; a collapse by weights is a ``pre`` (see ``mix``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from mhc_compile import ops
from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes, without
from mhc_compile.patterns.base import Candidate, Editor, arrange, in_dtype
from mhc_compile.patterns.mix import State
from mhc_compile.patterns.reading import read, strip


def find(graph: fx.Graph, states: Sequence[State]) -> Iterator[Candidate]:
    """The expansions that states come from, and the means and sums over their streams."""
    of = {name: state for state in states for name in state.names}
    for state in states:
        found = read_expand(state)
        if found is not None:
            yield found
    for node in graph.nodes:
        op = read(node)
        if op is not None and op.kind in ("mean", "sum") and strip(op.args[0]) in of:
            found = read_collapse(node, op.kind, op.args[0], of[strip(op.args[0])])
            if found is not None:
                yield found


def read_expand(state: State) -> Candidate | None:
    """``mhc::expand`` in the place of the node that copies one stream to all of them."""
    node = state.node
    op = read(node)
    if op is None or op.kind not in ("expand", "repeat", "stack"):
        return None
    source = strip(op.args[0])
    axes = Axes()
    axes.pin(source)
    out = axes.dims(node)
    out = axes.split_like(out, state.sizes)  # a flat state [..., n * C] is cut where its site cuts it
    atoms = tuple(atom for dim in out for atom in dim)
    if len(atoms) <= max(state.stream, state.channel):
        return None
    i, c = atoms[state.stream], atoms[state.channel]
    if set(atoms) - set(axes.atoms(source)) != {i}:
        return None
    batch = without(out, (i, c))

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        x = arrange(edit, axes, source, axes.dims(source), (*batch, (c,)))
        streams = edit.call(ops.expand.overload, x, axes.size(i))
        return (in_dtype(edit, arrange(edit, axes, streams, (*batch, (i,), (c,)), out), reading.dtype(node)),)

    return Candidate("expand", (node,), (source,), build)


def read_collapse(node: fx.Node, kind: str, argument: fx.Node, state: State) -> Candidate | None:
    """``mhc::collapse`` in the place of a mean or sum over exactly the streams of a state."""
    axes = Axes()
    i, c = state.name(axes)
    out = axes.dims(node)
    (i,), (c,) = axes.resolve((i,)), axes.resolve((c,))
    if set(axes.atoms(argument)) - set(axes.atoms(node)) != {i}:
        return None
    before = axes.dims(strip(argument))
    batch = without(before, (i, c))
    wanted = reading.dtype(node)

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        streams = arrange(edit, axes, state.node, before, (*batch, (i,), (c,)))
        if reading.is_lossless(node, streams):
            streams = in_dtype(edit, streams, wanted)
        result = edit.call(ops.collapse.overload, streams, kind)
        return (in_dtype(edit, arrange(edit, axes, result, (*batch, (c,)), out), wanted),)

    return Candidate("collapse", (node,), state.names, build)
