"""The mixing of a site: pre-apply and post-apply with the merge of the residual, in any spelling.

    post   X'_o = sum_i H[o, i] X_i + h_o y          (H may be absent: identity)
    pre    u    = sum_i h_i X_i

Both are read as contractions over named axes, so ``matmul``, ``einsum``, ``bmm``, broadcast-and-sum, any layout of the
streams and a transposed H are one pattern. The algebra alone is common (attention, gated delta rules, expert
combination), so a site needs evidence: at most ``MAX_STREAMS`` streams, a branch output y that is computed from X,
and mixing coefficients that rest on stream states and parameters alone. ``pre`` is only looked for on a state that a
``post`` has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from mhc_compile import ops
from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes, Dim, Dims, expression, flat, without
from mhc_compile.patterns.base import MAX_STREAMS, Candidate, Editor, Refused, arrange, in_dtype, last_cast
from mhc_compile.patterns.reading import read, strip
from mhc_compile.patterns.region import GraphFacts


@dataclass(eq=False)
class State:
    """A stream state: the nodes that stand for it, and which of its atoms are the streams and the channels.

    sizes[d] are the sizes of the atoms of dimension d of the node; stream and channel index the flattened atoms.
    """

    names: tuple[fx.Node, ...]
    sizes: tuple[tuple[object, ...], ...]
    stream: int
    channel: int
    gates: dict[fx.Node, str] = field(default_factory=dict)
    """Coefficients that mix this state, and their part: pre, post, res."""
    per_channel: bool = False
    """The branch reads it through a gate for every channel (``channel_pre``)."""

    @property
    def node(self) -> fx.Node:
        """The node that readers of the state read."""
        return self.names[-1]

    def name(self, axes: Axes) -> tuple[int, int]:
        """Pin the state in some axes; returns its stream and channel atoms."""
        dims: Dims = tuple(tuple(axes.new(size) for size in group) for group in self.sizes)
        for node in self.names:
            axes.pin(node, dims)
        atoms = flat(dims)
        return atoms[self.stream], atoms[self.channel]


@dataclass(frozen=True)
class Post:
    """A recognised post-apply; ``matrix`` is None where H is the identity."""

    node: fx.Node
    x: fx.Node
    y: fx.Node
    gate: fx.Node
    matrix: fx.Node | None
    axes: Axes
    batch: Dims
    out_stream: int
    in_stream: int
    channel: int


# --- contractions ----------------------------------------------------------------------------------------------------


def pair(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product or contraction: ``a * b``, ``(a * b).sum(d)``, matmul, bmm, einsum."""
    op = read(strip(node))
    if op is not None and op.kind == "sum":
        op = read(strip(op.args[0]))
        if op is None or op.kind != "mul":
            return None
    if op is None or op.kind not in ("mul", "matmul", "einsum") or len(op.nodes) != 2:
        return None
    return op.nodes[0], op.nodes[1]


def leaf(node: fx.Node) -> fx.Node:
    """The node under what moves or broadcasts axes but does not cut or merge them: a gate keeps its own axes."""
    while True:
        op = read(node)
        if op is None or not (reading.is_plumbing(node, op) or op.kind == "expand"):
            return node
        if op.kind == "reshape" and _longer_than_one(node) != _longer_than_one(op.args[0]):
            return node
        node = op.args[0]


def _longer_than_one(node: fx.Node) -> list[object]:
    return [size for size in map(expression, reading.shape(node)) if size != 1]


def _distinct(axes: Axes, nodes: Sequence[fx.Node]) -> bool:
    return all(len(set(axes.atoms(node))) == len(axes.atoms(node)) for node in nodes)


# --- post ------------------------------------------------------------------------------------------------------------


def _sums(node: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, fx.Node]]]:
    """(carried term, factors of the branch term) for every way to read a node as a sum of the two."""
    op = read(node)
    if op is None or len(op.nodes) < 2:
        return
    if op.kind in ("addcmul", "baddbmm"):
        yield op.args[0], (op.args[1], op.args[2])
    elif op.kind == "add":
        for carried, branch in (op.args, op.args[::-1]):
            factors = pair(branch)
            if factors is not None:
                yield carried, factors


def read_post(node: fx.Node, facts: GraphFacts, states: Sequence[fx.Node]) -> Post | None:
    """The post-apply that a node completes, None if it is none."""
    for carried, factors in _sums(node):
        for gate, y in (factors, factors[::-1]):
            mixed = pair(carried)
            for matrix, x in (*((mixed, mixed[::-1]) if mixed else ()), (None, carried)):
                state, branch, gates = strip(x), leaf(y), [leaf(h) for h in (gate, matrix) if h is not None]
                if not facts.depends(branch, state):  # costs little: a rotary embedding has the form of a post-apply
                    continue
                found = _try_post(node, state, branch, *gates, facts=facts)
                if found is not None and all(facts.rests_on(h, [*states, state]) for h in gates):
                    return found
    return None


def _try_post(
    node: fx.Node, x: fx.Node, y: fx.Node, gate: fx.Node, matrix: fx.Node | None = None, *, facts: GraphFacts
) -> Post | None:
    leaves = [x, y, gate] if matrix is None else [x, y, gate, matrix]
    if len(set(leaves)) != len(leaves) or not all(reading.dtype(own).is_floating_point for own in leaves):
        return None
    axes = Axes()
    for own in leaves:
        axes.pin(own)
    out = flat(axes.dims(node))
    if not _distinct(axes, leaves) or len(set(out)) != len(out):
        return None
    stream = set(out) - set(axes.atoms(y))
    if len(stream) != 1 or set(axes.atoms(y)) - set(out):
        return None
    (o,) = stream
    size = axes.size(o)
    inner = set(axes.atoms(x)) - set(out) if matrix is not None else {o}
    if not isinstance(size, int) or size > MAX_STREAMS or len(inner) != 1:
        return None
    (i,) = inner
    channel = _channel(axes, out, o, gate, facts)
    if channel is None or axes.size(i) != size:
        return None
    if matrix is None and not _channels_last(axes, out, o, channel):
        return None
    batch = set(out) - {o, channel}
    fits = set(axes.atoms(x)) == batch | {i, channel} and _is_gate(axes, gate, batch, {o}, facts)
    if matrix is not None:
        fits = fits and _is_gate(axes, matrix, batch, {o, i}, facts)
    if not fits:
        return None
    return Post(node, x, y, gate, matrix, axes, without(axes.dims(x), (i, channel)), o, i, channel)


def _channel(axes: Axes, out: Sequence[int], o: int, gate: fx.Node, facts: GraphFacts) -> int | None:
    """The channel axis: the one that the gate lacks; for a gate that is the same for all tokens, the last one."""
    lacking = [atom for atom in out if atom not in axes.atoms(gate)]
    if gate in facts.static:
        lacking = [atom for atom in out if atom != o][-1:]
    return lacking[0] if len(lacking) == 1 and lacking[0] != o else None


def _channels_last(axes: Axes, out: Sequence[int], o: int, channel: int) -> bool:
    """Tells streams from channels where there is no H to tell: streams are fewer, or come first."""
    a, b = axes.size(o), axes.size(channel)
    if not isinstance(b, int) or a == b:
        return out.index(o) < out.index(channel)
    return bool(a < b)


def _is_gate(axes: Axes, gate: fx.Node, batch: set[int], own: set[int], facts: GraphFacts) -> bool:
    atoms = set(axes.atoms(gate))
    return atoms == batch | own or (gate in facts.static and atoms == own)


def _like_tokens(edit: Editor, gate: fx.Node, streams: fx.Node, rank: int) -> fx.Node:
    """A gate that is the same for all tokens, broadcast over the token axes of a state [..., n, C]."""
    if value_rank(gate) == value_rank(streams) - 2 + rank:
        return gate
    like = edit.method("select", streams, -1, 0)
    if rank == 2:
        like = edit.method("unsqueeze", like, -1)
        sizes = [-1] * (value_rank(like) - 1) + [reading.shape(gate)[-1]]
        like = edit.method("expand", like, *sizes)
    return edit.method("expand_as", gate, like)


def value_rank(node: fx.Node) -> int:
    """Number of dimensions of a tensor node."""
    return len(reading.shape(node))


def _canonical_gate(edit: Editor, axes: Axes, gate: fx.Node, batch: Dims, own: tuple[Dim, ...], x: fx.Node) -> fx.Node:
    static = set(axes.atoms(gate)) == set(flat(own)) and flat(batch)
    want = own if static else (*batch, *own)
    result = arrange(edit, axes, gate, axes.dims(gate), want)
    return _like_tokens(edit, result, x, len(own)) if static else result


def post_candidate(post: Post) -> Candidate:
    """``mhc::post`` in the place of a post-apply; H stays as it lies, ``transpose`` says how it is read."""
    axes, batch, o, i, c = post.axes, post.batch, post.out_stream, post.in_stream, post.channel
    names = last_cast(post.node)
    wanted = reading.dtype(names[-1])
    transpose = False
    if post.matrix is not None:
        atoms = axes.atoms(post.matrix)
        transpose = atoms.index(i) < atoms.index(o)

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        x = arrange(edit, axes, post.x, axes.dims(post.x), (*batch, (i,), (c,)))
        y = arrange(edit, axes, post.y, axes.dims(post.y), (*batch, (c,)))
        if torch.promote_types(reading.dtype(x), reading.dtype(y)) != wanted and reading.is_lossless(names[-1], x):
            x = in_dtype(edit, x, wanted)
        gate = _canonical_gate(edit, axes, post.gate, batch, ((o,),), x)
        matrix = None
        if post.matrix is not None:
            own: tuple[Dim, ...] = ((i,), (o,)) if transpose else ((o,), (i,))
            matrix = _canonical_gate(edit, axes, post.matrix, batch, own, x)
        result = edit.call(ops.post.overload, x, y, gate, matrix, transpose)
        result = arrange(edit, axes, result, (*batch, (o,), (c,)), axes.dims(post.node))
        return (in_dtype(edit, result, wanted),)

    inputs = [post.x, post.y, post.gate, *([post.matrix] if post.matrix is not None else [])]
    return Candidate("post", names[-1:], tuple(inputs), build, names[:-1], {"transpose": transpose})


# --- pre -------------------------------------------------------------------------------------------------------------


def read_pre(node: fx.Node, states: dict[fx.Node, State], facts: GraphFacts) -> Candidate | None:
    """``mhc::pre`` in the place of a weighted sum of a known state's streams; None if the node is none."""
    op = read(node)
    if op is None or op.kind not in ("sum", "matmul", "einsum"):
        return None
    factors = pair(node)
    for streams, other in (factors, factors[::-1]) if factors else ():
        state = states.get(strip(streams))
        if state is not None:
            found = _try_pre(node, state, strip(streams), leaf(other), facts, list(states))
            if found is not None:
                state.gates.setdefault(leaf(other), "pre")
                return found
    return None


def _try_pre(
    node: fx.Node, state: State, x: fx.Node, gate: fx.Node, facts: GraphFacts, states: Sequence[fx.Node]
) -> Candidate | None:
    if gate in state.names or not reading.dtype(gate).is_floating_point:
        return None
    axes = Axes()
    i, c = state.name(axes)
    axes.pin(gate)
    out = axes.atoms(node)
    (i,), (c,) = axes.resolve((i,)), axes.resolve((c,))
    batch = set(axes.atoms(x)) - {i, c}
    if set(out) != batch | {c} or not _is_gate(axes, gate, batch, {i}, facts) or not facts.rests_on(gate, states):
        return None
    tokens = without(axes.dims(x), (i, c))
    names = last_cast(node)
    wanted = reading.dtype(names[-1])

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        streams = arrange(edit, axes, state.node, axes.dims(x), (*tokens, (i,), (c,)))
        if reading.is_lossless(names[-1], streams):
            streams = in_dtype(edit, streams, wanted)
        weights = _canonical_gate(edit, axes, gate, tokens, ((i,),), streams)
        result = edit.call(ops.pre.overload, streams, weights)
        return (in_dtype(edit, arrange(edit, axes, result, (*tokens, (c,)), axes.dims(node)), wanted),)

    return Candidate("pre", names[-1:], (*state.names, gate), build, names[:-1])


# --- all of a graph --------------------------------------------------------------------------------------------------


def find(graph: fx.Graph, facts: GraphFacts) -> tuple[list[Candidate | Refused], list[State]]:
    """Every post-apply of a graph, the states around them, and the pre-applies on those states, in graph order."""
    found: list[Candidate | Refused] = []
    states: dict[fx.Node, State] = {}
    for node in graph.nodes:
        if not reading.is_tensor(node) or strip(node) is not node:
            continue
        post = read_post(node, facts, list(states))
        if post is None:
            continue
        candidate = post_candidate(post)
        found.append(candidate)
        axes = post.axes
        before = states.setdefault(post.x, _state((post.x,), axes, axes.dims(post.x), post.in_stream, post.channel))
        before.gates[post.gate] = "post"
        if post.matrix is not None:
            before.gates[post.matrix] = "res"
        names = (*candidate.names, *candidate.outputs)
        after = _state(names, axes, axes.dims(post.node), post.out_stream, post.channel)
        states.update(dict.fromkeys(names, after))
    for node in graph.nodes if states else ():
        pre = read_pre(node, states, facts) if reading.is_tensor(node) else None
        if pre is not None:
            found.append(pre)
    every = list(dict.fromkeys(states.values()))
    return found, every


def unread(states: Sequence[State]) -> Iterator[Refused]:
    """The states that a site adds to and whose branch reads something that was not recognised."""
    for state in states:
        parts = state.gates.values()
        if "post" in parts and "pre" not in parts and not state.per_channel:
            yield Refused("pre", "the branch reads no weighted sum of the streams that is known", state.node)


def _state(names: tuple[fx.Node, ...], axes: Axes, dims: Dims, stream: int, channel: int) -> State:
    sizes = tuple(tuple(axes.size(atom) for atom in dim) for dim in dims)
    atoms = flat(dims)
    return State(names, sizes, atoms.index(stream), atoms.index(channel))
