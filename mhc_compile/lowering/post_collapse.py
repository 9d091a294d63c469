"""The last post of a chain and the collapse of what it makes, in one kernel: the last state is never written.

Each stream is rounded as it would be in memory before it is added, in the order of the streams: the bits of the two
ops.
Traffic, n = 4: X 4, y 1 -> out 1: n + 2 = 6 u, where the two move 14.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from mhc_compile.ops.collapse import scale

from .base import FORWARD_TARGETS, LoweringLog, arguments
from .inline import insert_function, replace
from .launch import (
    by_token,
    kernel_op,
    launch,
    load_row,
    load_scalars,
    nonempty,
    site_row,
    store_row,
    token_block,
    wide_streams,
)
from .post import post_config


@triton.jit
def post_collapse_kernel(
    x_ptr, y_ptr, post_ptr, res_ptr, out_ptr, SCALE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
    HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one block of channels of one token, all streams."""
    MASKED: tl.constexpr = C % BC != 0
    token, offsets = token_block(C, BC)
    mask = offsets < C
    q = load_scalars(post_ptr + token * N, N)
    h = load_scalars(res_ptr + token * (N * N), N * N if HAS_RES else 0)
    y = load_row(y_ptr, token * C, offsets, mask, MASKED)
    xs = wide_streams(x_ptr, token, offsets, mask, C, N, MASKED)
    total = tl.zeros((BC,), dtype=tl.float32)
    for o in tl.static_range(N):
        row = site_row(xs, y, q, h, o, N, HAS_RES, TRANSPOSE)
        total += row.to(out_ptr.dtype.element_ty).to(tl.float32)
    store_row(out_ptr, token * C, offsets, total * SCALE, mask, MASKED)


@kernel_op("post_collapse")
def forward(streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, kind: str) -> Tensor:
    """The arguments of `mhc::post`, then the kind of `mhc::collapse` -> its result [..., C]."""
    x, branch, q = by_token(streams, 2), by_token(y, 1), by_token(h_post, 1)
    tokens, n, width = x.shape
    out = torch.empty_like(branch, dtype=torch.promote_types(streams.dtype, y.dtype))
    if nonempty(tokens):
        settings = post_config(width)
        launch(
            post_collapse_kernel, (tokens * triton.cdiv(width, settings["BC"]),), x, branch, q,
            q if h_res is None else by_token(h_res, 2), out, SCALE=scale(kind, n), C=width, N=n,
            HAS_RES=h_res is not None, TRANSPOSE=transpose, **settings,
        )  # fmt: skip
    return out.view(y.shape)


@forward.register_fake
def _(streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, kind: str) -> Tensor:
    return y.new_empty(y.shape, dtype=torch.promote_types(streams.dtype, y.dtype))


def find(graph: fx.Graph, refused: Callable[[str, dict[str, Any]], str]) -> list[tuple[fx.Node, fx.Node]]:
    """(post, collapse) where nobody else reads the state between them, on the semantic ops. Changes nothing."""
    found = []
    for node in graph.nodes:
        if FORWARD_TARGETS.get(node.target) != "collapse":
            continue
        state = node.args[0]
        alone = FORWARD_TARGETS.get(state.target) == "post" and len(state.users) == 1
        if alone and not refused("post", arguments(state)):
            found.append((state, node))
    return found


def merge(graph: fx.Graph, log: LoweringLog, refused: Callable[[str, dict[str, Any]], str]) -> int:
    """Replace every pair found by one call; returns how many."""
    pairs = find(graph, refused)
    for post, collapse in pairs:
        values = [*arguments(post).values(), arguments(collapse)["kind"]]
        replace(collapse, insert_function(collapse, torch.ops.mhc_kernel.post_collapse.default, values))
        graph.erase_node(post)
        for name in ("post", "collapse"):
            log.record(name, "triton")
        log.record("post + collapse", "fused", "the last state is not written")
    return len(pairs)


__all__ = ["find", "forward", "merge"]
