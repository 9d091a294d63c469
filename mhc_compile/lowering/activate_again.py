"""``activate`` once more from the projection that was kept, for a backward that keeps no coefficients.

The same functions of the same numbers in the same layout as ``activate_kernel``, hence the same bits: the projection
[T, K + 1] is read where that one reads partial sums, and r, its last column, is there already.
Traffic, n = 4: 25 numbers a token read, 24 written; bound by the latency of Sinkhorn's half steps.
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

from mhc_compile.ops.activate import split
from mhc_compile.ops.spec import CoefficientSpec

from .coefficients import ATTRIBUTE_SCHEMA, activation_constants, gate, part_logits, spec_of
from .launch import STREAMS, by_token, kernel_op, launch, nonempty
from .sinkhorn import iterate, tokens_a_program


def refusal(named: dict[str, Any]) -> str:
    """Why no kernel takes this `mhc::activate` call; empty if one does."""
    spec = CoefficientSpec.from_op_arguments(named)
    if named["projection"].dtype != torch.float32:
        return f"dtype {named['projection'].dtype}"
    if spec.streams not in STREAMS:
        return f"{spec.streams} streams, kernels exist for {STREAMS}"
    return ""


@triton.jit
def activate_again_kernel(
    projection_ptr, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr, res_ptr, tokens,
    TOKENS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    RES: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr,
    POST_SCALE: tl.constexpr, POST_EPS: tl.constexpr, SINKHORN: tl.constexpr, POSITIVITY: tl.constexpr,
    POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr,
) -> None:  # fmt: skip
    """Program: TOKENS tokens from their projections to pre, post and res."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    base = token * (K + 1)
    r = tl.full((TOKENS,), 1.0, dtype=tl.float32)
    if NORM != 2:  # else a constant, as in the other kernel, where the division by it is none
        r = tl.load(projection_ptr + base + K, mask=there, other=1.0)
    line = tl.arange(0, NP)
    lines = line[None, :] + tl.zeros((TOKENS, NP), dtype=tl.int32)
    mask = there[:, None] & (lines < N)
    if PRE >= 0:
        _, p = part_logits(projection_ptr, bias_ptr, alpha_pre_ptr, base[:, None] + PRE + lines, PRE + lines, mask,
                           r[:, None], tokens, PRE, K + 1, 1)  # fmt: skip
        p = gate(p, SIGMOID, PRE_SCALE, PRE_EPS)
        tl.store(pre_ptr + token[:, None] * N + lines, p, mask=mask)
    if POST >= 0:
        _, q = part_logits(projection_ptr, bias_ptr, alpha_post_ptr, base[:, None] + POST + lines, POST + lines, mask,
                           r[:, None], tokens, POST, K + 1, 1)  # fmt: skip
        q = gate(q, SIGMOID, POST_SCALE, POST_EPS)
        tl.store(post_ptr + token[:, None] * N + lines, q.to(post_ptr.dtype.element_ty), mask=mask)
    if RES >= 0:
        row, column = tl.arange(0, NP)[None, :, None], tl.arange(0, NP)[None, None, :]
        cells = row * N + column + tl.zeros((TOKENS, NP, NP), dtype=tl.int32)
        valid = (row < N) & (column < N) & (cells >= 0)
        mask3 = valid & there[:, None, None]
        _, s = part_logits(projection_ptr, bias_ptr, alpha_res_ptr, base[:, None, None] + RES + cells, RES + cells,
                           mask3, r[:, None, None], tokens, RES, K + 1, 1)  # fmt: skip
        if SINKHORN:
            s = iterate(s, valid, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, N, NP)
        tl.store(res_ptr + token[:, None, None] * (N * N) + cells, s.to(res_ptr.dtype.element_ty), mask=mask3)


_PROJECTED = ("KP", "NORM_EPS")
"""Of the constants of ``activate_kernel``: what makes the projection, and nothing else."""


@kernel_op(
    "activate_again",
    schema=(
        "(Tensor projection, Tensor bias, Tensor alpha_pre, Tensor? alpha_post, Tensor? alpha_res, "
        f"{ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor)"
    ),
)
def activate_again(
    projection: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """projection [T, K + 1] -> (pre [T, n] float32, post [T, n], res [T, n, n]), as ``mhc_kernel::activate``."""
    spec = spec_of(flat)
    h_pre, h_post, h_res = _results(projection, spec)
    tokens = projection.shape[0]
    if nonempty(tokens):
        block = tokens_a_program(spec.streams)
        constants = activation_constants(spec)
        launch(
            activate_again_kernel, (triton.cdiv(tokens, block),),
            projection.contiguous(), bias.contiguous(), alpha_pre, bias if alpha_post is None else alpha_post,
            bias if alpha_res is None else alpha_res, h_pre, h_post, h_res, tokens, TOKENS=block, num_warps=1,
            **{name: value for name, value in constants.items() if name not in _PROJECTED},
        )  # fmt: skip
    return h_pre, h_post, h_res


@activate_again.register_fake
def _(
    projection: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(projection, spec_of(flat))


def _results(projection: Tensor, spec: CoefficientSpec) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, mix = projection.shape[0], spec.streams, spec.mix_dtype or torch.float32
    return (
        projection.new_empty((tokens, spec.part_size("pre"))),
        projection.new_empty((tokens, spec.part_size("post")), dtype=mix),
        projection.new_empty((tokens, n, n if "res" in spec.parts else 0), dtype=mix),
    )


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `mhc::activate` -> its results (traced into the graph)."""
    projection, bias, alphas, spec = split(args)
    batch, n = projection.shape[:-1], spec.streams
    h_pre, h_post, h_res = torch.ops.mhc_kernel.activate_again.default(
        by_token(projection, 1), bias, alphas["pre"], alphas["post"], alphas["res"], *args[5:]
    )
    return (
        h_pre.reshape(*batch, spec.part_size("pre")),
        h_post.reshape(*batch, spec.part_size("post")),
        h_res.reshape(*batch, n, n if "res" in spec.parts else 0),
    )
