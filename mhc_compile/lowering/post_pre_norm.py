"""post of one site with pre and norm of the next, where the next site's gate is known before its streams are.

That is so in `single_pass` (V4.1), whose sites mix with the coefficients of the site before. One program a token writes
X' and keeps the mixed row in registers for the norm, so that X' is not read again.
Traffic, n = 4: X, y -> X', out (and u where its backward wants it): 2n + 2 = 10 u (11 u), where post and pre_norm on
their own move 14 (15).
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from .base import FORWARD_TARGETS, LoweringLog, arguments
from .inline import insert_function, replace
from .launch import by_token, kernel_op, launch, load_row, load_scalars, nonempty, site_row, store_row
from .pre_norm import columns, config, mixed, write_normed


@triton.jit
def post_pre_norm_kernel(
    x_ptr, y_ptr, post_ptr, res_ptr, pre_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr, statistics_ptr, mixed_ptr,
    C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr,
    KEEP: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one token."""
    MASKED: tl.constexpr = C % BC != 0
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    token = tl.program_id(0).to(tl.int64)
    q = load_scalars(post_ptr + token * N, N)
    p = load_scalars(pre_ptr + token * N, N)
    h = load_scalars(res_ptr + token * (N * N), N * N if HAS_RES else 0)
    lanes = tl.arange(0, BC)
    us = ()
    total = tl.zeros((BC,), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        offsets = block * BC + lanes
        y = load_row(y_ptr, token * C, offsets, offsets < C, MASKED)
        xs = ()
        for i in tl.static_range(N):
            xs = xs + (load_row(x_ptr, (token * N + i) * C, offsets, offsets < C, MASKED),)
        outs = ()
        for o in tl.static_range(N):
            value = site_row(xs, y, q, h, o, N, HAS_RES, TRANSPOSE)
            outs = outs + (value.to(state_ptr.dtype.element_ty),)
        for o in tl.static_range(N):
            store_row(state_ptr, (token * N + o) * C, offsets, outs[o], offsets < C, MASKED)
        u = mixed(outs, p, N)
        if KEEP:
            store_row(mixed_ptr, token * C, offsets, u, offsets < C, MASKED)
        us = us + (u,)
        total += u if LAYER else u * u
    write_normed(
        us,
        (),
        total,
        weight_ptr,
        bias_ptr,
        out_ptr,
        statistics_ptr,
        token,
        C,
        BC,
        LAYER,
        EPS,
        OFFSET,
        ROUND,
        WEIGHT,
        BIAS,
    )


@kernel_op("post_pre_norm")
def forward(
    streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, h_pre: Tensor,
    weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, offset: float, round_first: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments of `mhc::post`, then those of `mhc::pre_norm` after its first -> (X', out, statistics, u or
    empty)."""
    x, branch, q, p = by_token(streams, 2), by_token(y, 1), by_token(h_post, 1), by_token(h_pre, 1)
    tokens, n, width = x.shape
    state = torch.empty_like(x, dtype=torch.promote_types(streams.dtype, y.dtype))
    out = state.new_empty((tokens, width))
    kept = torch.empty_like(out) if keep else state.new_empty(0)
    statistics = torch.empty((tokens, columns(kind)), dtype=torch.float32, device=x.device)
    if nonempty(tokens):
        launch(
            post_pre_norm_kernel, (tokens,), x, branch, q, q if h_res is None else by_token(h_res, 2), p,
            x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), state, out,
            statistics, kept, C=width, N=n, HAS_RES=h_res is not None, TRANSPOSE=transpose, KEEP=keep,
            LAYER=kind == "layer", EPS=eps, OFFSET=offset, ROUND=round_first, WEIGHT=weight is not None,
            BIAS=bias is not None, **config(width),
        )  # fmt: skip
    batch = streams.shape[:-2]
    statistics = statistics.view(*batch, columns(kind))
    return state.view(streams.shape), out.view(*batch, width), statistics, kept.view(*batch, width) if keep else kept


@forward.register_fake
def _(
    streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, h_pre: Tensor,
    weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, offset: float, round_first: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, dtype = streams.shape[:-2], torch.promote_types(streams.dtype, y.dtype)
    return (
        streams.new_empty(streams.shape, dtype=dtype),
        streams.new_empty((*batch, streams.shape[-1]), dtype=dtype),
        streams.new_empty((*batch, columns(kind)), dtype=torch.float32),
        streams.new_empty((*batch, streams.shape[-1]) if keep else 0, dtype=dtype),
    )


def find(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """(post, pre_norm) where all that the norm needs beside X' is there before X' is. Changes nothing."""
    found = []
    for node in graph.nodes:
        if FORWARD_TARGETS.get(node.target) != "pre_norm":
            continue
        state = node.args[0]
        if not isinstance(state, fx.Node) or FORWARD_TARGETS.get(state.target) != "post":
            continue
        if all(other is state or other < state for other in node.all_input_nodes):
            found.append((state, node))
    return found


def merge(graph: fx.Graph, log: LoweringLog, refused: Any) -> int:
    """Replace every pair found that kernels take by one call; returns how many. `refused(name, named)` gives the reason
    why no kernel takes a node."""
    merged: set[fx.Node] = set()
    for state, node in find(graph):
        named, after = arguments(state), arguments(node)
        if state in merged or refused("post", named) or refused("pre_norm", after):
            continue
        values = [*named.values(), *list(after.values())[1:]]
        outputs = insert_function(state, torch.ops.mhc_kernel.post_pre_norm.default, values)
        replace(node, list(outputs[1:]))
        replace(state, outputs[0])
        merged.add(state)
        log.record("post + pre_norm", "fused", "single_pass: the gate is known before the streams")
    return len(merged)


__all__ = ["find", "forward", "merge"]
