"""Few tokens (decode): two launches a site instead of four, found on the semantic ops of a forward graph.

    post(l - 1), coefficients(l), pre_norm(l), post(l)   ->   post + projection, gates + pre_norm, post + ...

Each kernel of a site costs its latency when there is little to read. What is fused follows from what a program can know
without waiting for another one: `post_project` writes X' by blocks of channels and leaves partial sums of the
projection, `activate_pre_norm` adds them up for a token and goes on to the branch's input. In `single_pass` the gate
of the mix comes from the site before, and the same two launches do. The number of tokens chooses by its example alone,
without a guard: the kernels are right for any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.ops.coefficients import ATTRIBUTES, split_arguments
from mhc_compile.ops.spec import CoefficientSpec

from .base import FEW, FORWARD_TARGETS, LoweringLog, arguments, result
from .inline import insert_function, replace
from .launch import hint, tokens_of

Refused = Callable[[str, dict[str, Any]], str]
"""(op, its arguments) -> why no kernel takes the node; empty if one does."""


@dataclass
class FewTokens:
    """One site that two launches can do."""

    coefficients: fx.Node
    mix: fx.Node
    """The `pre` or `pre_norm` of the same state."""
    known: bool
    """The gate of the mix is there before the coefficients are (`single_pass`)."""
    post: fx.Node | None
    """The `post` that makes the state, if it can take the projection with it."""


def pending(nodes: Iterable[Any], before: fx.Node) -> set[fx.Node] | None:
    """What would have to move in front of `before` for `nodes` to be known there: they and what they are computed from,
    as far as it is not there already. None if that is impossible."""
    moved: set[fx.Node] = set()
    stack = [node for node in nodes if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in moved or node < before:
            continue
        overload = isinstance(node.target, torch._ops.OpOverload)
        plain = not overload or not node.target._schema.is_mutable  # type: ignore[union-attr]  # an overload
        if node is before or node.op != "call_function" or node.is_impure() or not plain:
            return None
        moved.add(node)
        stack.extend(node.all_input_nodes)
    return moved


def lift(nodes: Iterable[Any], before: fx.Node) -> None:
    """Move what `pending` found in front of `before`, in its order."""
    moved = pending(nodes, before)
    if moved is None:
        raise ValueError(f"not all of what {before} needs can be known before it")
    for node in sorted(moved):
        before.prepend(node)


def parameters(node: fx.Node) -> list[Any]:
    """The inputs of a node without its state, the first."""
    return list(arguments(node).values())[1:]


def _mixes(node: fx.Node, state: fx.Node, refused: Refused) -> list[tuple[fx.Node, bool]]:
    """(a mix of the same state that can be computed with `node`, whether its gate is known before); those with a gate
    of `node` first."""
    found = []
    for mix in state.users:
        name = FORWARD_TARGETS.get(mix.target)
        if name not in ("pre", "pre_norm") or mix.args[0] is not state or refused(name, arguments(mix)):
            continue
        if name == "pre_norm" and any(user.users for user in result(mix, 2)):
            continue  # u is kept for a backward: with few tokens that is not worth a second form of the kernel
        gate, *rest = parameters(mix)
        known = gate not in result(node, 0)
        needed = [*parameters(node), *rest, *([gate] if known else [])]
        if pending(needed, min(node, mix)) is not None:
            found.append((mix, known))
    return sorted(found, key=lambda pair: pair[1])


def find(graph: fx.Graph, refused: Refused) -> list[FewTokens]:
    """Sites with at most `FEW` tokens whose coefficients and mix kernels take together. Changes nothing."""
    found: list[FewTokens] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if FORWARD_TARGETS.get(node.target) != "coefficients":
            continue
        named = arguments(node)
        state = named["x"]
        if hint(tokens_of(state.meta["val"])) > FEW or refused("coefficients", named):
            continue
        mixes = [pair for pair in _mixes(node, state, refused) if pair[0] not in taken]
        if not mixes:
            continue
        post: fx.Node | None = None
        if FORWARD_TARGETS.get(state.target) == "post" and state not in taken and not refused("post", arguments(state)):
            post = state if pending([named["phi"]], state) is not None else None
        found.append(FewTokens(node, *mixes[0], post))
        taken |= {state, mixes[0][0]}
    return found


def project(x: Tensor, phi: Tensor, flat: list[Any]) -> Tensor:
    """Partial sums by the kernel that does nothing else: for a state that no `post` makes."""
    from . import coefficients

    return coefficients.partials(x, phi, CoefficientSpec.from_op_arguments(dict(zip(ATTRIBUTES, flat, strict=True))))


def site(partial: Tensor, gate: Tensor | None, norm: list[Any], keep: list[bool], *args: Any) -> tuple[Tensor, ...]:
    """`args` are those of `mhc::coefficients` -> (out, statistics, pre, post, res, projection), each with the leading
    dimensions of the state; what `keep` (pre, projection) does not name is empty."""
    x, _, bias, alphas, _ = split_arguments(args)
    weight, norm_bias, *attributes = norm
    out, statistics, *rest = torch.ops.mhc_kernel.activate_pre_norm.default(
        partial, bias, alphas["pre"], alphas["post"], alphas["res"], x, gate, weight, norm_bias, *attributes, *keep,
        *args[6:],
    )  # fmt: skip
    batch = x.shape[:-2]
    kept = (keep[0], True, True, keep[1])
    rest = [value.reshape(*batch, *value.shape[1:]) if full else value for value, full in zip(rest, kept, strict=True)]
    return out, statistics.reshape(*batch, statistics.shape[1]), *rest


def _project(each: FewTokens, padded: int) -> fx.Node:
    """Insert the first launch; returns its partial sums."""
    named = arguments(each.coefficients)
    phi = named["phi"]
    if each.post is None:
        flat = [named[name] for name in ATTRIBUTES]
        partial: fx.Node = insert_function(min(each.coefficients, each.mix), project, [named["x"], phi, flat])
        return partial
    lift([phi], each.post)
    inputs = [*arguments(each.post).values(), phi, padded]
    state, partial = insert_function(each.post, torch.ops.mhc_kernel.post_project.default, inputs)
    replace(each.post, state)
    return partial


def _fuse(each: FewTokens) -> None:
    from .coefficients import padded_rows

    node, mix = each.coefficients, each.mix
    first = min(node, mix)
    gate, *norm = parameters(mix)
    lift([*parameters(node), *norm, *([gate] if each.known else [])], first)
    partial = _project(each, padded_rows(CoefficientSpec.from_op_arguments(arguments(node))))
    alone = FORWARD_TARGETS[mix.target] == "pre"
    norm = [None, None, "none", 0.0, 0.0, False] if alone else norm[:-1]  # without `keep`
    # The mix reads its own gate where it lies, in registers; who else reads it needs it in memory.
    keep = [any(user is not mix for pre in result(node, 0) for user in pre.users), bool(result(node, 3))]
    args = [partial, gate if each.known else None, norm, keep, *arguments(node).values()]
    outputs = insert_function(first, site, args)
    if alone:
        replace(mix, outputs[0])
    else:
        for unread in result(mix, 2):
            mix.graph.erase_node(unread)
        replace(mix, list(outputs[:2]))
    replace(node, list(outputs[2:]))


def merge(graph: fx.Graph, log: LoweringLog, refused: Refused) -> int:
    """Replace every site found by its two launches; returns how many. The state that a site begins with and no `post`
    makes takes a third, `project`; the last `post` of a chain stays."""
    from . import activate_pre_norm, post_project  # noqa: F401  # register the ops

    found = find(graph, refused)
    for each in found:
        nodes = [each.coefficients, each.mix, *([each.post] if each.post is not None else [])]
        for name in [FORWARD_TARGETS[node.target] for node in nodes]:
            log.record(name, "triton")
        _fuse(each)
        log.record("few tokens", "fused", "activate + pre" + (", post + project" if each.post is not None else ""))
    return len(found)


__all__ = ["FEW", "FewTokens", "find", "merge"]
