"""What is live in the backward beside the streams: an estimate on the torch-level graph, before autograd.

The rules are those of AOTAutograd's min-cut partitioner with inductor's settings, seen from afar:

- a matmul keeps its inputs (they are materialised for the weight gradient), attention its inputs, result and row sums
- a non-linear element-wise operation keeps the nearest materialised values it depends on: what is element-wise in
  between is computed again
- reductions are kept (they are small); views, sums and copies keep nothing
- what an activation checkpoint covers is not kept

A value stays live until the backward of its first reader. Where that is, is counted in sites: the position of a node is
the number of posts of the chain before it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.compat import size_hint
from mhc_compile.cost import bytes_of, elements, is_view, target_name, value_of

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
    position: int
    """Site in whose backward it is freed."""


@dataclasses.dataclass(frozen=True)
class Live:
    """Bytes by site: what is live while the backward of a site runs, and between forward and backward."""

    sites: tuple[int, ...]
    head: int


def is_checkpointed(node: fx.Node) -> bool:
    """True for a node that an activation checkpoint of the user covers."""
    return node.meta.get("recompute") in (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE)


def kept_by_autograd(
    graph: fx.Graph, posts: Sequence[fx.Node], is_parameter: Callable[[fx.Node], bool], without: Iterable[fx.Node] = ()
) -> list[Kept]:
    """The values that the backward reads, without those of our own ops and without `without`."""
    place = _places(graph, posts)
    skipped = set(without)
    first: dict[fx.Node, int] = {}
    extra: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for value in _read_by_backward(node, is_parameter):
            if value in skipped or is_checkpointed(value):
                continue
            first[value] = min(first.get(value, len(posts)), place[node])
            if value is node and "scaled_dot_product" in target_name(node):
                extra[value] = elements(value_of(value)) // _last_size(value) * 4  # the row sums, fp32
    return [Kept(node, bytes_of(node) + extra.get(node, 0), position) for node, position in first.items()]


def _last_size(node: fx.Node) -> int:
    shape = value_of(node).shape
    return max(size_hint(shape[-1]), 1) if len(shape) else 1


def live_bytes(
    graph: fx.Graph,
    posts: Sequence[fx.Node],
    is_parameter: Callable[[fx.Node], bool],
    kept: Sequence[Kept],
    own: Sequence[int],
    states: Sequence[int],
) -> Live:
    """Live bytes by site of one chain.

    Args:
        graph, posts, is_parameter: the torch-level graph, the posts of the chain in order, which inputs are parameters.
        kept: what autograd keeps of the branches and of the rest.
        own: bytes of each site that our ops keep whatever the plan (coefficients, branch output).
        states: bytes of each stream state: two gradients of it are live while a site runs backward.
    """
    place = _places(graph, posts)
    count = len(own)
    inputs = graph.find_nodes(op="placeholder")
    fixed = sum(bytes_of(node) for node in inputs)
    gradients = [0] * (count + 1)
    for node in inputs:
        value = value_of(node)
        if is_parameter(node) and isinstance(value, Tensor) and value.requires_grad and node.users:
            last = max(place[user] for user in node.users)
            gradients[min(last, count)] += bytes_of(node)
    work, covered = _workspace(graph, place, count)
    sites = []
    for site in range(count):
        values = sum(value.bytes for value in kept if value.position <= site)
        done = sum(gradients[site:])
        sites.append(fixed + values + sum(own[: site + 1]) + done + 2 * states[site] + work[site] + covered[site])
    head = fixed + sum(value.bytes for value in kept) + sum(own) + work[count]
    return Live(tuple(sites), head)


def _workspace(graph: fx.Graph, place: dict[fx.Node, int], count: int) -> tuple[list[int], list[int]]:
    """By site: the gradients of its widest values (two of them), and what a checkpoint computes again there."""
    widest, covered = [0] * (count + 1), [0] * (count + 1)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or is_view(node) or _is_ours(node):
            continue
        at = min(place[node], count)
        widest[at] = max(widest[at], 2 * bytes_of(node))
        if is_checkpointed(node) and target_name(node) in _CONTRACTING:
            covered[at] += bytes_of(node)
    return widest, covered


def _places(graph: fx.Graph, posts: Sequence[fx.Node]) -> dict[fx.Node, int]:
    order = {node: index for index, node in enumerate(graph.nodes)}
    borders = [order[post] for post in posts]
    return {node: bisect.bisect_left(borders, index) for node, index in order.items()}


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "mhc"


def _read_by_backward(node: fx.Node, is_parameter: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The materialised values that the backward of one node reads."""
    if node.op not in ("call_function", "call_method") or is_view(node) or _is_ours(node):
        return []
    name = target_name(node)
    values = [source for source in node.all_input_nodes if _is_floating(source) and not is_parameter(source)]
    if name in _CONTRACTING or name.startswith("conv") or "scaled_dot_product" in name:
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
        if stops or value.op not in ("call_function", "call_method") or _is_ours(value) or not value.all_input_nodes:
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
