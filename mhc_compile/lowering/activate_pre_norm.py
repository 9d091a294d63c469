"""From partial projections to coefficients and the next branch's normed input, for few tokens: the second launch of a
site.

A token has two programs that run side by side: one computes pre (or reads the gate that `single_pass` knows a site
earlier), mixes the row and norms it; the other computes post, res and Sinkhorn, which the branch does not wait for.
The partial sums of a token are read as one tile and added over the splits.
Bytes, n = 4: n + 1 = 5 numbers a token and channel, and 4 S KP of the partial sums.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA

from . import pre_norm
from .coefficients import activation_constants, gate, length, logits, spec_of
from .launch import by_token, kernel_op, launch, load_raw, load_scalars, load_streams, nonempty, store_row
from .pre_norm import mixed, write_normed
from .sinkhorn import iterate


@triton.jit
def squares_of(partial_ptr, starts, there, K: tl.constexpr, NORM: tl.constexpr) -> tl.tensor:
    """The sums of squares of one token, [SP]; `starts` [SP]: where its sums begin in each split."""
    if NORM != 2:
        squares = tl.load(partial_ptr + starts + K, mask=there, other=0.0)
    else:
        squares = tl.zeros(starts.shape, dtype=tl.float32)
    return squares


@triton.jit
def one_length(squares, TOTAL: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr) -> tl.tensor:
    """r of one token (1 without a norm)."""
    r = 1.0
    if NORM != 2:
        r = length(tl.sum(squares, axis=0), TOTAL, NORM, NORM_EPS)
    return r


@triton.jit
def gate_inputs(
    partial_ptr, starts, there, bias_ptr, alpha_ptr, N: tl.constexpr, NP: tl.constexpr, START: tl.constexpr
) -> tl.tensor:
    """What pre or post of one token is made of: (sums [SP, NP], alpha, bias [NP])."""
    lines = START + tl.arange(0, NP)
    mask = lines < START + N
    sums = tl.load(partial_ptr + starts[:, None] + lines[None, :], mask=there[:, None] & mask[None, :], other=0.0)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    return sums, alpha, tl.load(bias_ptr + lines, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def one_gate(
    inputs, gate_ptr, projection_ptr, r, token, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr,
    START: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, STORE: tl.constexpr,
    PROJECTION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """pre or post of one token, [NP] float32, and what is to be stored of it."""
    lines = tl.arange(0, NP)
    m = tl.sum(inputs[0], axis=0)
    if PROJECTION:
        tl.store(projection_ptr + token * (K + 1) + START + lines, m, mask=lines < N)
    p = gate(logits(m, r, inputs[1], inputs[2]), SIGMOID, SCALE, EPS)
    if STORE:
        tl.store(gate_ptr + token * N + lines, p.to(gate_ptr.dtype.element_ty), mask=lines < N)
    return p


@triton.jit
def block_rows(x_ptr, token, block, C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr) -> tl.tensor:
    """One block of channels of the N streams of a token, in their own dtype."""
    offsets = block * BC + tl.arange(0, BC)
    return load_streams(x_ptr, token, offsets, offsets < C, C, N, C % BC != 0)


@triton.jit
def part_of(rows, FIRST: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """COUNT of the rows, from FIRST on."""
    part = ()
    for i in tl.static_range(COUNT):
        part = part + (rows[FIRST + i],)
    return part


@triton.jit
def mix_token(
    partial_ptr, starts, there, bias_ptr, alpha_ptr, x_ptr, given_ptr, weight_ptr, norm_bias_ptr, pre_ptr,
    projection_ptr, out_ptr, statistics_ptr, token, TOTAL: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    K: tl.constexpr, PRE: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr, SIGMOID: tl.constexpr,
    PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, GIVEN: tl.constexpr,
    STORE_PRE: tl.constexpr, PROJECTION: tl.constexpr, NORMED: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr,
    OFFSET: tl.constexpr, ROUND: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """pre, the mixed row and its norm. EARLY: the row and the weight are on their way while pre is computed."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    MASKED: tl.constexpr = C % BC != 0
    lanes = tl.arange(0, BC)
    if not GIVEN:
        squares = squares_of(partial_ptr, starts, there, K, NORM)
        inputs = gate_inputs(partial_ptr, starts, there, bias_ptr, alpha_ptr, N, NP, PRE)
    rows = ()
    gains = ()
    for block in tl.static_range(BLOCKS if EARLY else 0):
        rows = rows + block_rows(x_ptr, token, block, C, N, BC)
        if NORMED and WEIGHT:
            gains = gains + (load_raw(weight_ptr, 0, block * BC + lanes, block * BC + lanes < C, MASKED),)
    if GIVEN:
        p = load_scalars(given_ptr + token * N, N)
    else:
        r = one_length(squares, TOTAL, NORM, NORM_EPS)
        gates = one_gate(inputs, pre_ptr, projection_ptr, r, token, N, NP, K, PRE, SIGMOID, PRE_SCALE, PRE_EPS,
                         STORE_PRE, PROJECTION)  # fmt: skip
        if PROJECTION:
            tl.store(projection_ptr + token * (K + 1) + K, r)
        p = ()
        for i in tl.static_range(N):
            p = p + (tl.sum(tl.where(tl.arange(0, NP) == i, gates, 0.0), axis=0),)
    us = ()
    total = tl.zeros((BC,), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        if EARLY:
            u = mixed(part_of(rows, block * N, N), p, N)
        else:
            u = mixed(block_rows(x_ptr, token, block, C, N, BC), p, N)
        if NORMED:
            us = us + (u,)
            total += u if LAYER else u * u
        else:
            offsets = block * BC + lanes
            store_row(out_ptr, token * C, offsets, u, offsets < C, MASKED)
    if NORMED:
        write_normed(us, gains, total, weight_ptr, norm_bias_ptr, out_ptr, statistics_ptr, token, C, BC, LAYER, EPS,
                     OFFSET, ROUND, WEIGHT, BIAS)  # fmt: skip


@triton.jit
def activate_token(
    partial_ptr, starts, there, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr, res_ptr,
    projection_ptr, token, TOTAL: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr,
    SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr, POST_SCALE: tl.constexpr,
    POST_EPS: tl.constexpr, SINKHORN: tl.constexpr, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr,
    ROW_FIRST: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr, GIVEN: tl.constexpr,
    STORE_PRE: tl.constexpr, PROJECTION: tl.constexpr,
) -> None:  # fmt: skip
    """What the branch does not wait for: post and res; GIVEN: pre as well, which the site behind it reads."""
    squares = squares_of(partial_ptr, starts, there, K, NORM)
    if GIVEN and PRE >= 0:
        pre_inputs = gate_inputs(partial_ptr, starts, there, bias_ptr, alpha_pre_ptr, N, NP, PRE)
    if POST >= 0:
        post_inputs = gate_inputs(partial_ptr, starts, there, bias_ptr, alpha_post_ptr, N, NP, POST)
    if RES >= 0:
        row, column = tl.arange(0, NP)[:, None], tl.arange(0, NP)[None, :]
        cells = row * N + column
        valid = (row < N) & (column < N)
        offsets = starts[:, None, None] + RES + cells[None]
        sums = tl.load(partial_ptr + offsets, mask=there[:, None, None] & valid[None], other=0.0)
        alpha = tl.load(alpha_res_ptr).to(tl.float32)
        bias = tl.load(bias_ptr + RES + cells, mask=valid, other=0.0).to(tl.float32)
    r = one_length(squares, TOTAL, NORM, NORM_EPS)
    if GIVEN and PROJECTION:
        tl.store(projection_ptr + token * (K + 1) + K, r)
    if RES >= 0:
        m = tl.sum(sums, axis=0)
        if PROJECTION:
            tl.store(projection_ptr + token * (K + 1) + RES + cells, m, mask=valid)
        s = logits(m, r, alpha, bias)[None]
        if SINKHORN:
            s = iterate(s, valid[None], POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, N, NP)
        tl.store(res_ptr + token * (N * N) + cells[None], s.to(res_ptr.dtype.element_ty), mask=valid[None])
    if GIVEN and PRE >= 0:
        one_gate(pre_inputs, pre_ptr, projection_ptr, r, token, N, NP, K, PRE, SIGMOID, PRE_SCALE, PRE_EPS, STORE_PRE,
                 PROJECTION)  # fmt: skip
    if POST >= 0:
        one_gate(post_inputs, post_ptr, projection_ptr, r, token, N, NP, K, POST, SIGMOID, POST_SCALE, POST_EPS, True,
                 PROJECTION)  # fmt: skip


@triton.jit
def activate_pre_norm_kernel(
    partial_ptr, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, x_ptr, given_ptr, weight_ptr, norm_bias_ptr,
    pre_ptr, post_ptr, res_ptr, projection_ptr, out_ptr, statistics_ptr, tokens, TOTAL: tl.constexpr,
    SPLITS: tl.constexpr, SP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr,
    SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr, POST_SCALE: tl.constexpr,
    POST_EPS: tl.constexpr, SINKHORN: tl.constexpr, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr,
    ROW_FIRST: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, ROLES: tl.constexpr, GIVEN: tl.constexpr, STORE_PRE: tl.constexpr, PROJECTION: tl.constexpr,
    NORMED: tl.constexpr, LAYER: tl.constexpr, BRANCH_EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Program (token, role): 0 the branch input, 1 the rest of the coefficients (there are ROLES of them)."""
    token = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SP)
    there = splits < SPLITS
    starts = (splits.to(tl.int64) * tokens + token) * KP
    if tl.program_id(1) == 0:
        mix_token(
            partial_ptr, starts, there, bias_ptr, alpha_pre_ptr, x_ptr, given_ptr, weight_ptr, norm_bias_ptr, pre_ptr,
            projection_ptr, out_ptr, statistics_ptr, token, TOTAL, N, NP, K, PRE, NORM, NORM_EPS, SIGMOID, PRE_SCALE,
            PRE_EPS, C, BC, GIVEN, STORE_PRE, PROJECTION, NORMED, LAYER, BRANCH_EPS, OFFSET, ROUND, WEIGHT, BIAS, EARLY,
        )  # fmt: skip
    elif ROLES > 1:
        activate_token(
            partial_ptr, starts, there, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr,
            res_ptr, projection_ptr, token, TOTAL, N, NP, K, PRE, POST, RES, NORM, NORM_EPS, SIGMOID, PRE_SCALE,
            PRE_EPS, POST_SCALE, POST_EPS, SINKHORN, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, GIVEN,
            STORE_PRE, PROJECTION,
        )  # fmt: skip


def config(width: int) -> dict[str, int]:
    """16 bytes of every stream a thread, up to 16 warps: few tokens leave a multiprocessor to one program."""
    warps = 4
    while warps < 16 and width > warps * 256 * 2:
        warps *= 2
    return {"BC": min(warps * 256, max(16, int(triton.next_power_of_2(width)))), "num_warps": warps}


def early(streams: int, width: int, warps: int) -> bool:
    """Whether the registers hold a row of all streams, so that it can be loaded before its gates are known."""
    return streams * width <= warps * 32 * 64


def statistics_of(kind: str) -> int:
    """Numbers a token that the norm leaves for its backward."""
    return 0 if kind == "none" else pre_norm.columns(kind)


@kernel_op(
    "activate_pre_norm",
    schema=(
        "(Tensor partial, Tensor bias, Tensor alpha_pre, Tensor? alpha_post, Tensor? alpha_res, Tensor state, "
        "Tensor? given, Tensor? weight, Tensor? norm_bias, str kind, float eps, float offset, bool round_first, "
        f"bool store_pre, bool store_projection, {ATTRIBUTE_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def forward(
    partial: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None,
    state: Tensor, given: Tensor | None, weight: Tensor | None, norm_bias: Tensor | None, kind: str, eps: float,
    offset: float, round_first: bool, store_pre: bool, store_projection: bool, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """partial [S, T, KP] and X [..., n, C] -> (out [..., C], statistics [T, 0 to 2], pre [T, n], post [T, n],
    res [T, n, n], projection [T, K + 1]).

    `given`: the gate [..., n] of this mix, where it is not the pre computed here. `kind` "none": out is the mixed row.
    pre and projection are empty unless they are to be stored.
    """
    spec = spec_of(flat)
    x = by_token(state, 2)
    splits, tokens, _ = partial.shape
    _, n, width = x.shape
    mix, normed = spec.mix_dtype or torch.float32, kind != "none"
    h_pre = partial.new_empty((tokens if store_pre else 0, spec.part_size("pre")))
    h_post = partial.new_empty((tokens, spec.part_size("post")), dtype=mix)
    h_res = partial.new_empty((tokens, n, n if "res" in spec.parts else 0), dtype=mix)
    projection = partial.new_empty((tokens if store_projection else 0, spec.rows + 1))
    out = x.new_empty((tokens, width))
    statistics = partial.new_empty((tokens, statistics_of(kind)))
    if nonempty(tokens):
        roles = 2 if given is not None or len(spec.parts) > 1 else 1
        # What the backward rebuilds of a norm comes from `pre_norm`: the same sums in the same order.
        settings = pre_norm.config(width) if store_projection else config(width)
        launch(
            activate_pre_norm_kernel, (tokens, roles), partial.contiguous(), bias.contiguous(), alpha_pre,
            bias if alpha_post is None else alpha_post, bias if alpha_res is None else alpha_res, x,
            x if given is None else by_token(given, 1), x if weight is None else weight.contiguous(),
            x if norm_bias is None else norm_bias.contiguous(), h_pre, h_post, h_res, projection, out, statistics,
            tokens, TOTAL=n * width, SPLITS=splits, SP=triton.next_power_of_2(splits), C=width,
            **activation_constants(spec), ROLES=roles, GIVEN=given is not None, STORE_PRE=store_pre,
            PROJECTION=store_projection, NORMED=normed, LAYER=kind == "layer", BRANCH_EPS=eps, OFFSET=offset,
            ROUND=round_first, WEIGHT=weight is not None, BIAS=norm_bias is not None,
            EARLY=early(n, width, settings["num_warps"]), **settings,
        )  # fmt: skip
    return out.view(*state.shape[:-2], width), statistics, h_pre, h_post, h_res, projection


@forward.register_fake
def _(
    partial: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None,
    state: Tensor, given: Tensor | None, weight: Tensor | None, norm_bias: Tensor | None, kind: str, eps: float,
    offset: float, round_first: bool, store_pre: bool, store_projection: bool, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = spec_of(flat)
    tokens, n, mix = partial.shape[1], spec.streams, spec.mix_dtype or torch.float32
    return (
        state.new_empty((*state.shape[:-2], state.shape[-1])),
        partial.new_empty((tokens, statistics_of(kind))),
        partial.new_empty((tokens if store_pre else 0, spec.part_size("pre"))),
        partial.new_empty((tokens, spec.part_size("post")), dtype=mix),
        partial.new_empty((tokens, n, n if "res" in spec.parts else 0), dtype=mix),
        partial.new_empty((tokens if store_projection else 0, spec.rows + 1)),
    )


__all__ = ["config", "early", "forward", "statistics_of"]
