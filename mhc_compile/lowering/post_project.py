"""post of one site with the partial projection of the next, for few tokens: the first of the two launches of a site.

With few tokens a kernel costs its latency, and phi is most of what is read. A program takes a tile of tokens and one
block of channels, all streams: it writes X', and multiplies X', rounded as it was written, with its columns of phi,
which it splits into two halves itself. What it sums lies in the same partial sums as `project` writes.
Bytes, n = 4: 2n + 1 = 9 numbers a token and channel, and 4 n K C of phi.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import by_token, dot, kernel_op, launch, nonempty, site_row, tokens_of


@triton.jit
def column_of(pointer, offsets, there) -> tl.tensor:
    """One coefficient of every token of a tile, [BT] -> [1, BT, 1] float32. Loaded as a vector: a thread that holds
    several channels of a row would load a column as often."""
    return tl.load(pointer + offsets, mask=there, other=0.0).to(tl.float32)[None, :, None]


@triton.jit
def post_project_kernel(
    x_ptr, y_ptr, post_ptr, res_ptr, phi_ptr, state_ptr, out_ptr, tokens, C: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, WARPS: tl.constexpr,
    HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr, TWO: tl.constexpr,
) -> None:  # fmt: skip
    """Program (t, s): BT tokens, stream s % N and WARPS blocks of BC channels -> X' and out[s, token, :K], and the
    squares of X' in column K. Each warp multiplies a block of its own: nothing is kept twice."""
    line = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = line < tokens
    rows = line[None, :, None]
    stream = tl.program_id(1) % N
    first = tl.program_id(1) // N * (WARPS * BC) + tl.arange(0, WARPS) * BC
    columns = first[:, None, None] + tl.arange(0, BC)[None, None, :]
    mask = (rows < tokens) & (columns < C)
    # All of memory is asked for before the first result is written: no load may pass a store.
    xs = ()
    for i in tl.static_range(N if HAS_RES else 1):
        source = i if HAS_RES else stream
        xs = xs + (tl.load(x_ptr + (rows * N + source) * C + columns, mask=mask, other=0.0).to(tl.float32),)
    y = tl.load(y_ptr + rows * C + columns, mask=mask, other=0.0).to(tl.float32)
    q = (column_of(post_ptr, line * N + stream, exists),)
    h = ()
    for i in tl.static_range(N if HAS_RES else 0):
        cell = i * N + stream if TRANSPOSE else stream * N + i
        h = h + (column_of(res_ptr, line * (N * N) + cell, exists),)
    ks = tl.arange(0, KP)[None, None, :]
    inner = first[:, None, None] + tl.arange(0, BC)[None, :, None]
    phi_mask = (ks < K) & (inner < C)
    phi = tl.load(phi_ptr + ks * (N * C) + stream * C + inner, mask=phi_mask, other=0.0)
    value = site_row(xs, y, q, h, 0, N, HAS_RES, False).to(state_ptr.dtype.element_ty)
    value = tl.where(mask, value, 0.0)
    tl.store(state_ptr + (rows * N + stream) * C + columns, value, mask=mask)
    phi = phi.to(tl.float32)
    hi = phi.to(state_ptr.dtype.element_ty)
    acc = dot(value, hi, tl.zeros((WARPS, BT, KP), dtype=tl.float32))
    if TWO:
        acc = dot(value, (phi - hi.to(tl.float32)).to(state_ptr.dtype.element_ty), acc)
    wide = value.to(tl.float32)
    squares = tl.sum(tl.sum(wide * wide, axis=2), axis=0)
    total = tl.where(tl.arange(0, KP)[None, :] == K, squares[:, None], tl.sum(acc, axis=0))
    place = (tl.program_id(1).to(tl.int64) * tokens + line)[:, None] * KP + tl.arange(0, KP)[None, :]
    tl.store(out_ptr + place, total, mask=exists[:, None])


def config(padded: int) -> dict[str, int]:
    """Tile and warps, the same for every number of tokens, since the partial sums have the splits as a dimension: up to
    64 floats of phi a thread, all of them on their way at once."""
    warps = 8
    return {"BT": 16, "BC": 32 if padded <= 32 else 16, "WARPS": warps, "num_warps": warps}


def splits_of(width: int, streams: int, padded: int) -> int:
    """S, the parts of the streams and channels."""
    settings = config(padded)
    return streams * int(triton.cdiv(width, settings["WARPS"] * settings["BC"]))


@kernel_op("post_project")
def forward(
    streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, phi: Tensor, padded: int
) -> tuple[Tensor, Tensor]:
    """The arguments of `mhc::post`, the next site's phi [K, nC] and its KP -> (X', partial sums [S, T, KP]): column
    k < K of phi, column K of the squares."""
    x, branch, q = by_token(streams, 2), by_token(y, 1), by_token(h_post, 1)
    tokens, n, width = x.shape
    state = torch.empty_like(x, dtype=torch.promote_types(streams.dtype, y.dtype))
    splits = splits_of(width, n, padded)
    out = torch.empty((splits, tokens, padded), dtype=torch.float32, device=x.device)
    if nonempty(tokens):
        settings = config(padded)
        launch(
            post_project_kernel, (triton.cdiv(tokens, settings["BT"]), splits), x, branch, q,
            q if h_res is None else by_token(h_res, 2), phi.contiguous(), state, out, tokens, C=width, N=n,
            K=phi.shape[0], KP=padded, HAS_RES=h_res is not None, TRANSPOSE=transpose,
            TWO=state.dtype not in (torch.float32, phi.dtype), **settings,
        )  # fmt: skip
    return state.view(streams.shape), out


@forward.register_fake
def _(
    streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, phi: Tensor, padded: int
) -> tuple[Tensor, Tensor]:
    n, width = streams.shape[-2:]
    return (
        streams.new_empty(streams.shape, dtype=torch.promote_types(streams.dtype, y.dtype)),
        streams.new_empty((splits_of(width, n, padded), tokens_of(streams), padded), dtype=torch.float32),
    )


__all__ = ["config", "forward", "splits_of"]
