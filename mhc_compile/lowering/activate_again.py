"""``activate`` once more from the projection that was kept, for a backward that keeps no coefficients.

`write_coefficients` as in ``activate_kernel``, of the same numbers in the same layout, hence the same bits: the
projection [T, K + 1] is read where that one reads partial sums, and r, its last column, is there already.
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
from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA, empty_coefficients
from mhc_compile.ops.spec import CoefficientSpec

from .coefficients import (
    activation_constants,
    in_batch,
    spec_of,
    write_coefficients,
)
from .launch import STREAMS, by_token, kernel_op, launch, nonempty
from .sinkhorn import tokens_a_program


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
    r = tl.full((TOKENS,), 1.0, dtype=tl.float32)
    if NORM != 2:  # else a constant, as in the other kernel, where the division by it is none
        r = tl.load(projection_ptr + token * (K + 1) + K, mask=token < tokens, other=1.0)
    write_coefficients(
        projection_ptr, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr, res_ptr,
        projection_ptr, token, r, tokens, 1, TOKENS, N, NP, K, K + 1, PRE, POST, RES, SIGMOID, PRE_SCALE, PRE_EPS,
        POST_SCALE, POST_EPS, SINKHORN, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, False,
    )  # fmt: skip


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
    tokens = projection.shape[0]
    h_pre, h_post, h_res = empty_coefficients(projection, [tokens], spec, torch.float32)
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
    return empty_coefficients(projection, projection.shape[:1], spec_of(flat), torch.float32)


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `mhc::activate` -> its results (traced into the graph)."""
    projection, bias, alphas, spec = split(args)
    results = torch.ops.mhc_kernel.activate_again.default(
        by_token(projection, 1), bias, alphas["pre"], alphas["post"], alphas["res"], *args[5:]
    )
    return in_batch(projection.shape[:-1], spec, *results)
