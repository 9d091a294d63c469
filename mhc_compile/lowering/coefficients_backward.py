"""coefficients, backward: from the gradients of the coefficients to dm, the gradient of the projection, and to dphi.

`logits_backward` is one small kernel: Sinkhorn's backward on chip, gates, dm = dp alpha / r, the multiple c of
vec(X) that the norm contributes, and per-program partial sums of dbias and dalpha (summed in a fixed order: no atomics,
deterministic). Its stages 1 and 2 are the same in two launches (`logits_backward_parts`): what needs no gradient of pre
first, then the rest.
dm leaves as two bf16 halves [T, 2 KP], which is what the GEMMs of dphi (dm^T X) and of dX (dm phi, in `boundary`) take.
Traffic, n = 4: about 0.1 u; dphi 4 u.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA
from mhc_compile.ops.spec import CoefficientSpec

from .coefficients import activation_constants, padded_rows, spec_of
from .launch import kernel_op, launch, nonempty
from .sinkhorn import iterate_backward, tokens_a_program


@triton.jit
def store_halves(out_ptr, offsets, value, mask, KP: tl.constexpr, TWO: tl.constexpr) -> None:
    """value as hi at `offsets` and lo at `offsets + KP` (one full-precision copy without TWO)."""
    hi = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, hi, mask=mask)
    if TWO:
        tl.store(out_ptr + offsets + KP, (value - hi.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def summed(pointer, offsets, mask, tokens, STRIDE: tl.constexpr, PARTS: tl.constexpr) -> tl.tensor:
    """The sum of PARTS tensors [tokens, STRIDE] that lie one behind the other, in their order."""
    total = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        place = tl.full((), part * STRIDE, tl.int64) * tokens
        total += tl.load(pointer + place + offsets, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def vector_part(
    grad_ptr, projection_ptr, bias_ptr, alpha_ptr, token, lines, mask, r, tokens, START: tl.constexpr,
    STRIDE: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr,
    HAS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(dp, z, alpha) of pre or post: dp the gradient of z * alpha + bias."""
    z = tl.load(projection_ptr + token * (K + 1) + START + lines, mask=mask, other=0.0) / r
    alpha = tl.load(alpha_ptr).to(tl.float32)
    dp = tl.zeros_like(z)
    if HAS:
        dp = summed(grad_ptr, token * STRIDE + lines, mask, tokens, STRIDE, PARTS) * SCALE
        if SIGMOID:
            act = tl.sigmoid(z * alpha + tl.load(bias_ptr + START + lines, mask=mask, other=0.0).to(tl.float32))
            dp = dp * act * (1.0 - act)
        dp = tl.where(mask, dp, 0.0)
    return dp, z, alpha


@triton.jit
def logits_backward_kernel(
    d_pre_ptr, d_post_ptr, d_res_ptr, projection_ptr, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr,
    dm_ptr, multiple_ptr, sums_ptr, early_dm_ptr, early_inner_ptr, early_sums_ptr, tokens, TOTAL: tl.constexpr,
    STAGE: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_RES: tl.constexpr, STRIDE: tl.constexpr,
    PRE_STRIDE: tl.constexpr, PARTS: tl.constexpr, TWO: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    RES: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr, SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr,
    PRE_EPS: tl.constexpr, POST_SCALE: tl.constexpr, POST_EPS: tl.constexpr, SINKHORN: tl.constexpr,
    POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr, STEPS: tl.constexpr,
    EPS: tl.constexpr, CLAMP: tl.constexpr,
) -> None:  # fmt: skip
    """Program: TOKENS tokens. sums[program] = (sum of dp per row of phi, then sum of dp z per part).

    STAGE 0 does all of it. STAGE 1 leaves out pre, and writes to `multiple` what post and res add to `inner` [T, 2];
    STAGE 2 does pre and takes the rest from the results of STAGE 1, `early_*`: the same numbers in the same order.
    d_post and d_res are PARTS addends each, a token's STRIDE numbers apart: N for tensors of their own, else they lie
    side by side (post, res, pre; what there is of them), and PRE_STRIDE, N for a tensor of its own, is STRIDE where pre
    is among them, the last.
    """
    program = tl.program_id(0)
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    r = tl.load(projection_ptr + token * (K + 1) + K, mask=there, other=1.0)
    inner = tl.zeros((TOKENS,), dtype=tl.float32)
    lines = tl.arange(0, NP)[None, :] + tl.zeros((TOKENS, NP), dtype=tl.int32)
    mask = there[:, None] & (lines < N)
    out = token[:, None] * WIDTH
    line = tl.arange(0, NP)
    sums = sums_ptr + program * (K + 3)
    pad = tl.arange(0, KP)[None, :] + tl.zeros((TOKENS, KP), dtype=tl.int32)
    if STAGE != 2:
        store_halves(dm_ptr, out + pad, tl.zeros((TOKENS, KP), dtype=tl.float32), there[:, None] & (pad >= K), KP, TWO)
    else:
        other = there[:, None] & ((pad < PRE) | (pad >= PRE + N))
        tl.store(dm_ptr + out + pad, tl.load(early_dm_ptr + out + pad, mask=other, other=0.0), mask=other)
        if TWO:
            low = tl.load(early_dm_ptr + out + KP + pad, mask=other, other=0.0)
            tl.store(dm_ptr + out + KP + pad, low, mask=other)
        kept = tl.arange(0, 2 * KP)
        others = (kept < K + 3) & (kept != K) & ((kept < PRE) | (kept >= PRE + N))
        early = tl.load(early_sums_ptr + program * (K + 3) + kept, mask=others, other=0.0)
        tl.store(sums + kept, early, mask=others)
    if PRE >= 0 and STAGE != 1:
        dp, z, alpha = vector_part(d_pre_ptr + (PRE_STRIDE - N), projection_ptr, bias_ptr, alpha_pre_ptr,
                                   token[:, None], lines, mask, r[:, None], tokens, PRE, PRE_STRIDE,
                                   PARTS if PRE_STRIDE > N else 1, K, SIGMOID, PRE_SCALE, HAS_PRE)  # fmt: skip
        dm = dp * alpha / r[:, None]
        inner += tl.sum(dm * z, axis=1)
        store_halves(dm_ptr, out + PRE + lines, dm, mask, KP, TWO)
        tl.store(sums + PRE + line, tl.sum(dp, axis=0), mask=line < N)
        tl.store(sums + K, tl.sum(tl.sum(dp * z, axis=1), axis=0))
    if POST >= 0 and STAGE != 2:
        dp, z, alpha = vector_part(d_post_ptr, projection_ptr, bias_ptr, alpha_post_ptr, token[:, None], lines, mask,
                                   r[:, None], tokens, POST, STRIDE, PARTS, K, SIGMOID, POST_SCALE,
                                   HAS_POST)  # fmt: skip
        dm = dp * alpha / r[:, None]
        share = tl.sum(dm * z, axis=1)
        if STAGE == 1:
            tl.store(multiple_ptr + token * 2, share, mask=there)
        inner += share
        store_halves(dm_ptr, out + POST + lines, dm, mask, KP, TWO)
        tl.store(sums + POST + line, tl.sum(dp, axis=0), mask=line < N)
        tl.store(sums + K + 1, tl.sum(tl.sum(dp * z, axis=1), axis=0))
    if RES >= 0 and STAGE != 2:
        row, column = tl.arange(0, NP)[None, :, None], tl.arange(0, NP)[None, None, :]
        cells = row * N + column + tl.zeros((TOKENS, NP, NP), dtype=tl.int32)
        valid = (row < N) & (column < N) & (cells >= 0)
        mask3 = valid & there[:, None, None]
        token3 = token[:, None, None]
        z = tl.load(projection_ptr + token3 * (K + 1) + RES + cells, mask=mask3, other=0.0) / r[:, None, None]
        alpha = tl.load(alpha_res_ptr).to(tl.float32)
        ds = tl.zeros_like(z)
        if HAS_RES:
            cell_offsets = token3 * (STRIDE if STRIDE > N else N * N) + (N if STRIDE > N else 0) + cells
            ds = summed(d_res_ptr, cell_offsets, mask3, tokens, STRIDE, PARTS)
            if SINKHORN:
                bias = tl.load(bias_ptr + RES + cells, mask=valid, other=0.0).to(tl.float32)
                ds = iterate_backward(ds, z * alpha + bias, valid, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS,
                                      CLAMP, N, NP)  # fmt: skip
            ds = tl.where(mask3, ds, 0.0)
        dm = ds * alpha / r[:, None, None]
        share = tl.sum(tl.sum(dm * z, axis=2), axis=1)
        if STAGE == 1:
            tl.store(multiple_ptr + token * 2 + 1, share, mask=there)
        inner += share
        store_halves(dm_ptr, token3 * WIDTH + RES + cells, dm, mask3, KP, TWO)
        cell = tl.arange(0, NP)[:, None] * N + tl.arange(0, NP)[None, :]
        real = (tl.arange(0, NP)[:, None] < N) & (tl.arange(0, NP)[None, :] < N)
        tl.store(sums + RES + cell, tl.sum(ds, axis=0), mask=real)
        tl.store(sums + K + 2, tl.sum(tl.sum(tl.sum(ds * z, axis=2), axis=1), axis=0))
    if STAGE == 2:
        if POST >= 0:
            inner += tl.load(early_inner_ptr + token * 2, mask=there, other=0.0)
        if RES >= 0:
            inner += tl.load(early_inner_ptr + token * 2 + 1, mask=there, other=0.0)
    if STAGE != 1:
        multiple = tl.zeros((TOKENS,), dtype=tl.float32)
        if NORM == 0:
            multiple = -inner / (TOTAL * r)
        elif NORM == 1:
            length = r - NORM_EPS
            multiple = tl.where(length > 0, -inner / (TOTAL * length), 0.0)
        tl.store(multiple_ptr + token, multiple, mask=there)


def programs_of(tokens: Any, spec: CoefficientSpec) -> Any:
    """P: programs, and rows of partial sums."""
    block = tokens_a_program(spec.streams)
    return (tokens + block - 1) // block


def laid_out(
    d_pre: Tensor | None, d_post: Tensor | None, d_res: Tensor | None, spec: CoefficientSpec
) -> tuple[list[Tensor | None], dict[str, int]]:
    """(the three gradients, STRIDE, PRE_STRIDE and PARTS) for the two forms of `d_post` that `logits_backward` takes.
    The number of columns says what lies side by side; `site_boundary` makes them of four streams, one would be
    ambiguous."""
    n = spec.streams
    if d_post is None or d_post.dim() < 3:
        return [d_pre, d_post, d_res], {"STRIDE": n, "PRE_STRIDE": n, "PARTS": 1}
    parts, _, stride = d_post.shape
    with_res, with_pre = stride >= n + n * n, stride in (2 * n, 2 * n + n * n)
    given = [d_post if with_pre else d_pre, d_post, d_post if with_res else None]
    return given, {"STRIDE": stride, "PRE_STRIDE": stride if with_pre else n, "PARTS": parts}


@kernel_op(
    "logits_backward",
    schema=(
        "(Tensor? d_pre, Tensor? d_post, Tensor? d_res, Tensor projection, Tensor bias, Tensor alpha_pre, "
        f"Tensor? alpha_post, Tensor? alpha_res, int total, bool wide, {ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor)"
    ),
)
def logits_backward(
    d_pre: Tensor | None, d_post: Tensor | None, d_res: Tensor | None, projection: Tensor, bias: Tensor,
    alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None, total: int, wide: bool, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients [T, ...] of pre, post, res -> (dm [T, 2 KP] bf16 halves, or [T, KP] float32 if `wide`; multiple [T];
    sums [P, K + 3], to be summed over P).

    `d_post` may be the partial sums [S, T, n + n^2] of `site_boundary`, those of res behind those of post; without res
    [S, T, n]. With n more columns those of pre are the last of them. What is among them is None besides.
    """
    spec = spec_of(flat)
    gradients, layout = laid_out(d_pre, d_post, d_res, spec)
    tokens, padded = projection.shape[0], padded_rows(spec)
    width = padded if wide else 2 * padded
    dm = torch.empty((tokens, width), dtype=torch.float32 if wide else torch.bfloat16, device=projection.device)
    multiple = projection.new_empty((tokens,))
    block, programs = tokens_a_program(spec.streams), programs_of(tokens, spec)
    sums = projection.new_zeros((programs, spec.rows + 3))
    if nonempty(tokens):
        bias = bias.contiguous()
        given = [None if g is None else g.contiguous() for g in gradients]
        g = [projection if value is None else value for value in given]
        a = [bias if alpha is None else alpha for alpha in (alpha_pre, alpha_post, alpha_res)]
        launch(
            logits_backward_kernel, (programs,),
            *g, projection.contiguous(), bias, *a, dm, multiple, sums, bias, bias, bias, tokens, TOTAL=total, STAGE=0,
            HAS_PRE=given[0] is not None, HAS_POST=given[1] is not None, HAS_RES=given[2] is not None,
            **layout, TWO=not wide, WIDTH=width, TOKENS=block, num_warps=1,
            **activation_constants(spec),
        )  # fmt: skip
    return dm, multiple, sums


@logits_backward.register_fake
def _(
    d_pre: Tensor | None, d_post: Tensor | None, d_res: Tensor | None, projection: Tensor, bias: Tensor,
    alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None, total: int, wide: bool, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    spec = spec_of(flat)
    tokens, padded = projection.shape[0], padded_rows(spec)
    return (
        projection.new_empty((tokens, padded if wide else 2 * padded), dtype=torch.float32 if wide else torch.bfloat16),
        projection.new_empty((tokens,)),
        projection.new_empty((programs_of(tokens, spec), spec.rows + 3)),
    )


def phi_gradient(dm: Tensor, x: Tensor, spec: CoefficientSpec) -> Tensor:
    """dm^T vec(X) in float32 [K, nC], by the vendor's GEMM: deterministic, no atomics. x is [T, n, C]."""
    flat = x.reshape(x.shape[0], x.shape[1] * x.shape[2])
    padded = padded_rows(spec)
    if dm.dtype == torch.float32 or x.dtype != torch.bfloat16 or x.device.type != "cuda":
        whole = dm.to(torch.float32)
        if dm.dtype != torch.float32:
            whole = whole[:, :padded] + whole[:, padded:]
        return torch.mm(whole.t(), flat.to(torch.float32))[: spec.rows]
    both = torch.ops.aten.mm.dtype(dm.t(), flat, torch.float32)
    return both[: spec.rows] + both[padded : padded + spec.rows]
