"""Refuse a graph that is only a piece of the model when a residual stream crosses its border.

The streams would have to cross the border too, and the other side knows nothing of them: a model of which one layer
is converted is not the model that anybody asked for. A fragment that holds whole chains (a tower, an encoder with its
final norm) is converted on its own, and so is what follows a break in front of the first layer.

Under ``post_norm="per_stream"`` a norm on the stream is a part of it, for between two sites it is applied to every
stream: a chain whose last norm is a result crosses the border as the bare sum does, and so does one that begins with
the norm of half an add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakSet

import torch
from torch import fx, nn

from mhc_compile.capture.graph import meta_value, user_line
from mhc_compile.capture.mutation import op_name
from mhc_compile.errors import FragmentError
from mhc_compile.passes.base import PassContext, PassResult, Refusal
from mhc_compile.passes.roles import LINEAR, Roles, summands
from mhc_compile.passes.sites import ResidualChain
from mhc_compile.passes.traces import carried

_in_pieces: WeakSet[nn.Module] = WeakSet()
"""Modules whose submodules, or whose own helper methods with weights, Dynamo has compiled one by one."""
_last_break = ""
"""The latest graph break of the process, for messages: a graph knows what ends it, not what ended the one before."""


def check_fragment(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Look at where the chains of ``ctx.chains`` begin and end; edits nothing.

    A refusal of the result says that the graph is a piece with weights but without a chain: not an error, for it may be
    a stem, but residual adds that run between the pieces are in no graph at all.

    Raises:
        FragmentError: the graph is a fragment (``ctx.resumed``, ``ctx.break_reason``, ``ctx.inside``), and a chain
            comes in through its inputs or leaves through its outputs in a way that another fragment continues, or the
            graph holds the second half of a residual add.
    """
    global _last_break
    roots = ctx.modules.roots if ctx.modules is not None else []
    if not ctx.resumed and not ctx.inside:  # the forward begins anew
        _last_break = ""
        for root in roots:
            _in_pieces.discard(root)
    if not (ctx.break_reason or ctx.resumed or ctx.inside):
        return PassResult("check_fragment")
    _last_break = ctx.break_reason or _last_break
    roles = Roles(gm, ctx.is_parameter, ctx.is_buffer)
    weighted = any(_is_layer(node, roles) for node in gm.graph.nodes)
    if weighted:
        _in_pieces.update(ctx.callers)
    try:
        _check(gm, ctx, roles, unseen=not roots or any(root in _in_pieces for root in roots))
    except FragmentError:
        _in_pieces.update(roots)
        raise
    result = PassResult("check_fragment")
    if ctx.inside and weighted and not ctx.chains:
        result.refusals.append(Refusal("piece", f"{ctx.inside} runs in pieces{_latest()}"))
    return result


def _check(gm: fx.GraphModule, ctx: PassContext, roles: Roles, *, unseen: bool) -> None:
    """The checks themselves; ``unseen``: what runs in front of a resumed graph has not all been in a graph of ours."""
    if ctx.resumed or ctx.inside:
        for node in _cut_adds(gm, ctx, roles):
            raise FragmentError(
                f"a residual add is cut: one of its operands comes from in front of a graph break{_latest()}",
                where=user_line(node) or None,
                cure=_cure(),
            )
    per_stream = ctx.options.post_norm == "per_stream"
    for chain in ctx.chains:
        ways = _ways_in(gm, chain.head, roles, per_stream=per_stream)
        head_open = chain.head.op == "placeholder" or any(_is_cut(way, roles) for way in ways)
        normed = any(roles.role(step) != LINEAR for way in ways for step in way)
        tail_open = _reaches_output(gm, chain.end, roles, per_stream=per_stream)
        if ctx.break_reason and tail_open:
            _refuse(chain, f"the graph breaks behind it ({ctx.break_reason})")
        if ctx.resumed and head_open and (unseen or ctx.inside):
            _refuse(chain, f"the graph continues after a graph break in front of it{_latest()}")
        # behind a break a norm of an input is what a stem ends with; of an argument it is a norm between two layers
        if ctx.inside and tail_open and (head_open or (normed and not ctx.resumed)):
            _refuse(chain, f"the graph is one piece of a {ctx.inside}, compiled on its own")


def _latest() -> str:
    return f" ({_last_break})" if _last_break else ""


def _cure() -> str | None:
    """What keeps the latest break from breaking; None for the usual advice."""
    if not any(word in _last_break for word in ("Data dependent operator", "Dynamic shape operator", ".item()")):
        return None
    return (
        f"{FragmentError.default_cure}; torch._dynamo.config.capture_scalar_outputs = True and "
        "capture_dynamic_output_shape_ops = True keep many operators of this kind in the graph"
    )


def _is_layer(node: fx.Node, roles: Roles) -> bool:
    """True for a product of weights with activations that are no ids."""
    return roles.is_weighted(node) and op_name(node) != "embedding"


def _cut_adds(gm: fx.GraphModule, ctx: PassContext, roles: Roles) -> Iterator[fx.Node]:
    """Adds of an input that is a stream and the rest of a branch: an output of layers that did not start from it."""
    inputs: dict[fx.Node, frozenset[fx.Node]] = {}
    """The activation inputs that a value is computed from."""
    behind: dict[fx.Node, frozenset[fx.Node]] = {}
    """Those of them that it has been through a layer from."""
    for node in gm.graph.nodes:
        is_input = node.op == "placeholder" and node not in roles.constant and _elements(node) is not None
        inputs[node] = frozenset([node]) if is_input else _union(inputs, node.all_input_nodes)
        layer = node.op != "placeholder" and _is_layer(node, roles)
        behind[node] = inputs[node] if layer else _union(behind, node.all_input_nodes)
        operands = summands(node)
        if operands is None:
            continue
        (a, _), (b, _) = operands
        for carrier, output in ((a, b), (b, a)):
            stream, other = (roles.strip(value, lambda n: False)[-1] for value in (carrier, output))
            if inputs[stream] != {stream} or not _elements(stream) == _elements(output) == _elements(node):
                continue
            halves = ctx.resumed and ctx.inside and inputs[other] == {other} and other is not stream
            if halves or (behind[output] and stream not in behind[output]):
                yield node


def _union(sets: dict[fx.Node, frozenset[fx.Node]], nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
    found: frozenset[fx.Node] = frozenset()
    for node in nodes:
        found = found | sets[node] if found else sets[node]
    return found


def _ways_in(gm: fx.GraphModule, head: fx.Node, roles: Roles, *, per_stream: bool) -> list[frozenset[fx.Node]]:
    """The operations on each way on which an input of as many elements is carried to the beginning of a chain."""
    ways = []
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node not in roles.constant and _elements(node) == _elements(head):
            ways.append(carried(gm, node, roles, per_stream=per_stream).get(head, frozenset()))
    return ways


def _is_cut(way: Iterable[fx.Node], roles: Roles) -> bool:
    """True when the rest of a branch is added on the way.

    A break inside a branch leaves the carrier among the inputs of the next graph, which begins with the cut add. A
    cast, a scaling, a position added to an input, and a norm are what a stem ends with.
    """
    return any(summands(node) is not None and len(roles.activations(node)) == 2 for node in way)


def _reaches_output(gm: fx.GraphModule, end: fx.Node, roles: Roles, *, per_stream: bool) -> bool:
    """True when the stream itself, not a function of it, is a result of the graph after the last site."""
    tail = carried(gm, end, roles, per_stream=per_stream)
    return any(_elements(node) == _elements(end) and any(u.op == "output" for u in node.users) for node in tail)


def _elements(node: fx.Node) -> object:
    value = meta_value(node)
    return value.numel() if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _refuse(chain: ResidualChain, why: str) -> None:
    site = chain.sites[-1]
    span = f"{chain.sites[0].module or 'root'} to {site.module or 'root'}"
    raise FragmentError(
        f"a residual chain of {len(chain.sites)} sites ({span}) is cut: {why}",
        where=site.where,
        cure=_cure(),
    )
