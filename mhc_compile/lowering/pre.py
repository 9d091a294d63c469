"""pre forward and the dot products of its backward. Traffic, n = 4: forward n + 1 = 5 u; dots n + 1 = 5 u."""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    by_token,
    kernel_op,
    launch_tuned,
    load_row,
    load_scalars,
    load_streams,
    nonempty,
    places,
    side_by_side,
    state_refusal,
    store_row,
    token_block,
    zeros,
)
from .post import INNER, post_config, post_others
from .pre_norm import mixed


def refusal(x: Tensor) -> str:
    """Why no kernel takes this `mhc::pre` call; empty if one does."""
    return state_refusal(x)


@triton.jit
def pre_kernel(x_ptr, pre_ptr, out_ptr, C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr) -> None:
    """Program: one block of channels of one token."""
    MASKED: tl.constexpr = C % BC != 0
    token, offsets = token_block(C, BC)
    mask = offsets < C
    p = load_scalars(pre_ptr + token * N, N)
    xs = load_streams(x_ptr, token, offsets, mask, C, N, MASKED)
    store_row(out_ptr, token * C, offsets, mixed(xs, p, N), mask, MASKED)


@triton.jit
def pre_dots_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    LANES: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """Program: one token, dh_pre_i = <du, X_i>."""
    BC: tl.constexpr = LANES * INNER
    MASKED: tl.constexpr = C % BC != 0
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    dp = zeros(NP, LANES)
    for block in tl.static_range((C + BC - 1) // BC):
        offsets = block * BC + lanes
        mask = offsets < C
        g = load_row(grad_ptr, token * C, offsets, mask, MASKED)
        new = ()
        for i in tl.static_range(NP):
            if i < N:
                x = load_row(x_ptr, (token * N + i) * C, offsets, mask, MASKED)
                new = new + (dp[i] + tl.sum(g * x, axis=1),)
            else:
                new = new + (dp[i],)
        dp = new
    stream = places(NP)
    sums = tl.sum(side_by_side(dp), axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * N + stream, sums, mask=stream < N)


def dots_config(width: int) -> dict[str, int]:
    """Two warps a token."""
    lanes = 64 if width >= 512 else 32
    return {"LANES": lanes, "INNER": INNER, "num_warps": lanes // 32}


def dots_others(width: int) -> list[dict[str, int]]:
    """From one warp a token to eight."""
    return [{"LANES": 32 * warps, "INNER": INNER, "num_warps": warps} for warps in (1, 2, 4, 8) if 32 * warps <= width]


@kernel_op("pre")
def forward(streams: Tensor, h_pre: Tensor) -> Tensor:
    """X [..., n, C], h_pre [..., n] -> u [..., C], by the kernel."""
    x, p = by_token(streams, 2), by_token(h_pre, 1)
    tokens, n, width = x.shape
    out = x.new_empty((tokens, width))
    if nonempty(tokens):
        launch_tuned(
            pre_kernel,
            lambda tokens, config: (tokens * triton.cdiv(width, config["BC"]),),
            x,
            p,
            out,
            C=width,
            N=n,
            config=post_config(width),
            others=functools.partial(post_others, width),
        )
    return out.view(*streams.shape[:-2], width)


@forward.register_fake
def _(streams: Tensor, h_pre: Tensor) -> Tensor:
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]))


@kernel_op("pre_dots")
def dots(grad: Tensor, streams: Tensor, h_pre: Tensor) -> Tensor:
    """du [..., C] -> dh_pre [..., n] in the dtype of h_pre, by the kernel."""
    g, x = by_token(grad, 1), by_token(streams, 2)
    tokens, n, width = x.shape
    out = h_pre.new_empty(h_pre.shape)
    if nonempty(tokens):
        launch_tuned(
            pre_dots_kernel, lambda tokens, _: (tokens,), g, x, out, C=width, N=n, NP=triton.next_power_of_2(n),
            config=dots_config(width), others=functools.partial(dots_others, width),
        )  # fmt: skip
    return out


@dots.register_fake
def _(grad: Tensor, streams: Tensor, h_pre: Tensor) -> Tensor:
    return h_pre.new_empty(h_pre.shape)


def backward(grad: Tensor, streams: Tensor, h_pre: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """The arguments of `mhc::pre_backward` -> its results (traced into the graph)."""
    d_streams, d_pre = streams.new_empty(0), h_pre.new_empty(0)
    if needs[0]:
        d_streams = torch.ops.mhc_kernel.streams_backward.default(
            streams, None, None, False, grad, h_pre, None, None, None
        )
    if needs[1]:
        d_pre = torch.ops.mhc_kernel.pre_dots.default(grad, streams, h_pre)
    return d_streams, d_pre
