"""A block of sites with their branch inputs rebuilt by one kernel: what the backward of a recompute plan reads of it.

`replay` makes the states alone. Where the norm of the next branch is one op with its `pre`, the backward reads its
result as well: X_{l+1} = H_l X_l + q_l y_l and norm(h_pre_{l+1} X_{l+1}), all gates saved. One program holds the whole
row of a token, n streams of C channels, in registers and takes it through up to `MOST` sites. The streams lie there in
their own dtype (what is rounded after each site, as `post` rounds it, loses nothing), every state that the backward
reads is written once, and the norm has the row to itself: block of channels, warps and order of sums are those of
`pre_norm` and `post_pre_norm`, hence the bits. What the next site needs is asked for before the norm waits for its sum.
Traffic, n = 4, k sites: n + k (n + 2) = 28 u for k = 4, where k calls of `post_pre_norm` move 40.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    INTERPRETED,
    by_token,
    kernel_op,
    launch,
    load_raw,
    load_scalars,
    load_streams,
    nonempty,
    site_row,
    state_refusal,
    store_row,
)
from .pre_norm import columns, config, mixed, write_normed
from .replay import MOST

_PLAIN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def branch_rows(pointer, token, C: tl.constexpr, BC: tl.constexpr) -> tl.tensor:
    """A token's branch output in blocks of channels, in its own dtype."""
    MASKED: tl.constexpr = C % BC != 0
    rows = ()
    for block in tl.static_range((C + BC - 1) // BC):
        offsets = block * BC + tl.arange(0, BC)
        rows = rows + (load_raw(pointer + token * C, 0, offsets, offsets < C, MASKED),)
    return rows


@triton.jit
def coefficients_of(
    post_ptr, res_ptr, pre_ptr, token, N: tl.constexpr, HAS_RES: tl.constexpr, NORMED: tl.constexpr
) -> tl.tensor:
    """H_post, H_res and the gate of a site's norm, one after the other."""
    q = load_scalars(post_ptr + token * N, N)
    h = load_scalars(res_ptr + token * (N * N), N * N if HAS_RES else 0)
    return q, h, load_scalars(pre_ptr + token * N, N if NORMED else 0)


@triton.jit
def held(rows, DTYPE: tl.constexpr) -> tl.tensor:
    """Float32 rows rounded to `DTYPE`, those of a 16-bit type in pairs, one int32 for two numbers: left alone, each
    would have a register of its own."""
    kept = ()
    if _PLAIN or tl.float32 == DTYPE:
        for index in tl.static_range(len(rows)):
            kept = kept + (rows[index].to(DTYPE),)
    else:
        for pair in tl.static_range(len(rows) // 2):
            kept = kept + (
                tl.inline_asm_elementwise(
                    "cvt.rn.bf16x2.f32 $0, $2, $1;" if tl.bfloat16 == DTYPE else "cvt.rn.f16x2.f32 $0, $2, $1;",
                    "=r,f,f", [rows[2 * pair], rows[2 * pair + 1]], dtype=tl.int32, is_pure=True, pack=1,
                ),
            )  # fmt: skip
        if len(rows) % 2 == 1:
            kept = kept + (rows[len(rows) - 1].to(DTYPE),)
    return kept


@triton.jit
def rows_of(kept, N: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """The N rows that `held` took, in `DTYPE`."""
    rows = ()
    if len(kept) == N:
        rows = kept
    else:
        for pair in tl.static_range(N // 2):
            rows = rows + ((kept[pair] & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True),)
            rows = rows + ((kept[pair] >> 16).to(tl.int16).to(DTYPE, bitcast=True),)
        if N % 2 == 1:
            rows = rows + (kept[N // 2],)
    return rows


@triton.jit
def float32(rows) -> tl.tensor:
    """Rows as float32."""
    wide = ()
    for index in tl.static_range(len(rows)):
        wide = wide + (rows[index].to(tl.float32),)
    return wide


@triton.jit
def taken_up(kept, N: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """The N rows that `held` took, in float32, for the next site.

    Spelled unlike what the norm of this site reads: spelled alike, the compiler keeps the norm's float32 rows for the
    next site, a register a number, across the reduction (163 registers where 128 do).
    """
    rows = ()
    if len(kept) == N or tl.bfloat16 != DTYPE:
        rows = float32(rows_of(kept, N, DTYPE))
    else:
        for pair in tl.static_range(N // 2):
            rows = rows + (
                tl.inline_asm_elementwise(
                    "prmt.b32 $0, $1, 0, 0x1044;", "=f,r", [kept[pair]], dtype=tl.float32, is_pure=True, pack=1
                ),
                tl.inline_asm_elementwise(
                    "prmt.b32 $0, $1, 0, 0x3244;", "=f,r", [kept[pair]], dtype=tl.float32, is_pure=True, pack=1
                ),
            )
        if N % 2 == 1:
            rows = rows + (kept[N // 2].to(tl.float32),)
    return rows


@triton.jit
def behind_site(
    xs, ys, coefficients, state_ptr, mixed_ptr, token, C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
    HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr, NORMED: tl.constexpr, WRITTEN: tl.constexpr, KEEP: tl.constexpr,
    LAYER: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The streams behind a site, rounded; u in blocks; its element-wise sums, of squares or (LAYER) of values."""
    MASKED: tl.constexpr = C % BC != 0
    DTYPE: tl.constexpr = state_ptr.dtype.element_ty
    q, h, p = coefficients
    lanes = tl.arange(0, BC)
    outs = ()
    us = ()
    total = tl.zeros((BC,), dtype=tl.float32)
    for block in tl.static_range((C + BC - 1) // BC):
        offsets = block * BC + lanes
        y = ys[block].to(tl.float32)
        before = taken_up(xs[block], N, DTYPE)
        sums = ()
        for o in tl.static_range(N):
            sums = sums + (site_row(before, y, q, h, o, N, HAS_RES, TRANSPOSE),)
        kept = held(sums, DTYPE)
        after = rows_of(kept, N, DTYPE)
        if WRITTEN:
            for o in tl.static_range(N):
                store_row(state_ptr + token * (N * C), o * C, offsets, after[o], offsets < C, MASKED)
        if NORMED:
            u = mixed(after, p, N)
            if KEEP:
                store_row(mixed_ptr + token * C, 0, offsets, u, offsets < C, MASKED)
            us = us + (u,)
            total += u if LAYER else u * u
        outs = outs + (kept,)
    return outs, us, total


@triton.jit
def replay_normed_kernel(
    x_ptr, y0, y1, y2, y3, q0, q1, q2, q3, h0, h1, h2, h3, p0, p1, p2, p3, w0, w1, w2, w3, b0, b1, b2, b3, state0,
    state1, state2, state3, out0, out1, out2, out3, statistics0, statistics1, statistics2, statistics3, mixed0, mixed1,
    mixed2, mixed3, C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, SITES: tl.constexpr, NORMED: tl.constexpr,
    WRITTEN: tl.constexpr, HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr, KEEP: tl.constexpr, LAYER: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one token, SITES sites. NORMED, WRITTEN: bit l is set where site l has a norm, where its state is
    wanted."""
    MASKED: tl.constexpr = C % BC != 0
    token = tl.program_id(0).to(tl.int64)
    y_ptrs = (y0, y1, y2, y3)
    q_ptrs = (q0, q1, q2, q3)
    h_ptrs = (h0, h1, h2, h3)
    p_ptrs = (p0, p1, p2, p3)
    w_ptrs = (w0, w1, w2, w3)
    b_ptrs = (b0, b1, b2, b3)
    state_ptrs = (state0, state1, state2, state3)
    out_ptrs = (out0, out1, out2, out3)
    statistics_ptrs = (statistics0, statistics1, statistics2, statistics3)
    mixed_ptrs = (mixed0, mixed1, mixed2, mixed3)
    coefficients = coefficients_of(q0, h0, p0, token, N, HAS_RES, NORMED % 2 == 1)
    xs = ()
    for block in tl.static_range((C + BC - 1) // BC):
        offsets = block * BC + tl.arange(0, BC)
        rows = load_streams(x_ptr + token * (N * C), 0, offsets, offsets < C, C, N, MASKED)
        xs = xs + (held(float32(rows), x_ptr.dtype.element_ty),)
    ys = branch_rows(y0, token, C, BC)
    for site in tl.static_range(SITES):
        xs, us, total = behind_site(
            xs, ys, coefficients, state_ptrs[site], mixed_ptrs[site], token, C, N, BC, HAS_RES, TRANSPOSE,
            (NORMED >> site) % 2 == 1, (WRITTEN >> site) % 2 == 1, KEEP, LAYER,
        )  # fmt: skip
        if site + 1 < SITES:
            ys = branch_rows(y_ptrs[site + 1], token, C, BC)
            coefficients = coefficients_of(
                q_ptrs[site + 1], h_ptrs[site + 1], p_ptrs[site + 1], token, N, HAS_RES,
                (NORMED >> (site + 1)) % 2 == 1,
            )  # fmt: skip
        if (NORMED >> site) % 2 == 1:
            write_normed(
                us, (), total, w_ptrs[site], b_ptrs[site], out_ptrs[site] + token * C,
                statistics_ptrs[site] + token * (2 if LAYER else 1), 0, C, BC, LAYER, EPS, OFFSET, ROUND, WEIGHT, BIAS,
            )  # fmt: skip


def registers(streams: int, width: int, dtype: torch.dtype) -> int:
    """About how many registers a thread takes: the row, u, the branch output and the coefficients of the next site,
    and what one block of channels passes through. In float16 the compiler keeps more for itself."""
    setting = config(width)
    numbers = -(-width // setting["BC"]) * setting["BC"] // (32 * setting["num_warps"])
    row = (streams + 1) * numbers * dtype.itemsize // 4
    return row + numbers * (2 if dtype == torch.float16 else 1) + streams * (streams + 2) + 6 * streams


def refusal(streams: Tensor) -> str:
    """Why a call takes no more than one site of this state [..., n, C]; empty if it takes `MOST`.

    At least two programs have to share a multiprocessor, three of up to four warps: one alone would leave the memory
    idle while it sums.
    """
    reason = state_refusal(streams)
    if reason:
        return reason
    *_, n, width = streams.shape
    warps = config(width)["num_warps"]
    if warps > 8 or registers(n, width, streams.dtype) > min(168, 65536 // (2 * 32 * warps)):
        return f"{n} streams of {width} channels in {streams.dtype}: no room for a whole row in the registers"
    return ""


@kernel_op("replay_normed")
def forward(
    streams: Tensor, ys: list[Tensor], posts: list[Tensor], mixes: list[Tensor], transpose: bool, normed: list[bool],
    written: list[bool], pres: list[Tensor], weights: list[Tensor], biases: list[Tensor], kind: str, eps: float,
    offset: float, round_first: bool, keep: bool = False,
) -> list[Tensor]:  # fmt: skip
    """X_0 [..., n, C]; branch outputs [..., C] and coefficients of up to `MOST` sites in order (no mixes: identity);
    which of them have a norm behind them, and which states are wanted; gates, weights and biases (or none) of the
    norms, and the attributes of `mhc::pre_norm`, which they share -> the state behind each site (empty where it is not
    wanted), then out [..., C], statistics and u (or empty) of each norm. All in the dtype of X_0."""
    x = by_token(streams, 2)
    tokens, n, width = x.shape
    batch, nothing, norms = streams.shape[:-2], x.new_empty(0), range(len(pres))
    states = [torch.empty_like(x) if wanted else x.new_empty(0) for wanted in written]
    outs = [x.new_empty((tokens, width)) for _ in norms]
    statistics = [torch.empty((tokens, columns(kind)), dtype=torch.float32, device=x.device) for _ in norms]
    kept = [x.new_empty((tokens, width) if keep else 0) for _ in norms]
    if nonempty(tokens):

        def four(values: Sequence[Tensor], other: Tensor) -> list[Tensor]:
            return [*values, *[other] * (MOST - len(values))]

        def by_site(values: Sequence[Tensor], other: Tensor) -> list[Tensor]:
            given = iter(values)
            return four([next(given, other) if has else other for has in normed], other)

        launch(
            replay_normed_kernel, (tokens,), x, *four([by_token(y, 1) for y in ys], x),
            *four([by_token(q, 1) for q in posts], x), *four([by_token(h, 2) for h in mixes], x),
            *by_site([by_token(p, 1) for p in pres], x), *by_site([weight.contiguous() for weight in weights], x),
            *by_site([bias.contiguous() for bias in biases], x), *four(states, nothing), *by_site(outs, nothing),
            *by_site(statistics, nothing), *by_site(kept, nothing), C=width, N=n, SITES=len(ys), NORMED=_bits(normed),
            WRITTEN=_bits(written), HAS_RES=bool(mixes), TRANSPOSE=transpose, KEEP=keep, LAYER=kind == "layer",
            EPS=eps, OFFSET=offset, ROUND=round_first, WEIGHT=bool(weights), BIAS=bool(biases), **config(width),
        )  # fmt: skip
    results = [state.view(streams.shape) if wanted else state for state, wanted in zip(states, written, strict=True)]
    for out, numbers, u in zip(outs, statistics, kept, strict=True):
        results += [out.view(*batch, width), numbers.view(*batch, columns(kind)), u.view(*batch, width) if keep else u]
    return results


@forward.register_fake
def _(
    streams: Tensor, ys: list[Tensor], posts: list[Tensor], mixes: list[Tensor], transpose: bool, normed: list[bool],
    written: list[bool], pres: list[Tensor], weights: list[Tensor], biases: list[Tensor], kind: str, eps: float,
    offset: float, round_first: bool, keep: bool = False,
) -> list[Tensor]:  # fmt: skip
    row = (*streams.shape[:-2], streams.shape[-1])
    results = [streams.new_empty(streams.shape if wanted else 0) for wanted in written]
    for _ in pres:
        statistics = streams.new_empty((*streams.shape[:-2], columns(kind)), dtype=torch.float32)
        results += [streams.new_empty(row), statistics, streams.new_empty(row if keep else 0)]
    return results


def _bits(flags: Sequence[bool]) -> int:
    return sum(1 << index for index, flag in enumerate(flags) if flag)


__all__ = ["forward", "refusal"]
