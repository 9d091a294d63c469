"""Refuse a graph that is only a piece of the model when a residual stream crosses its border.

The streams would have to cross the border too, and the other side knows nothing of them: a model of which one layer
is converted is not the model that anybody asked for. A fragment that holds whole chains (a tower, an encoder with its
final norm) is converted on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from mhc_compile.capture.graph import meta_value
from mhc_compile.errors import FragmentError
from mhc_compile.passes.base import PassContext, PassResult
from mhc_compile.passes.roles import LINEAR, Roles, summands
from mhc_compile.passes.sites import ResidualChain


def check_fragment(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Look at where the chains of ``ctx.chains`` begin and end; edits nothing.

    Raises:
        FragmentError: the graph is a fragment (``ctx.resumed``, ``ctx.break_reason``, ``ctx.inside``), and a chain
            comes in through its inputs or leaves through its outputs in a way that another fragment continues.
    """
    if not (ctx.break_reason or ctx.resumed or ctx.inside):
        return PassResult("check_fragment")
    roles = Roles(gm, ctx.is_parameter, ctx.is_buffer)
    for chain in ctx.chains:
        head_open = _comes_from_input(chain.head, roles)
        tail_open = _reaches_output(chain.end, roles)
        if ctx.break_reason and tail_open:
            _refuse(chain, f"the graph breaks behind it ({ctx.break_reason})")
        if ctx.resumed and head_open:
            _refuse(chain, "the graph continues after a graph break in front of it")
        if ctx.inside and head_open and tail_open:
            _refuse(chain, f"the graph is one piece of a {ctx.inside}, compiled on its own")
    return PassResult("check_fragment")


def _comes_from_input(head: fx.Node, roles: Roles) -> bool:
    """True when the stream is an input, or such an input with the rest of a branch added to it.

    A break inside a branch leaves the carrier among the inputs of the next graph, which begins with the cut add. A
    cast, a scaling or a position added to an input are what a stem ends with.
    """
    if head.op == "placeholder":
        return True
    around = _stream_around(head, roles, roles.values)
    cut = any(summands(node) is not None and len(roles.activations(node)) == 2 for node in around)
    return cut and any(node.op == "placeholder" for node in around)


def _reaches_output(end: fx.Node, roles: Roles) -> bool:
    """True when the stream itself, not a function of it, is a result of the graph after the last site."""
    around = _stream_around(end, roles, lambda node: [user for user in node.users if user.op != "output"])
    return any(user.op == "output" for node in around for user in node.users)


def _stream_around(start: fx.Node, roles: Roles, near: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """``start`` and what linear operations that keep its number of elements lead to, in the direction of ``near``."""
    found, queue = {start}, [start]
    while queue:
        node = queue.pop()
        for other in near(node):
            step = node if other in node.all_input_nodes else other
            if other in found or other in roles.constant or roles.role(step) != LINEAR:
                continue
            if _elements(other) == _elements(start):
                found.add(other)
                queue.append(other)
    return found


def _elements(node: fx.Node) -> object:
    value = meta_value(node)
    return value.numel() if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _refuse(chain: ResidualChain, why: str) -> None:
    site = chain.sites[-1]
    span = f"{chain.sites[0].module or 'root'} to {site.module or 'root'}"
    raise FragmentError(
        f"a residual chain of {len(chain.sites)} sites ({span}) is cut: {why}",
        where=site.where,
    )
