"""A block of sites rebuilt by one kernel: the states between two boundaries, from what the plan of recompute keeps.

The backward graph of a model with a recompute plan holds runs of `post` whose branch outputs and coefficients are all
saved: X_{l+1} = H_l X_l + q_l y_l, l = 0 .. k - 1. One program takes a token's block of channels through up to `MOST`
sites; the streams stay in registers (rounded after each site, as `post` rounds them: the same bits), and every state
that the backward reads is written once.
Traffic, n = 4, k sites: n + k (n + 1) = 24 u for k = 4, where k calls of `post` move 36.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from .base import FORWARD_TARGETS, LoweringLog, arguments
from .inline import insert_function
from .launch import (
    by_token,
    kernel_op,
    launch_tuned,
    load_row,
    load_scalars,
    nonempty,
    site_row,
    store_row,
    token_block,
    wide_streams,
)
from .post import post_config, post_others

MOST = 4
"""Sites of one call."""


@triton.jit
def one_site(
    xs, y_ptr, post_ptr, res_ptr, out_ptr, token, offsets, mask, C: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr, HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The streams of one block of channels behind a site, written and returned as they were written."""
    q = load_scalars(post_ptr + token * N, N)
    h = load_scalars(res_ptr + token * (N * N), N * N if HAS_RES else 0)
    y = load_row(y_ptr, token * C, offsets, mask, MASKED)
    outs = ()
    for o in tl.static_range(N):
        total = site_row(xs, y, q, h, o, N, HAS_RES, TRANSPOSE)
        store_row(out_ptr, (token * N + o) * C, offsets, total, mask, MASKED)
        outs = outs + (total.to(out_ptr.dtype.element_ty).to(tl.float32),)
    return outs


@triton.jit
def replay_kernel(
    x_ptr, y0, y1, y2, y3, q0, q1, q2, q3, h0, h1, h2, h3, out0, out1, out2, out3, C: tl.constexpr, N: tl.constexpr,
    BC: tl.constexpr, SITES: tl.constexpr, HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one block of channels of one token, all streams, SITES sites."""
    MASKED: tl.constexpr = C % BC != 0
    token, offsets = token_block(C, BC)
    mask = offsets < C
    xs = wide_streams(x_ptr, token, offsets, mask, C, N, MASKED)
    xs = one_site(xs, y0, q0, h0, out0, token, offsets, mask, C, N, MASKED, HAS_RES, TRANSPOSE)
    if SITES > 1:
        xs = one_site(xs, y1, q1, h1, out1, token, offsets, mask, C, N, MASKED, HAS_RES, TRANSPOSE)
    if SITES > 2:
        xs = one_site(xs, y2, q2, h2, out2, token, offsets, mask, C, N, MASKED, HAS_RES, TRANSPOSE)
    if SITES > 3:
        xs = one_site(xs, y3, q3, h3, out3, token, offsets, mask, C, N, MASKED, HAS_RES, TRANSPOSE)


@kernel_op("replay")
def forward(
    streams: Tensor, ys: list[Tensor], posts: list[Tensor], mixes: list[Tensor], transpose: bool
) -> list[Tensor]:
    """X_0 [..., n, C]; branch outputs [..., C] and coefficients of up to `MOST` sites in order (no mixes: identity) ->
    the states behind each of them, in the dtype of X_0."""
    x = by_token(streams, 2)
    tokens, n, width = x.shape
    outs = [torch.empty_like(x) for _ in ys]
    if nonempty(tokens):

        def four(values: list[Tensor], trailing: int) -> list[Tensor]:
            given = [by_token(value, trailing) for value in values] or [x]
            return [given[min(index, len(given) - 1)] for index in range(MOST)]

        launch_tuned(
            replay_kernel, lambda tokens, config: (tokens * triton.cdiv(width, config["BC"]),), x, *four(ys, 1),
            *four(posts, 1), *four(mixes, 2), *[outs[min(index, len(outs) - 1)] for index in range(MOST)], C=width, N=n,
            SITES=len(ys), HAS_RES=bool(mixes), TRANSPOSE=transpose,
            config=post_config(width), others=functools.partial(post_others, width),
        )  # fmt: skip
    return [out.view(streams.shape) for out in outs]


@forward.register_fake
def _(streams: Tensor, ys: list[Tensor], posts: list[Tensor], mixes: list[Tensor], transpose: bool) -> list[Tensor]:
    return [streams.new_empty(streams.shape) for _ in ys]


# ------------------------------------------------------------------------------------------------ finding the runs
def reader(state: fx.Node, first: fx.Node, name: str) -> fx.Node | None:
    """The op `name` of a state that needs nothing else but what is there before `first`, where the run begins."""
    for user in state.users:
        if FORWARD_TARGETS.get(user.target) != name or user.args[0] is not state:
            continue
        if all(other is state or other < first for other in user.all_input_nodes):
            return user
    return None


def find(graph: fx.Graph) -> list[list[fx.Node]]:
    """Runs of two or more `post` that need nothing computed between them, in graph order. Changes nothing."""
    runs: list[list[fx.Node]] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if FORWARD_TARGETS.get(node.target) != "post" or node in taken:
            continue
        run = [node]
        while (following := reader(run[-1], node, "post")) is not None and _alike(node, following):
            run.append(following)
        if len(run) > 1:
            runs.append(run)
            taken.update(run)
    return runs


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """One kernel serves both: the same dtype all through, both with H or both without, read the same way."""
    first, second = arguments(a), arguments(b)
    dtypes = {value.meta["val"].dtype for value in (a, b, first["streams"], first["y"], second["y"])}
    same = (first["h_res"] is None) == (second["h_res"] is None) and first["transpose"] == second["transpose"]
    return len(dtypes) == 1 and same


def merge(graph: fx.Graph, log: LoweringLog, refused: Callable[[str, dict[str, Any]], str]) -> int:
    """Replace every run by calls of `MOST` sites at most; returns how many calls. `refused(name, named)` gives the
    reason why no kernel takes a node."""
    calls = 0
    for run in find(graph):
        if any(refused("post", arguments(node)) for node in run):
            continue
        while len(run) > 1:
            part, run = run[:MOST], run[MOST:]
            _replace(part)
            log.record("replay", "fused", f"{len(part)} sites")
            calls += 1
    return calls


def _replace(part: list[fx.Node]) -> None:
    named = [arguments(node) for node in part]
    transpose = named[0]["transpose"]
    mixes = [] if named[0]["h_res"] is None else [each["h_res"] for each in named]
    args = (named[0]["streams"], [each["y"] for each in named], [each["h_post"] for each in named], mixes, transpose)
    outputs = insert_function(part[0], torch.ops.mhc_kernel.replay.default, args)
    for node, output in zip(part, outputs, strict=True):
        node.replace_all_uses_with(output)
    for node in reversed(part):
        node.graph.erase_node(node)


__all__ = ["MOST", "find", "forward", "merge", "reader"]
