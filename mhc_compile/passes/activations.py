"""What is live in the backward beside the streams: an estimate on the torch-level graph, before autograd.

The backward is walked through as the forward graph from its end to its start, a node at a time. The rules of what is
kept are those of AOTAutograd's min-cut partitioner with inductor's settings, seen from afar:

- a matmul keeps its inputs (they are materialised for the weight gradient), attention its inputs, result and row sums
- a non-linear element-wise operation keeps the nearest materialised values it depends on: what is element-wise in
  between is computed again
- reductions are kept (they are small); views, sums and copies keep nothing
- what an activation checkpoint covers is not kept, and its matmuls' results come back while their site runs

A kept value is live until the backward of its first reader. A gradient is live from the backward of the value's reader
to the backward of what made it, where one of the two is more than element-wise: what is fused is never written. The
gradient of a weight is live from the backward of the weight's last reader on. Gradients of stream states: the one that
a site takes, and the one it gives, which lives until the post before it has run backward; `du`, which ends with it.

Moments are counted in sites: the place of a node is the number of posts of the chain before it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import ops
from mhc_compile.compat import size_hint
from mhc_compile.cost import bytes_of, elements, is_view, target_name, tensors_of, value_of
from mhc_compile.passes.states import State

_CONTRACTING = frozenset("linear matmul mm bmm addmm baddbmm mv __matmul__ einsum".split())
_LINEAR = frozenset(
    """
    add sub iadd isub neg to float half bfloat16 double type type_as cat stack sum mean clone copy dropout
    embedding zeros ones arange full rsub roll flip cumsum index_select set_item empty masked_fill where pad
    """.split()
)
_REDUCTIONS = frozenset("mean sum var std norm amax amin var_mean max min logsumexp prod".split())
_FROM_RESULT = frozenset("softmax log_softmax sigmoid tanh exp sqrt rsqrt reciprocal".split())


@dataclasses.dataclass(frozen=True)
class Kept:
    """A value that autograd keeps."""

    node: fx.Node
    bytes: int
    reader: int
    """Index in the graph of the first node whose backward reads it (of an element-wise one: of the last node that is
    fused with it, with which its backward runs). Behind that one it is freed."""


@dataclasses.dataclass(frozen=True)
class Live:
    """Most bytes by site, and between forward and backward."""

    sites: tuple[int, ...]
    """While the site's branch runs backward: until the last reader of the branch input has."""
    borders: tuple[int, ...]
    """Behind that, to the post before: 0 for a site without a branch input."""
    head: int


def is_checkpointed(node: fx.Node) -> bool:
    """True for a node that an activation checkpoint of the user covers."""
    return node.meta.get("recompute") in (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE)


def kept_by_autograd(
    graph: fx.Graph, is_parameter: Callable[[fx.Node], bool], without: Iterable[fx.Node] = ()
) -> list[Kept]:
    """The values that the backward reads, without those of our own ops and without `without`."""
    skipped = set(without)
    first: dict[fx.Node, int] = {}
    extra: dict[fx.Node, int] = {}
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node, index in order.items():
        for value in _read_by_backward(node, is_parameter):
            if value in skipped or is_checkpointed(value):
                continue
            reader = index if _is_whole(node) else order[_end_of_fusion(node)]
            first[value] = min(first.get(value, reader), reader)
            if value is node and _is_attention(node):
                extra[value] = elements(value_of(value)) // _last_size(value) * 4  # the row sums, fp32
    return [Kept(node, bytes_of(node) + extra.get(node, 0), reader) for node, reader in first.items()]


def _last_size(node: fx.Node) -> int:
    shape = value_of(node).shape
    return max(size_hint(shape[-1]), 1) if len(shape) else 1


# ------------------------------------------------------------------------------------------------ the walk
class _Walk:
    """Bytes by index of the graph, as differences: `add` what is live while the backward is at low .. high."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.end = len(self.order)
        self._steps = [0] * (self.end + 2)

    def add(self, size: int, low: int, high: int) -> None:
        """Both ends count."""
        if high >= low:
            self._steps[low] += size
            self._steps[high + 1] -= size

    def totals(self) -> list[int]:
        """Bytes at each index."""
        total, found = 0, []
        for step in self._steps[:-1]:
            total += step
            found.append(total)
        return found


def live_bytes(
    graph: fx.Graph,
    states: Sequence[State],
    is_parameter: Callable[[fx.Node], bool],
    kept: Sequence[Kept],
    own: Sequence[tuple[int, int]],
    kind: str,
    workspace: int = 0,
    last: int | None = None,
) -> Live:
    """Live bytes of one chain without its stream states and branch inputs.

    Args:
        graph, states, is_parameter: the torch-level graph, the states of the chain in order, which inputs are
            parameters.
        kept: what autograd keeps of the branches and of the rest.
        own: by site, what our ops keep whatever the plan: bytes of the coefficients, bytes of the branch output.
        kind: the type of the device, ``cuda`` or ``cpu``: attention's backward takes a workspace of its own on a GPU.
        workspace: bytes that libraries hold all the time.
        last: bytes of the gradient that the last post takes; None: of its whole state.
    """
    walk = _Walk(graph)
    order, end = walk.order, walk.end
    posts = [state.post for state in states if state.post is not None]
    borders = [order[post] for post in posts]
    count = len(states)
    (output,) = graph.find_nodes(op="output")
    fixed = sum(bytes_of(node) for node in {*graph.find_nodes(op="placeholder"), *output.all_input_nodes})
    walk.add(fixed + workspace, 0, end)
    for node in graph.find_nodes(op="placeholder"):
        if is_parameter(node) and wants_gradient(node) and node.users:
            walk.add(bytes_of(node), 0, max(order[user] for user in node.users))
    for value in kept:
        walk.add(value.bytes, value.reader, end)
    _streams(walk, states, own, last)
    for node in graph.nodes:
        _gradients(walk, node)
        if kind == "cuda" and _is_attention(node):
            walk.add(_attention_workspace(node), order[node], order[node])
        if is_checkpointed(node) and target_name(node) in _CONTRACTING:
            site = bisect.bisect_left(borders, order[node])
            walk.add(bytes_of(node), [0, *borders][site], [*borders, end][site])
    totals = walk.totals()
    sites, lower = [], []
    for site, state in enumerate(states):
        after = borders[site - 1] + 1 if site else 0
        last = borders[site] if site < len(borders) else end - 1
        reader = min((order[user] for pre in state.pres for user, _ in _readers(pre)), default=last)
        branch = min(max(reader, after), last)
        sites.append(max(totals[branch : last + 1]))
        lower.append(max(totals[after:branch], default=0))
    behind = borders[count - 1] + 1 if count == len(borders) and borders else end
    return Live(tuple(sites), tuple(lower), max(totals[behind : end + 1]))


def _streams(walk: _Walk, states: Sequence[State], own: Sequence[tuple[int, int]], gradient: int | None) -> None:
    """What our ops keep, and the gradients of the states and of the branch inputs."""
    order = walk.order
    ends = [order[state.producer] for state in states]
    for index, (state, (coefficients, output)) in enumerate(zip(states, own, strict=True)):
        first = min((order[node] for node in (*state.coefficients, *state.pres)), default=ends[index])
        walk.add(coefficients, first, walk.end)
        if state.post is not None:
            walk.add(output, order[state.post], walk.end)
        # The gradient that the sites above have made: until the post before it and the state before it have theirs.
        walk.add(bytes_of(state.producer), ends[max(index - 1, 0)], first)
        for pre in state.pres:  # du: with a norm another tensor than the gradient of what the branch reads
            walk.add(_result_bytes(pre), ends[index], order[pre] - (pre.target is ops.pre.overload))
    if states and states[-1].post is not None:
        last = max((order[user] for user, _ in _readers(states[-1].post)), default=walk.end)
        walk.add(bytes_of(states[-1].post) if gradient is None else gradient, ends[-1], last)


def _gradients(walk: _Walk, node: fx.Node) -> None:
    """The gradients of one value: what its readers write, and their sum where its own backward reads that."""
    if node.op not in ("call_function", "call_method") or is_view(node) or not wants_gradient(node):
        return
    if is_ours(node) and node.target not in (*_PRES, ops.collapse.overload):
        return
    order = walk.order
    readers = _readers(node)
    writers = [(order[user], size) for user, size in readers if _is_whole(user)]
    fused = [order[_end_of_fusion(user)] for user, _ in readers if not _is_whole(user)]
    if not _is_whole(node):
        for reader, size in writers:
            walk.add(size, order[node], reader)
        return
    if not readers:
        return
    alone = len(writers) == 1 and not fused and writers[0][1] == _result_bytes(node)
    known = max(fused) if fused else min(reader for reader, _ in writers)
    if node.target is ops.pre_norm.overload:
        known = order[node]  # its kernel reads the addends
    elif not alone:
        walk.add(_result_bytes(node), order[node], known)
    for reader, size in writers:
        walk.add(size, order[node] if alone else known, reader)


def _readers(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Who reads a value, directly or through views, and the bytes of what each of them reads."""
    found: list[tuple[fx.Node, int]] = []
    for user in node.users:
        if user.op != "output" and not any(True for _ in tensors_of(value_of(user))):
            continue  # asks for a size
        if is_view(user) and user.op != "output":
            found += _readers(user)
        else:
            found.append((user, _result_bytes(node)))
    return found


def _is_whole(node: fx.Node) -> bool:
    """True for a node whose backward is no part of a fused kernel: it reads a tensor and writes tensors."""
    name = target_name(node)
    return (
        node.op == "output"
        or is_ours(node)
        or name in _CONTRACTING
        or name == "embedding"
        or name.startswith("conv")
        or _is_attention(node)
    )


def _end_of_fusion(node: fx.Node) -> fx.Node:
    """The last of the element-wise nodes that one kernel runs backward: each the only reader of the one before."""
    while True:
        readers = _readers(node)
        if len(readers) != 1 or _is_whole(readers[0][0]):
            return node
        node = readers[0][0]


def _attention_workspace(node: fx.Node) -> int:
    """What flash attention's backward allocates for itself (ATen's flash_api.cpp): the gradient of the queries in
    float32, and with fewer heads of keys than of queries those of keys and values for each of the queries' heads."""
    query, key = (next(tensors_of(value_of(value))) for value in node.args[:2])
    wide = elements(query) * 4
    if size_hint(key.shape[-3]) == size_hint(query.shape[-3]):
        return wide
    return wide + 2 * elements(key) // size_hint(key.shape[-3]) * size_hint(query.shape[-3]) * key.element_size()


def _result_bytes(node: fx.Node) -> int:
    """Bytes of the first tensor that a node gives."""
    return next((elements(value) * value.element_size() for value in tensors_of(value_of(node))), 0)


def wants_gradient(node: fx.Node) -> bool:
    """True if autograd follows one of its tensors."""
    return any(value.requires_grad for value in tensors_of(value_of(node)))


_PRES = (ops.pre.overload, ops.pre_norm.overload)


def _is_attention(node: fx.Node) -> bool:
    return "scaled_dot_product" in target_name(node)


def is_ours(node: fx.Node) -> bool:
    """True for a call of a semantic op."""
    return getattr(node.target, "namespace", "") == "mhc"


def _read_by_backward(node: fx.Node, is_parameter: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The materialised values that the backward of one node reads."""
    if node.op not in ("call_function", "call_method") or is_view(node) or is_ours(node):
        return []
    name = target_name(node)
    values = [source for source in node.all_input_nodes if _is_floating(source) and not is_parameter(source)]
    if name in _CONTRACTING or name.startswith("conv") or _is_attention(node):
        found = [_base(value) for value in values]
        return [*found, node] if "scaled_dot_product" in name else found
    if name in _LINEAR:
        return []
    if name in ("mul", "div", "truediv", "imul") and len(node.all_input_nodes) < 2:
        return []  # by a number
    if name in _FROM_RESULT and name not in ("sigmoid", "exp", "tanh", "rsqrt", "sqrt", "reciprocal"):
        return [node]
    return [root for value in values for root in _materialised(value, is_parameter)]


def _materialised(node: fx.Node, is_parameter: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nearest values behind a node that exist in memory; what is element-wise in between is computed again."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        value = _base(pending.pop())
        if value in seen or is_parameter(value) or not _is_floating(value):
            continue
        seen.add(value)
        name = target_name(value)
        stops = name in _CONTRACTING or name in _REDUCTIONS or "scaled_dot_product" in name or "norm" in name
        if stops or value.op not in ("call_function", "call_method") or is_ours(value) or not value.all_input_nodes:
            found[value] = None
        else:
            pending.extend(value.all_input_nodes)
    return [value for value in found if value.op != "placeholder"]


def _base(node: fx.Node) -> fx.Node:
    """What a view looks at."""
    while is_view(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_floating(node: fx.Node) -> bool:
    value = value_of(node)
    return not isinstance(value, Tensor) or value.dtype.is_floating_point
