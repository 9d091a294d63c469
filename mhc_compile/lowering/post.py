"""post forward and the dot products of its backward.

Forward: one program per token and block of channels; the n^2 + n coefficients are loaded before the channels (a load
inside
a loop over channels cannot be hoisted past the stores: 40 u became 13 u). Backward: one program of a few warps per
token walks over the channels with element-wise accumulators and reduces once; dX is left to `boundary`.
Traffic, n = 4: forward 2n + 1 = 9 u; dots (read dX', X, y; write dy) 2n + 2 = 10 u.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    by_token,
    chunk_of,
    is_row,
    kernel_op,
    launch_tuned,
    load_row,
    load_scalars,
    nonempty,
    places,
    side_by_side,
    site_row,
    state_refusal,
    store_row,
    stream_start,
    token_block,
    wide_streams,
    zeros,
)

INNER = 8
"""Neighbouring channels of one thread: 16 bytes of bf16. Summed inside the thread before the threads are."""


def refusal(x: Tensor, y: Tensor) -> str:
    """Why no kernel takes this `mhc::post` call; empty if one does."""
    return state_refusal(x, y)


@triton.jit
def post_kernel(
    x_ptr, y_ptr, post_ptr, res_ptr, out_ptr, C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
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
    for o in tl.static_range(N):
        total = site_row(xs, y, q, h, o, N, HAS_RES, TRANSPOSE)
        store_row(out_ptr, (token * N + o) * C, offsets, total, mask, MASKED)


@triton.jit
def post_dots_kernel(
    grad_ptr, x_ptr, y_ptr, post_ptr, dy_ptr, d_post_ptr, d_res_ptr, C: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr, TRANSPOSE: tl.constexpr, NEED_Y: tl.constexpr,
    NEED_RES: tl.constexpr, ALIKE: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one token. dy = sum_o q_o g_o;  dq_o = <g_o, y>;  dH[o, i] = <g_o, X_i>. ALIKE: g is one row."""
    BC: tl.constexpr = LANES * INNER
    MASKED: tl.constexpr = C % BC != 0
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    q = load_scalars(post_ptr + token * N, N)
    dq = zeros(NP, LANES)
    dh = zeros(NP * NP, LANES)
    for block in range((C + BC - 1) // BC):
        offsets = block * BC + lanes
        mask = offsets < C
        y = load_row(y_ptr, token * C, offsets, mask, MASKED)
        gs = ()
        xs = ()
        for i in tl.static_range(N):
            gs = gs + (load_row(grad_ptr, stream_start(token, i, C, N, ALIKE), offsets, mask, MASKED),)
            if NEED_RES:
                xs = xs + (load_row(x_ptr, (token * N + i) * C, offsets, mask, MASKED),)
        if NEED_Y:
            dy = q[0] * gs[0]
            for o in tl.static_range(1, N):
                dy += q[o] * gs[o]
            store_row(dy_ptr, token * C, offsets, dy, mask, MASKED)
        new_q = ()
        new_h = ()
        for o in tl.static_range(NP):
            if o < N:
                new_q = new_q + (dq[o] + tl.sum(gs[o] * y, axis=1),)
            else:
                new_q = new_q + (dq[o],)
            for i in tl.static_range(NP if NEED_RES else 0):
                if o < N and i < N:
                    new_h = new_h + (dh[o * NP + i] + tl.sum(gs[o] * xs[i], axis=1),)
                else:
                    new_h = new_h + (dh[o * NP + i],)
        dq = new_q
        if NEED_RES:
            dh = new_h
    stream = places(NP)
    d_post = tl.sum(side_by_side(dq), axis=0).to(d_post_ptr.dtype.element_ty)
    tl.store(d_post_ptr + token * N + stream, d_post, mask=stream < N)
    if NEED_RES:
        cell = places(NP * NP)
        o = cell // NP
        i = cell % NP
        place = i * N + o if TRANSPOSE else o * N + i
        d_res = tl.sum(side_by_side(dh), axis=0).to(d_res_ptr.dtype.element_ty)
        tl.store(d_res_ptr + token * (N * N) + place, d_res, mask=(o < N) & (i < N))


def post_config(width: int) -> dict[str, int]:
    """One block of up to 1024 channels, 16 bytes a thread."""
    block = chunk_of(width)
    return {"BC": block, "num_warps": max(1, min(4, block // 256))}


def post_others(width: int) -> list[dict[str, int]]:
    """Blocks from one warp to eight; none that masks lanes where the fixed one does not."""
    blocks = [(256, 1), (512, 2), (1024, 2), (2048, 8)]
    masked = width % post_config(width)["BC"]
    return [{"BC": block, "num_warps": warps} for block, warps in blocks if masked or width % block == 0]


def dots_config(width: int) -> dict[str, int]:
    """Two warps a token; more would spend their time in the reductions."""
    lanes = 64 if width >= 512 else 32
    return {"LANES": lanes, "INNER": INNER, "num_warps": lanes // 32}


def dots_others(width: int) -> list[dict[str, int]]:
    """One warp a token, two, or four."""
    pairs = ((32, INNER), (64, INNER), (128, INNER), (128, 4))
    return [{"LANES": lanes, "INNER": inner, "num_warps": lanes // 32} for lanes, inner in pairs if lanes <= width]


@kernel_op("post")
def forward(streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool) -> Tensor:
    """The arguments of `mhc::post` -> X', by the kernel."""
    x, branch, q = by_token(streams, 2), by_token(y, 1), by_token(h_post, 1)
    tokens, n, width = x.shape
    out = torch.empty_like(x, dtype=torch.promote_types(streams.dtype, y.dtype))
    if nonempty(tokens):
        h = q if h_res is None else by_token(h_res, 2)
        launch_tuned(
            post_kernel,
            lambda tokens, config: (tokens * triton.cdiv(width, config["BC"]),),
            x,
            branch,
            q,
            h,
            out,
            C=width,
            N=n,
            HAS_RES=h_res is not None,
            TRANSPOSE=transpose,
            config=post_config(width),
            others=functools.partial(post_others, width),
        )
    return out.view(streams.shape)


@forward.register_fake
def _(streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool) -> Tensor:
    return streams.new_empty(streams.shape, dtype=torch.promote_types(streams.dtype, y.dtype))


@kernel_op("post_dots")
def dots(
    grad: Tensor, streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dX' [..., n, C], or [..., C] where every stream has the same, -> (dy, dh_post, dh_res); dy is empty unless
    `need_y`, dh_res is empty without h_res."""
    alike = is_row(grad, streams)
    g, x, branch, q = by_token(grad, 1 if alike else 2), by_token(streams, 2), by_token(y, 1), by_token(h_post, 1)
    tokens, n, width = x.shape
    dy = torch.empty_like(branch) if need_y else branch.new_empty(0)
    d_post = torch.empty_like(q)
    d_res = q.new_empty(0) if h_res is None else torch.empty_like(h_res, memory_format=torch.contiguous_format)
    if nonempty(tokens):
        launch_tuned(
            post_dots_kernel, lambda tokens, _: (tokens,),
            g, x, branch, q, dy, d_post, d_res, C=width, N=n, NP=triton.next_power_of_2(n), TRANSPOSE=transpose,
            NEED_Y=need_y, NEED_RES=h_res is not None, ALIKE=alike, config=dots_config(width),
            others=functools.partial(dots_others, width),
        )  # fmt: skip
    return dy.view(y.shape) if need_y else dy, d_post.view(h_post.shape), d_res


@dots.register_fake
def _(
    grad: Tensor, streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        y.new_empty(y.shape if need_y else 0),
        h_post.new_empty(h_post.shape),
        h_post.new_empty(0) if h_res is None else h_res.new_empty(h_res.shape),
    )


def backward(
    grad: Tensor,
    streams: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor | None,
    transpose: bool,
    needs: list[bool],
) -> tuple[Any, ...]:
    """The arguments of `mhc::post_backward` -> its results (traced into the graph)."""
    dy, d_post, d_res = y, h_post, h_res
    d_streams = streams.new_empty(0)
    if any(needs[1:]):
        dy, d_post, d_res = torch.ops.mhc_kernel.post_dots.default(
            grad, streams, y, h_post, h_res, transpose, bool(needs[1])
        )
    if needs[0]:
        d_streams = torch.ops.mhc_kernel.streams_backward.default(
            streams, grad, h_res, transpose, None, None, None, None, None
        )
    empty_res = (h_post if h_res is None else h_res).new_empty(0)
    return (
        d_streams,
        dy if needs[1] else y.new_empty(0),
        d_post if needs[2] else h_post.new_empty(0),
        d_res if needs[3] and h_res is not None else empty_res,
    )
