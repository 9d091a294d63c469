"""Sinkhorn on chip: every half step forward, and a backward that recomputes the divisors and walks the matrix back.

The matrices of a few tokens sit in registers as [B, NP, NP] (NP = n rounded up to a power of two, padding kept
neutral).
Backward: a half step is M' = M / d, so M = M' d; keeping only the divisors d (n numbers a step, in registers) is
enough to walk back, and nothing is written to memory. That loop is unrolled, hence the limit on the number of steps.
Traffic: n^2 + n^2 numbers a token forward, 3 n^2 backward; bound by latency, not by bandwidth.
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

from mhc_compile.ops.spec import SinkhornSpec

from .launch import FLOATS, STREAMS, by_token, kernel_op, launch, nonempty

MAX_BACKWARD_STEPS = 64
TOKENS = 8
"""Tokens of a program of one warp: 8 tokens of 16 numbers are one 16-byte access a thread."""


def spec_refusal(spec: SinkhornSpec, backward: bool) -> str:
    """Why the kernel does not run these attributes; empty if it does."""
    if backward and spec.steps > MAX_BACKWARD_STEPS:
        return f"{spec.steps} half steps, the backward kernel unrolls at most {MAX_BACKWARD_STEPS}"
    return ""


def refusal(named: dict[str, Any], logits: Tensor, backward: bool) -> str:
    """Why no kernel takes this `mhc::sinkhorn` call; empty if one does."""
    if logits.dtype not in FLOATS:
        return f"dtype {logits.dtype}"
    if logits.shape[-1] not in STREAMS:
        return f"{logits.shape[-1]} streams, kernels exist for {STREAMS}"
    return spec_refusal(SinkhornSpec.from_op_arguments(named), backward)


def constants(spec: SinkhornSpec | None) -> dict[str, Any]:
    """The kernel's compile-time attributes."""
    spec = spec if spec is not None else SinkhornSpec(steps=0)
    return {
        "POSITIVITY": spec.positivity,
        "POSITIVE_EPS": spec.positive_eps,
        "ROW_FIRST": spec.first == "row",
        "STEPS": spec.steps,
        "EPS": spec.eps,
        "CLAMP": spec.eps_mode == "clamp",
    }


@triton.jit
def _pad_lines(total, N: tl.constexpr, NP: tl.constexpr, AXIS: tl.constexpr) -> tl.tensor:
    """The sums of padding lines become 1, so that dividing by them changes nothing."""
    if N != NP:
        line = tl.arange(0, NP)
        line = line[None, None, :] if AXIS == 1 else line[None, :, None]
        total = tl.where(line < N, total, 1.0)
    return total


@triton.jit
def line_sum(m, AXIS: tl.constexpr, WHOLE: tl.constexpr) -> tl.tensor:
    """The sums along AXIS, kept as a dimension of size 1.

    WHOLE: a thread holds whole matrices of up to 4 x 4. It adds down a column what is half a column apart first, as the
    threads do that share a matrix where this is False: the same bits.
    """
    if WHOLE and AXIS == 1 and m.shape[1] > 2:
        m = tl.sum(tl.reshape(m, (m.shape[0], 2, m.shape[1] // 2, m.shape[2])), axis=1)
    return tl.sum(m, axis=AXIS, keep_dims=True)


@triton.jit
def divisor(
    m, AXIS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    WHOLE: tl.constexpr = False,
) -> tl.tensor:  # fmt: skip
    """The divisors of one half step along AXIS, kept as a dimension of size 1."""
    total = line_sum(m, AXIS, WHOLE)
    if CLAMP:
        total = tl.maximum(total, EPS)
    else:
        total = total + EPS
    return _pad_lines(total, N, NP, AXIS)


@triton.jit
def log_sum(m, AXIS: tl.constexpr, WHOLE: tl.constexpr = False) -> tl.tensor:
    """logsumexp along AXIS, kept as a dimension of size 1."""
    top = tl.max(m, axis=AXIS, keep_dims=True)
    return top + tl.log(line_sum(tl.exp(m - top), AXIS, WHOLE))


@triton.jit
def positive(x, valid, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr) -> tl.tensor:
    """The matrix the half steps start from; padding is 0 (-1e30 for `log`)."""
    if POSITIVITY == "softmax":
        low = tl.where(valid, x, -1e30)
        e = tl.exp(low - tl.max(low, axis=2, keep_dims=True))
        m = e / tl.sum(e, axis=2, keep_dims=True) + POSITIVE_EPS
    elif POSITIVITY == "exp":
        m = tl.exp(x) + POSITIVE_EPS
    elif POSITIVITY == "exp_rowmax":
        low = tl.where(valid, x, -1e30)
        m = tl.exp(x - tl.max(low, axis=2, keep_dims=True)) + POSITIVE_EPS
    elif POSITIVITY == "abs":
        m = tl.abs(x) + POSITIVE_EPS
    else:
        m = x
    return tl.where(valid, m, -1e30 if POSITIVITY == "log" else 0.0)


@triton.jit
def half_step(
    m, valid, AXIS: tl.constexpr, LOG: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, QUOTIENT: tl.constexpr, WHOLE: tl.constexpr = False,
) -> tl.tensor:  # fmt: skip
    """One normalisation along AXIS (2 = row, 1 = column). QUOTIENT: the divisor may be a denormal, whose reciprocal is
    infinite. WHOLE: see `line_sum`."""
    if LOG:
        return tl.where(valid, m - log_sum(m, AXIS, WHOLE), -1e30)
    if QUOTIENT:
        return m / divisor(m, AXIS, EPS, CLAMP, N, NP, WHOLE)
    return m * (1.0 / divisor(m, AXIS, EPS, CLAMP, N, NP, WHOLE))


@triton.jit
def iterate(
    x, valid, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr, STEPS: tl.constexpr,
    EPS: tl.constexpr, CLAMP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, WHOLE: tl.constexpr = False,
) -> tl.tensor:  # fmt: skip
    """Logits [B, NP, NP] -> the projected matrix. WHOLE: see `line_sum`."""
    LOG: tl.constexpr = POSITIVITY == "log"
    FIRST: tl.constexpr = 2 if ROW_FIRST else 1
    QUOTIENT: tl.constexpr = POSITIVITY == "exp" and EPS == 0.0  # nothing takes the maximum off, or keeps lines from 0
    m = positive(x, valid, POSITIVITY, POSITIVE_EPS)
    for _ in range(STEPS // 2):
        m = half_step(m, valid, FIRST, LOG, EPS, CLAMP, N, NP, QUOTIENT, WHOLE)
        m = half_step(m, valid, 3 - FIRST, LOG, EPS, CLAMP, N, NP, QUOTIENT, WHOLE)
    if STEPS % 2 == 1:
        m = half_step(m, valid, FIRST, LOG, EPS, CLAMP, N, NP, QUOTIENT, WHOLE)
    if LOG:
        m = tl.exp(m)
    return m


@triton.jit
def iterate_backward(
    g, x, valid, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr, STEPS: tl.constexpr,
    EPS: tl.constexpr, CLAMP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Gradient [B, NP, NP] of the projected matrix -> gradient of the logits."""
    LOG: tl.constexpr = POSITIVITY == "log"
    FIRST: tl.constexpr = 2 if ROW_FIRST else 1
    g = tl.where(valid, g, 0.0)
    m = positive(x, valid, POSITIVITY, POSITIVE_EPS)
    history = ()
    # The axis of step k, FIRST or 3 - FIRST, is spelled out: a constexpr cannot be bound twice when unrolled.
    for k in tl.static_range(STEPS):
        if LOG:
            d = log_sum(m, FIRST + (3 - 2 * FIRST) * (k % 2))
            m = tl.where(valid, m - d, -1e30)
        else:
            d = divisor(m, FIRST + (3 - 2 * FIRST) * (k % 2), EPS, CLAMP, N, NP)
            m = m * (1.0 / d)
        history = history + (d,)
    if LOG:
        g = g * tl.exp(m)
    for j in tl.static_range(STEPS):
        d = history[STEPS - 1 - j]
        if LOG:
            g = g - tl.exp(m) * tl.sum(g, axis=FIRST + (3 - 2 * FIRST) * ((STEPS - 1 - j) % 2), keep_dims=True)
            m = tl.where(valid, m + d, -1e30)
        else:
            inner = tl.sum(g * m, axis=FIRST + (3 - 2 * FIRST) * ((STEPS - 1 - j) % 2), keep_dims=True)
            if CLAMP:
                inner = tl.where(d > EPS, inner, 0.0)
            g = (g - inner) * (1.0 / d)
            m = m * d
    return positive_backward(tl.where(valid, g, 0.0), x, valid, POSITIVITY)


@triton.jit
def positive_backward(g, x, valid, POSITIVITY: tl.constexpr) -> tl.tensor:
    """Gradient of `positive`; the row maximum carries its share, ties evenly, as torch.amax does."""
    if POSITIVITY == "softmax":
        low = tl.where(valid, x, -1e30)
        e = tl.exp(low - tl.max(low, axis=2, keep_dims=True))
        s = e / tl.sum(e, axis=2, keep_dims=True)
        g = s * (g - tl.sum(g * s, axis=2, keep_dims=True))
    elif POSITIVITY == "exp":
        g = g * tl.exp(x)
    elif POSITIVITY == "exp_rowmax":
        low = tl.where(valid, x, -1e30)
        top = tl.max(low, axis=2, keep_dims=True)
        g = g * tl.exp(x - top)
        is_top = tl.where(low == top, 1.0, 0.0)
        g = g - is_top / tl.sum(is_top, axis=2, keep_dims=True) * tl.sum(g, axis=2, keep_dims=True)
    elif POSITIVITY == "abs":
        g = g * tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    return g


@triton.jit
def matrix_offsets(program, tokens, TOKENS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr) -> tl.tensor:
    """(offsets into [T, n, n], mask of what exists, mask of what is no padding), each [B, NP, NP]."""
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.arange(0, NP)[None, :, None]
    column = tl.arange(0, NP)[None, None, :]
    valid = (row < N) & (column < N) & (token[:, None, None] >= 0)
    offsets = token[:, None, None] * (N * N) + row * N + column
    return offsets, valid & (token[:, None, None] < tokens), valid


@triton.jit
def sinkhorn_kernel(
    logits_ptr, out_ptr, tokens, N: tl.constexpr, NP: tl.constexpr, TOKENS: tl.constexpr,
    POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr, STEPS: tl.constexpr,
    EPS: tl.constexpr, CLAMP: tl.constexpr,
) -> None:  # fmt: skip
    """One program: TOKENS matrices from logits to H."""
    offsets, mask, valid = matrix_offsets(tl.program_id(0), tokens, TOKENS, N, NP)
    x = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    m = iterate(x, valid, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, N, NP)
    tl.store(out_ptr + offsets, m.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sinkhorn_backward_kernel(
    grad_ptr, logits_ptr, out_ptr, tokens, N: tl.constexpr, NP: tl.constexpr, TOKENS: tl.constexpr,
    POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr, STEPS: tl.constexpr,
    EPS: tl.constexpr, CLAMP: tl.constexpr,
) -> None:  # fmt: skip
    """One program: TOKENS gradients from H back to the logits."""
    offsets, mask, valid = matrix_offsets(tl.program_id(0), tokens, TOKENS, N, NP)
    x = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = iterate_backward(g, x, valid, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, N, NP)
    tl.store(out_ptr + offsets, g.to(out_ptr.dtype.element_ty), mask=mask)


def tokens_a_program(n: int) -> int:
    """Tokens a program so that a warp has about one 16-byte access a thread."""
    return max(1, min(32, 128 // triton.next_power_of_2(n) ** 2))


def _run(kernel: Any, matrices: list[Tensor], spec: SinkhornSpec) -> Tensor:
    """Launch a kernel of [..., n, n] tensors, the last of them the logits, whose shape and dtype the result has."""
    inputs = [by_token(matrix, 2) for matrix in matrices]
    out = torch.empty_like(inputs[-1])
    tokens, n = out.shape[0], out.shape[-1]
    if nonempty(tokens):
        block = tokens_a_program(n)
        launch(
            kernel, (triton.cdiv(tokens, block),), *inputs, out, tokens, N=n, NP=triton.next_power_of_2(n),
            TOKENS=block, num_warps=1, **constants(spec),
        )  # fmt: skip
    return out.view(matrices[-1].shape)


@kernel_op("sinkhorn")
def forward(
    logits: Tensor, positivity: str, positive_eps: float, first: str, steps: int, eps: float, eps_mode: str
) -> Tensor:
    """logits [..., n, n] -> H, by the kernel."""
    spec = SinkhornSpec(positivity, positive_eps, first, steps, eps, eps_mode)  # type: ignore[arg-type]  # flat op arguments
    return _run(sinkhorn_kernel, [logits], spec)


@forward.register_fake
def _(
    logits: Tensor, positivity: str, positive_eps: float, first: str, steps: int, eps: float, eps_mode: str
) -> Tensor:
    return logits.new_empty(logits.shape)


@kernel_op("sinkhorn_backward")
def backward(
    grad: Tensor,
    logits: Tensor,
    positivity: str,
    positive_eps: float,
    first: str,
    steps: int,
    eps: float,
    eps_mode: str,
) -> Tensor:
    """dH [..., n, n] -> dlogits, by the kernel."""
    spec = SinkhornSpec(positivity, positive_eps, first, steps, eps, eps_mode)  # type: ignore[arg-type]  # flat op arguments
    return _run(sinkhorn_backward_kernel, [grad, logits], spec)


@backward.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    positivity: str,
    positive_eps: float,
    first: str,
    steps: int,
    eps: float,
    eps_mode: str,
) -> Tensor:
    return logits.new_empty(logits.shape)
