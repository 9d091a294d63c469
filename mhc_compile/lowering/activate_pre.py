"""The pre part of ``activate`` alone: what the branch waits for, while post, res and Sinkhorn run beside the branch.

The same arithmetic on the same partial projections as ``activate_kernel``, hence the same bits; it stores pre only.
Traffic: the projections of pre and the sums of squares, n + 1 numbers a token.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA

from .coefficients import activation_constants, gate, gate_logits, lengths, spec_of
from .launch import kernel_op, launch, nonempty
from .sinkhorn import tokens_a_program


@triton.jit
def token_gates(
    partial_ptr, bias_ptr, alpha_ptr, token, tokens, TOTAL: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PRE: tl.constexpr, NORM: tl.constexpr,
    NORM_EPS: tl.constexpr, SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """pre of the tokens `token` [TOKENS], from partial projections: [TOKENS, NP] float32."""
    there = token < tokens
    base = token * KP
    r = lengths(partial_ptr, base, there, tokens, TOTAL, SPLITS, TOKENS, K, KP, NORM, NORM_EPS)
    _, p = gate_logits(partial_ptr, bias_ptr, alpha_ptr, base, there, r, tokens, SPLITS, TOKENS, N, NP, KP, PRE)
    return gate(p, SIGMOID, PRE_SCALE, PRE_EPS)


@triton.jit
def gate_scalars(gates, N: tl.constexpr, NP: tl.constexpr) -> tl.tensor:
    """The gates of one token, [1, NP], as N scalars."""
    lines = tl.arange(0, NP)[None, :]
    found = ()
    for i in tl.static_range(N):
        found = found + (tl.sum(tl.sum(tl.where(lines == i, gates, 0.0), axis=1), axis=0),)
    return found


@triton.jit
def activate_pre_kernel(
    partial_ptr, bias_ptr, alpha_ptr, pre_ptr, tokens, TOTAL: tl.constexpr, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PRE: tl.constexpr,
    NORM: tl.constexpr, NORM_EPS: tl.constexpr, SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr,
) -> None:  # fmt: skip
    """Program: TOKENS tokens from partial projections to pre."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    p = token_gates(partial_ptr, bias_ptr, alpha_ptr, token, tokens, TOTAL, SPLITS, TOKENS, N, NP, K, KP, PRE, NORM,
                    NORM_EPS, SIGMOID, PRE_SCALE, PRE_EPS)  # fmt: skip
    lines = tl.arange(0, NP)[None, :] + tl.zeros((TOKENS, NP), dtype=tl.int32)
    mask = (token < tokens)[:, None] & (lines < N)
    tl.store(pre_ptr + token[:, None] * N + lines, p, mask=mask)


CONSTANTS = ("N", "NP", "K", "KP", "PRE", "NORM", "NORM_EPS", "SIGMOID", "PRE_SCALE", "PRE_EPS")


@kernel_op(
    "activate_pre",
    schema=f"(Tensor partial, Tensor bias, Tensor alpha_pre, int total, {ATTRIBUTE_SCHEMA}) -> Tensor",
)
def activate_pre(partial: Tensor, bias: Tensor, alpha_pre: Tensor, total: int, *flat: Any) -> Tensor:
    """partial [S, T, KP] -> pre [T, n] float32, as the first result of ``mhc_kernel::activate``."""
    spec = spec_of(flat)
    splits, tokens, _ = partial.shape
    h_pre = partial.new_empty((tokens, spec.part_size("pre")))
    if nonempty(tokens):
        block = tokens_a_program(spec.streams)
        every = activation_constants(spec)
        launch(
            activate_pre_kernel, (triton.cdiv(tokens, block),), partial.contiguous(), bias.contiguous(), alpha_pre,
            h_pre, tokens, TOTAL=total, SPLITS=splits, TOKENS=block, num_warps=1,
            **{name: every[name] for name in CONSTANTS},
        )  # fmt: skip
    return h_pre


@activate_pre.register_fake
def _(partial: Tensor, bias: Tensor, alpha_pre: Tensor, total: int, *flat: Any) -> Tensor:
    spec = spec_of(flat)
    return partial.new_empty((partial.shape[1], spec.part_size("pre")))
