"""pre with the norm of the branch input: the mix, its statistics and the norm in one pass, and the backward of both.

Forward: one program a token; the mixed row stays in registers between its statistics and its norm. Backward: a program
takes a few tokens one after another, so that the gradient of the weight is summed in registers; a row of X is read once
and serves the rebuilt u, the norm's sums and the dot products. Partial sums of the weight are added in a fixed order:
no atomics, deterministic.
Traffic, n = 4: forward n + 1 = 5 u; backward (read dout, X; write du) n + 2 = 6 u. dX is left to `boundary`.
With `keep` the forward writes u (6 u) and the backward reads it in place of X: 3 u. dh_pre is left to `site_boundary`.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    by_token,
    kernel_op,
    launch,
    launch_tuned,
    load_row,
    load_scalars,
    load_streams,
    nonempty,
    places,
    side_by_side,
    state_refusal,
    store_row,
    zeros,
)

MAX_WIDTH = 16384
"""A row lies in the registers of one program; wider ones would spill."""


def refusal(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """Why no kernel takes this `mhc::pre_norm` call; empty if one does."""
    reason = state_refusal(x, weight, bias)
    if reason:
        return reason
    if x.shape[-1] > MAX_WIDTH:
        return f"hidden size {x.shape[-1]}, a row of at most {MAX_WIDTH} fits a program"
    return ""


@triton.jit
def mixed(xs, p, N: tl.constexpr) -> tl.tensor:
    """sum_i p_i X_i of one block, rounded to the streams' dtype as `mhc::pre` rounds it, in float32."""
    total = p[0] * xs[0].to(tl.float32)
    for i in tl.static_range(1, N):
        total = tl.fma(tl.broadcast_to(p[i], total.shape), xs[i].to(tl.float32), total)  # see launch.site_row
    return total.to(xs[0].dtype).to(tl.float32)


@triton.jit
def write_normed(
    us, gains, total, weight_ptr, bias_ptr, out_ptr, statistics_ptr, token, C: tl.constexpr, BC: tl.constexpr,
    LAYER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """The norm of a row in blocks `us`, whose element-wise sums (of squares; LAYER: of values) are `total`. `gains`:
    the weight's blocks where they have been loaded before, else empty."""
    MASKED: tl.constexpr = C % BC != 0
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    lanes = tl.arange(0, BC)
    mean = 0.0
    squares = tl.sum(total, axis=0)
    if LAYER:
        mean = squares / C
        total = tl.zeros((BC,), dtype=tl.float32)
        for block in tl.static_range(BLOCKS):
            centred = us[block] - mean
            if MASKED:
                centred = tl.where(block * BC + lanes < C, centred, 0.0)
            total += centred * centred
        squares = tl.sum(total, axis=0)
        tl.store(statistics_ptr + token * 2, mean)
    inverse = 1.0 / tl.sqrt(squares / C + EPS)
    tl.store(statistics_ptr + token * (2 if LAYER else 1) + (1 if LAYER else 0), inverse)
    for block in tl.static_range(BLOCKS):
        offsets = block * BC + lanes
        z = (us[block] - mean) * inverse
        if ROUND:
            z = z.to(out_ptr.dtype.element_ty).to(tl.float32)
        if WEIGHT:
            if len(gains) > 0:
                z *= gains[block].to(tl.float32) + OFFSET
            else:
                z *= load_row(weight_ptr, 0, offsets, offsets < C, MASKED) + OFFSET
        if BIAS:
            z += load_row(bias_ptr, 0, offsets, offsets < C, MASKED)
        store_row(out_ptr, token * C, offsets, z, offsets < C, MASKED)


@triton.jit
def mix_and_norm(
    p, x_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, mixed_ptr, token, C: tl.constexpr, N: tl.constexpr,
    BC: tl.constexpr, KEEP: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    ROUND: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """The row of a token mixed with the gates `p`, and its norm."""
    MASKED: tl.constexpr = C % BC != 0
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    lanes = tl.arange(0, BC)
    us = ()
    total = tl.zeros((BC,), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        offsets = block * BC + lanes
        xs = load_streams(x_ptr, token, offsets, offsets < C, C, N, MASKED)
        u = mixed(xs, p, N)
        if KEEP:
            store_row(mixed_ptr, token * C, offsets, u, offsets < C, MASKED)
        us = us + (u,)
        total += u if LAYER else u * u
    write_normed(
        us, (), total, weight_ptr, bias_ptr, out_ptr, statistics_ptr, token, C, BC, LAYER, EPS, OFFSET, ROUND, WEIGHT,
        BIAS,
    )  # fmt: skip


@triton.jit
def pre_norm_kernel(
    x_ptr, pre_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, mixed_ptr, C: tl.constexpr, N: tl.constexpr,
    BC: tl.constexpr, KEEP: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    ROUND: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one token."""
    token = tl.program_id(0).to(tl.int64)
    p = load_scalars(pre_ptr + token * N, N)
    mix_and_norm(
        p, x_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, mixed_ptr, token, C, N, BC, KEEP, LAYER, EPS, OFFSET,
        ROUND, WEIGHT, BIAS,
    )  # fmt: skip


@triton.jit
def accumulated(totals, factor, xs, N: tl.constexpr) -> tl.tensor:
    """totals_i + factor X_i, for the N streams of one block; padding stays as it is."""
    new = ()
    for i in tl.static_range(len(totals)):
        if i < N:
            new = new + (totals[i] + factor * xs[i].to(tl.float32),)
        else:
            new = new + (totals[i],)
    return new


@triton.jit
def pre_norm_backward_kernel(
    grad_ptr, second_ptr, third_ptr, x_ptr, mixed_ptr, pre_ptr, weight_ptr, statistics_ptr, du_ptr, d_pre_ptr,
    d_weight_ptr, d_bias_ptr, tokens, GRADS: tl.constexpr, C: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    BC: tl.constexpr, TOKENS: tl.constexpr, GIVEN: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr,
    ROUND: tl.constexpr, WEIGHT: tl.constexpr, NEED_PRE: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Program: TOKENS tokens, one after another. GIVEN: u is read, X only for dh_pre.

    du = inverse (g w - m0 - z m1), m0 = mean(g w) (LayerNorm only), m1 = mean(g w z);
    dh_pre_i = <du, X_i> = inverse (<g w, X_i> - m0 sum(X_i) - m1 <z, X_i>), so that X is seen once, before m1 is known;
    dweight = sum of g z, dbias = sum of g, of this program's tokens.
    """
    MASKED: tl.constexpr = C % BC != 0
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BC)
    d_weights = zeros(BLOCKS, BC)
    d_biases = zeros(BLOCKS, BC)
    for step in range(TOKENS):
        here = program * TOKENS + step
        there = here < tokens
        token = tl.minimum(here, tokens - 1)
        p = load_scalars(pre_ptr + token * N, 0 if GIVEN else N)
        mean = tl.load(statistics_ptr + token * 2) if LAYER else 0.0
        inverse = tl.load(statistics_ptr + token * (2 if LAYER else 1) + (1 if LAYER else 0))
        inner = tl.zeros((BC,), dtype=tl.float32)
        outer = tl.zeros((BC,), dtype=tl.float32)
        by_g = zeros(NP, BC)
        by_z = zeros(NP, BC)
        by_one = zeros(NP, BC)
        zs = ()
        gs = ()
        new_weights = ()
        new_biases = ()
        for block in tl.static_range(BLOCKS):
            offsets = block * BC + lanes
            inside = offsets < C
            xs = load_streams(x_ptr, token, offsets, inside, C, 0 if GIVEN and not NEED_PRE else N, MASKED)
            g = tl.load(grad_ptr + token * C + offsets, mask=inside & there, other=0.0).to(tl.float32)
            if GRADS > 1:
                g += tl.load(second_ptr + token * C + offsets, mask=inside & there, other=0.0).to(tl.float32)
            if GRADS > 2:
                g += tl.load(third_ptr + token * C + offsets, mask=inside & there, other=0.0).to(tl.float32)
            if GIVEN:
                u = load_row(mixed_ptr, token * C, offsets, inside, MASKED)
            else:
                u = mixed(xs, p, N)
            z = (u - mean) * inverse
            if NEED_WEIGHT:
                seen = z
                if ROUND:
                    seen = z.to(x_ptr.dtype.element_ty).to(tl.float32)
                new_weights = new_weights + (d_weights[block] + g * seen,)
            if NEED_BIAS:
                new_biases = new_biases + (d_biases[block] + g,)
            if WEIGHT:
                g *= load_row(weight_ptr, 0, offsets, inside, MASKED) + OFFSET
            inner += g * z
            if LAYER:
                outer += g
            if NEED_PRE:
                by_g = accumulated(by_g, g, xs, N)
                by_z = accumulated(by_z, z, xs, N)
                if LAYER:
                    by_one = accumulated(by_one, 1.0, xs, N)
            zs = zs + (z,)
            gs = gs + (g,)
        if NEED_WEIGHT:
            d_weights = new_weights
        if NEED_BIAS:
            d_biases = new_biases
        m1 = tl.sum(inner, axis=0) / C
        m0 = 0.0
        if LAYER:
            m0 = tl.sum(outer, axis=0) / C
        if NEED_PRE:
            sums = tl.sum(side_by_side(by_g), axis=0) - m1 * tl.sum(side_by_side(by_z), axis=0)
            if LAYER:
                sums -= m0 * tl.sum(side_by_side(by_one), axis=0)
            stream = places(NP)
            d_pre = (sums * inverse).to(d_pre_ptr.dtype.element_ty)
            tl.store(d_pre_ptr + token * N + stream, d_pre, mask=(stream < N) & there)
        for block in tl.static_range(BLOCKS):
            offsets = block * BC + lanes
            du = (gs[block] - m0 - zs[block] * m1) * inverse
            tl.store(du_ptr + token * C + offsets, du.to(du_ptr.dtype.element_ty), mask=(offsets < C) & there)
    for block in tl.static_range(BLOCKS):
        offsets = block * BC + lanes
        if NEED_WEIGHT:
            tl.store(d_weight_ptr + program * C + offsets, d_weights[block], mask=offsets < C)
        if NEED_BIAS:
            tl.store(d_bias_ptr + program * C + offsets, d_biases[block], mask=offsets < C)


def config(width: int) -> dict[str, int]:
    """Block of channels and warps: 4 neighbouring channels a thread, at most 8 blocks of a row."""
    warps = 1
    while warps < 16 and width > warps * 32 * 20:
        warps *= 2
    block = max(128, warps * 128)
    while -(-width // block) > 8:
        block *= 2
    return {"BC": min(block, triton.next_power_of_2(max(width, 16))), "num_warps": warps}


def backward_config(width: int, streams: int = 4, layer: bool = False) -> dict[str, int]:
    """Four warps where their registers hold the row and what is summed beside it, `streams` rows for each of two sums
    (three of a LayerNorm); else eight, for up to 4096 channels."""
    warps, fits = config(width)["num_warps"], min(4096, 4096 * 8 // (streams * (3 if layer else 2)))
    if 768 < width <= 4096:
        warps = 4 if width <= fits else 8
    block = config(width)["BC"] if width <= 2560 else 1024 if width <= 8192 else 2048
    return {"BC": block, "num_warps": warps}


def backward_others(width: int) -> list[dict[str, int]]:
    """Other blocks and warps, at most 8 blocks of a row: they are unrolled."""
    pairs = ((512, 4), (1024, 4), (1024, 8), (2048, 8))
    return [{"BC": block, "num_warps": warps} for block, warps in pairs if block <= 2 * width and width <= 8 * block]


def tokens_a_program(width: int) -> int:
    """Tokens of a program of the backward, one row of partial weight gradients each: few, so that 8192 tokens fill the
    last wave of programs well (three of them share a multiprocessor up to 2560 channels, then two)."""
    return 8 if width <= 2560 else 16


def columns(kind: str) -> int:
    """Numbers a token that the backward needs: rstd, before it the mean of a LayerNorm."""
    return 2 if kind == "layer" else 1


def normed_like(streams: Tensor, kind: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (out [..., C], statistics [..., 1 or 2], u [..., C] or empty) of a state [..., n, C]."""
    batch, width = streams.shape[:-2], streams.shape[-1]
    statistics = streams.new_empty((*batch, columns(kind)), dtype=torch.float32)
    return streams.new_empty((*batch, width)), statistics, streams.new_empty((*batch, width) if keep else 0)


@kernel_op("pre_norm")
def forward(
    streams: Tensor, h_pre: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, offset: float,
    round_first: bool, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments of `mhc::pre_norm` -> (out [..., C], statistics [..., 1 or 2], u [..., C] or empty), by the
    kernel."""
    x, p = by_token(streams, 2), by_token(h_pre, 1)
    tokens, n, width = x.shape
    out = x.new_empty((tokens, width))
    kept = torch.empty_like(out) if keep else x.new_empty(0)
    statistics = torch.empty((tokens, columns(kind)), dtype=torch.float32, device=x.device)
    if nonempty(tokens):
        launch(
            pre_norm_kernel, (tokens,), x, p, x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(), out, statistics, kept, C=width, N=n, KEEP=keep,
            LAYER=kind == "layer", EPS=eps, OFFSET=offset, ROUND=round_first, WEIGHT=weight is not None,
            BIAS=bias is not None, **config(width),
        )  # fmt: skip
    batch = streams.shape[:-2]
    return out.view(*batch, width), statistics.view(*batch, columns(kind)), kept.view(*batch, width) if keep else kept


@forward.register_fake
def _(
    streams: Tensor, h_pre: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, offset: float,
    round_first: bool, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return normed_like(streams, kind, keep)


@kernel_op("pre_norm_dots")
def dots(
    grad: Tensor, streams: Tensor, h_pre: Tensor, weight: Tensor | None, statistics: Tensor, kind: str, offset: float,
    round_first: bool, need_pre: bool, need_weight: bool, need_bias: bool, second: Tensor | None = None,
    third: Tensor | None = None, mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dout [..., C] -> (du [..., C], dh_pre [..., n], and partial sums [P, C] of dweight and of dbias, float32, to be
    summed over P); what is not needed is empty. `second` and `third`: further addends of dout, each [.., C]. `mixed`: u
    [..., C] where it was kept."""
    g, x, p, s = by_token(grad, 1), by_token(streams, 2), by_token(h_pre, 1), by_token(statistics, 1)
    tokens, n, width = x.shape
    block = tokens_a_program(width)
    programs = triton.cdiv(tokens, block)
    du = x.new_empty((tokens, width))
    d_pre = h_pre.new_empty(h_pre.shape if need_pre else 0)
    d_weight = s.new_empty((programs, width) if need_weight else 0)
    d_bias = s.new_empty((programs, width) if need_bias else 0)
    if nonempty(tokens):
        launch_tuned(
            pre_norm_backward_kernel, lambda tokens, _: (triton.cdiv(tokens, block),), g,
            g if second is None else by_token(second, 1), g if third is None else by_token(third, 1), x,
            g if mixed is None else by_token(mixed, 1), p, x if weight is None else weight.contiguous(), s, du, d_pre,
            d_weight, d_bias, tokens, GRADS=1 + (second is not None) + (third is not None), C=width, N=n,
            NP=triton.next_power_of_2(n), TOKENS=block, GIVEN=mixed is not None, LAYER=kind == "layer", OFFSET=offset,
            ROUND=round_first, WEIGHT=weight is not None, NEED_PRE=need_pre, NEED_WEIGHT=need_weight,
            NEED_BIAS=need_bias, config=backward_config(width, n, kind == "layer"),
            others=functools.partial(backward_others, width),
        )  # fmt: skip
    return du.view(*streams.shape[:-2], width), d_pre, d_weight, d_bias


@dots.register_fake
def _(
    grad: Tensor, streams: Tensor, h_pre: Tensor, weight: Tensor | None, statistics: Tensor, kind: str, offset: float,
    round_first: bool, need_pre: bool, need_weight: bool, need_bias: bool, second: Tensor | None = None,
    third: Tensor | None = None, mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    width = streams.shape[-1]
    block = tokens_a_program(width)
    programs = (statistics.numel() // columns(kind) + block - 1) // block
    return (
        streams.new_empty((*streams.shape[:-2], width)),
        h_pre.new_empty(h_pre.shape if need_pre else 0),
        statistics.new_empty((programs, width) if need_weight else 0),
        statistics.new_empty((programs, width) if need_bias else 0),
    )


def pieces(
    grad: Tensor, streams: Tensor, h_pre: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor,
    mixed: Tensor | None, kind: str, eps: float, offset: float, round_first: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The arguments of `mhc::pre_norm_backward` -> (its four results, the first empty; then du, from which
    `streams_backward` makes the first). Traced into the graph.

    With u kept dh_pre is a pass of its own, which `site_boundary` takes up where it can.
    """
    du, d_pre, d_weight, d_bias = torch.ops.mhc_kernel.pre_norm_dots.default(
        grad, streams, h_pre, weight, statistics, kind, offset, round_first, bool(needs[1]) and mixed is None,
        bool(needs[2] and weight is not None), bool(needs[3] and bias is not None), mixed=mixed,
    )  # fmt: skip
    if needs[1] and mixed is not None:
        from . import pre  # noqa: F401  # registers the op; it takes `mixed` from here

        d_pre = torch.ops.mhc_kernel.pre_dots.default(du, streams, h_pre)
    results = [streams.new_empty(0), d_pre]
    for parameter, partial, needed in ((weight, d_weight, needs[2]), (bias, d_bias, needs[3])):
        like = streams if parameter is None else parameter
        results.append(partial.sum(0).to(like.dtype) if needed and parameter is not None else like.new_empty(0))
    return (*results, du)


def backward(*args: Any) -> tuple[Tensor, ...]:
    """The arguments of `mhc::pre_norm_backward` -> its results (traced into the graph)."""
    *results, du = pieces(*args)
    streams, h_pre, needs = args[1], args[2], args[-1]
    if needs[0]:
        results[0] = torch.ops.mhc_kernel.streams_backward.default(
            streams, None, None, False, du, h_pre, None, None, None
        )
    return tuple(results)
