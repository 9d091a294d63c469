"""From sites to chains: which sites share a stream, which stream is the model's, and which are left alone.

Each site knows its parent, so the sites form a forest. From every tree the longest path is a chain (a site that forks
off keeps its own, if at least two sites follow one another there). A chain inside the branch of another one, or around
it, is left alone: the longer of the two is the model's stream. Post-norm chains are cut by their norms into pieces of
one or two sites, which is how they are told from a stack with one norm at its end.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from mhc_compile.capture.mutation import op_name
from mhc_compile.passes.base import PassContext, Refusal
from mhc_compile.passes.sites import ResidualChain, ResidualSite

_LEAST_BETWEEN_NORMS = 3


def assemble(sites: list[ResidualSite], ctx: PassContext) -> tuple[list[ResidualChain], list[Refusal]]:
    """Chains in graph order, and a reason for every site that is in none of them."""
    refusals: list[Refusal] = []
    order = {site: i for i, site in enumerate(sites)}
    paths = _paths(sites, order, refusals)
    normed = {site.norm_parent for site in sites if site.norm_parent is not None}
    paths = [path for path in paths if not _is_post_norm(path, normed, refusals)]
    kept: list[list[ResidualSite]] = []
    for path in sorted(paths, key=lambda p: (-len(p), order[p[0]])):
        reason = next((r for other in kept if (r := _nested(path, other))), "")
        if reason:
            refusals.extend(_refusal(site, reason) for site in path)
        else:
            kept.append(path)
    kept.sort(key=lambda p: order[p[0]])
    return [ResidualChain(path, index=i) for i, path in enumerate(kept)], refusals


def _paths(
    sites: list[ResidualSite], order: dict[ResidualSite, int], refusals: list[Refusal]
) -> list[list[ResidualSite]]:
    children: dict[object, list[ResidualSite]] = defaultdict(list)
    for site in sites:
        children[site.parent if site.parent is not None else site.stream].append(site)
    depth: dict[ResidualSite, int] = {}
    for site in reversed(sites):
        depth[site] = 1 + max((depth[child] for child in children[site]), default=0)

    def longest(candidates: list[ResidualSite]) -> ResidualSite:
        return max(candidates, key=lambda s: (depth[s], -order[s]))

    paths: list[list[ResidualSite]] = []
    for site in sites:
        key = site.parent if site.parent is not None else site.stream
        best = longest(children[key])
        if site is not best:
            if depth[site] == 1:
                refusals.append(
                    _refusal(
                        site,
                        "long skip: the stream it starts from is carried on by the longer chain at "
                        f"{best.where or best.module or 'another add'}",
                    )
                )
                continue
        elif site.parent is not None:
            continue  # continues its parent's path
        path = [site]
        while children[path[-1]]:
            path.append(longest(children[path[-1]]))
        paths.append(path)
    return paths


def _is_post_norm(path: list[ResidualSite], normed: set[ResidualSite], refusals: list[Refusal]) -> bool:
    if len(path) >= _LEAST_BETWEEN_NORMS:
        return False
    cut = path[0].after_norm is not None and path[0].norm_parent is not None
    if not cut and path[-1] not in normed:
        return False
    for site in path:
        what = _barrier_name(site.after_norm) if site.after_norm is not None else "a norm"
        refusals.append(
            _refusal(
                site,
                f"post-norm: {what} sits on the carrier between the adds; "
                "options={'post_norm': 'per_stream'} applies it to every stream",
            )
        )
    return True


def _barrier_name(node: fx.Node) -> str:
    name = op_name(node)
    return "a norm" if name in ("pow", "mean", "rsqrt", "sqrt", "var", "var_mean") else name


def _nested(path: list[ResidualSite], other: list[ResidualSite]) -> str:
    outer = next((site for site in other if any(inner.add in site.branch for inner in path)), None)
    if outer is not None:
        return f"inside the branch of the residual add at {outer.where or outer.module or outer.add.name}"
    if any(inner.add in site.branch for site in path for inner in other):
        return f"long skip: its branch holds another chain of {len(other)} sites"
    return ""


def _refusal(site: ResidualSite, reason: str) -> Refusal:
    return Refusal("residual add", reason, site.where, site.module)
