"""Refuse a graph that is only a piece of the model when a residual stream crosses its border.

The streams would have to cross the border too, and the other side knows nothing of them: a model of which one layer
is converted is not the model that anybody asked for. A fragment that holds whole chains (a tower, an encoder with its
final norm) is converted on its own.
"""

from __future__ import annotations

from torch import fx

from mhc_compile.errors import FragmentError
from mhc_compile.passes.base import PassContext, PassResult
from mhc_compile.passes.sites import ResidualChain


def check_fragment(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Look at where the chains of ``ctx.chains`` begin and end; edits nothing.

    Raises:
        FragmentError: the graph is a fragment (``ctx.resumed``, ``ctx.break_reason``, ``ctx.inside``), and a chain
            comes in through its inputs or leaves through its outputs in a way that another fragment continues.
    """
    for chain in ctx.chains:
        head_open = chain.head.op == "placeholder"
        tail_open = _reaches_output(chain)
        if ctx.break_reason and tail_open:
            _refuse(chain, f"the graph breaks behind it ({ctx.break_reason})")
        if ctx.resumed and head_open:
            _refuse(chain, "the graph continues after a graph break in front of it")
        if ctx.inside and head_open and tail_open:
            _refuse(chain, f"the graph is one piece of a {ctx.inside}, compiled on its own")
    return PassResult("check_fragment")


def _reaches_output(chain: ResidualChain) -> bool:
    """True when the stream itself, not a function of it, is a result of the graph after the last site."""
    return any(user.op == "output" for user in chain.end.users)


def _refuse(chain: ResidualChain, why: str) -> None:
    site = chain.sites[-1]
    span = f"{chain.sites[0].module or 'root'} to {site.module or 'root'}"
    raise FragmentError(
        f"a residual chain of {len(chain.sites)} sites ({span}) is cut: {why}",
        where=site.where,
    )
