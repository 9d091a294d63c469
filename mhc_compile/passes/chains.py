"""From sites to chains: which sites share a stream, which stream is the model's, and which are left alone.

Each site knows its parent, so the sites form a forest. From every tree the longest path is a chain (a site that forks
off keeps its own, if at least two sites follow one another there). A skip around two or more sites of its own stream is
a long skip and no site, however often it is repeated: the sites inside are the stream. A chain inside the branch of
another one, or around it, is left alone: the longer of the two is the model's stream. Post-norm chains are cut by their
norms into pieces of one or two sites, which is how they are told from a stack with one norm at its end.
"""

from __future__ import annotations

from collections import defaultdict

from mhc_compile.capture.mutation import op_name
from mhc_compile.passes.base import PassContext, Refusal
from mhc_compile.passes.roles import NORM, RANDOM
from mhc_compile.passes.sites import ResidualChain, ResidualSite

_LEAST_BETWEEN_NORMS = 3
_STEPS_OF_A_NORM = ("pow", "mean", "rsqrt", "sqrt", "var", "var_mean", "square", "norm", "vector_norm")

Reasons = dict[ResidualSite, str]


def assemble(sites: list[ResidualSite], ctx: PassContext) -> tuple[list[ResidualChain], list[Refusal]]:
    """Chains in graph order, and a reason for every site that is in none of them."""
    reasons: Reasons = {}
    order = {site: i for i, site in enumerate(sites)}
    cuts = {site.norm_parent: site for site in reversed(sites) if site.norm_parent is not None}
    _drop_long_skips(sites, reasons)
    paths = _paths([site for site in sites if site not in reasons], order, reasons)
    kept: list[list[ResidualSite]] = []
    # pieces between norms last: they may lie in the branch of a whole chain
    for path in sorted(paths, key=lambda p: (_is_piece(p, cuts), -len(p), order[p[0]])):
        reason = next((r for other in kept if (r := _nested(path, other))), "")
        if not reason and _is_piece(path, cuts):
            reason = _cut_reason(path[0] if path[0].after_norm is not None else cuts[path[-1]])
        if not reason and len(path) == 1:
            reason = _no_stream(path[0])
        if reason:
            reasons.update(dict.fromkeys(path, reason))
        else:
            kept.append(path)
    kept.sort(key=lambda p: order[p[0]])
    refusals = [Refusal("residual add", reasons[site], site.where, site.module) for site in sites if site in reasons]
    return [ResidualChain(path, index=i) for i, path in enumerate(kept)], refusals


def _children(sites: list[ResidualSite]) -> dict[object, list[ResidualSite]]:
    """Sites by the state of the stream that they start from."""
    children: dict[object, list[ResidualSite]] = defaultdict(list)
    for site in sites:
        children[_state(site)].append(site)
    return children


def _state(site: ResidualSite) -> object:
    return site.parent if site.parent is not None else site.stream


def _drop_long_skips(sites: list[ResidualSite], reasons: Reasons) -> None:
    """Take out the adds whose branch goes through two or more sites of the stream they start from.

    What follows such an add starts a stream of its own.
    """
    children = _children(sites)

    def inside(site: ResidualSite, outer: ResidualSite) -> int:
        """Sites one after another from ``site`` on within the branch of ``outer``."""
        return 1 + max((inside(child, outer) for child in children[site] if child.add in outer.branch), default=0)

    by_add: dict[object, ResidualSite] = {site.add: site for site in sites}
    for outer in sites:
        states = [_state(outer), *outer.images, *(by_add[node] for node in outer.images if node in by_add)]
        starts = [site for state in states for site in children.get(state, ())]
        around = max((inside(s, outer) for s in starts if s is not outer and s.add in outer.branch), default=0)
        if around >= 2:
            reasons[outer] = f"long skip around {around} residual adds of its own stream"
    for site in sites:
        if site.parent in reasons:
            site.parent, site.entry_path = None, []


def _paths(sites: list[ResidualSite], order: dict[ResidualSite, int], reasons: Reasons) -> list[list[ResidualSite]]:
    children = _children(sites)
    depth: dict[ResidualSite, int] = {}
    for site in reversed(sites):
        depth[site] = 1 + max((depth[child] for child in children[site]), default=0)

    def longest(candidates: list[ResidualSite]) -> ResidualSite:
        """The first of those that the most follow; one in the branch of another such goes on to nothing but that."""
        most = max(depth[site] for site in candidates)
        best = [site for site in candidates if depth[site] == most]
        outer = [site for site in best if not any(site.add in other.branch for other in best if other is not site)]
        return min(outer or best, key=order.__getitem__)

    paths: list[list[ResidualSite]] = []
    for site in sites:
        best = longest(children[_state(site)])
        if site is not best:
            if depth[site] == 1 and site.add in best.branch:
                reasons[site] = f"inside the branch of the residual add at {best.where or best.module or best.add.name}"
                continue
            if depth[site] == 1:
                reasons[site] = (
                    "long skip: the stream it starts from is carried on by the longer chain at "
                    f"{best.where or best.module or 'another add'}"
                )
                continue
        elif site.parent is not None:
            continue  # continues its parent's path
        path = [site]
        while children[path[-1]]:
            path.append(longest(children[path[-1]]))
        paths.append(path)
    return paths


def _is_piece(path: list[ResidualSite], cuts: dict[ResidualSite, ResidualSite]) -> bool:
    """True for a piece of a stream that norms (or the like) cut after every one or two adds."""
    if len(path) >= _LEAST_BETWEEN_NORMS:
        return False
    return (path[0].after_norm is not None and path[0].norm_parent is not None) or path[-1] in cuts


def _no_stream(site: ResidualSite) -> str:
    """Why one add alone, with no other before or behind it, is taken for something else than a stream."""
    if site.from_constant:
        return "something is added to learned queries and no stream of theirs goes on behind it"
    if not site.channels_known:
        return "no layer reads what it is added to as channels (a bias of attention scores, not a stream)"
    return ""


def _cut_reason(site: ResidualSite) -> str:
    """Why the stream does not go through from the site before ``site`` to it."""
    assert site.after_norm is not None
    name = op_name(site.after_norm)
    if site.cut_by == NORM or name in _STEPS_OF_A_NORM:
        what = "a norm" if name in _STEPS_OF_A_NORM else name
        return (
            f"post-norm: {what} sits on the carrier between the adds; "
            "options={'post_norm': 'per_stream'} applies it to every stream"
        )
    if site.cut_by == RANDOM:
        return f"{name} acts on the stream itself between the adds, and would act on each stream differently"
    return f"{name} acts on the stream itself between the adds, and is not linear"


def _nested(path: list[ResidualSite], other: list[ResidualSite]) -> str:
    outer = next((site for site in other if any(inner.add in site.branch for inner in path)), None)
    if outer is not None:
        return f"inside the branch of the residual add at {outer.where or outer.module or outer.add.name}"
    if any(inner.add in site.branch for site in path for inner in other):
        return f"long skip: its branch holds another chain of {len(other)} sites"
    return ""
