"""`logits_backward` in two launches, for a side stream: post and res, whose gradients are there before the branch's
backward has begun, and pre, whose gradient is its last result.

    d_post, d_res -> early -> (dm without pre, inner, sums without pre)        Sinkhorn's backward: beside the branch
    d_pre, early  -> rest  -> (dm, multiple, sums)                             what the gradient of the state waits for

Stages 1 and 2 of the one kernel, hence the arithmetic and the bits of the whole. Traffic of `rest`: dm and the sums
twice, n + 3 numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA

from .coefficients import activation_constants, padded_rows, spec_of
from .coefficients_backward import laid_out, logits_backward_kernel, programs_of
from .launch import kernel_op, launch, nonempty
from .sinkhorn import tokens_a_program


def _outputs(projection: Tensor, wide: bool, flat: tuple[Any, ...], columns: tuple[int, ...]) -> tuple[Tensor, ...]:
    """dm, a tensor [T, *columns], sums; nothing written."""
    spec = spec_of(flat)
    tokens, padded = projection.shape[0], padded_rows(spec)
    dm = projection.new_empty((tokens, padded if wide else 2 * padded), dtype=torch.float32 if wide else torch.bfloat16)
    sums = projection.new_empty((programs_of(tokens, spec), spec.rows + 3))
    return dm, projection.new_empty((tokens, *columns)), sums


def _run(
    stage: int, d_pre: Tensor | None, d_post: Tensor | None, d_res: Tensor | None, projection: Tensor, bias: Tensor,
    alphas: list[Tensor | None], outputs: tuple[Tensor, ...], early: tuple[Tensor, ...], total: int, wide: bool,
    flat: tuple[Any, ...],
) -> None:  # fmt: skip
    spec, tokens = spec_of(flat), projection.shape[0]
    if not nonempty(tokens):
        return
    bias = bias.contiguous()
    gradients, layout = laid_out(d_pre, d_post, d_res, spec)
    given = [None if g is None else g.contiguous() for g in gradients]
    g = [projection if value is None else value for value in given]
    a = [bias if alpha is None else alpha for alpha in alphas]
    launch(
        logits_backward_kernel, (programs_of(tokens, spec),), *g, projection.contiguous(), bias, *a, *outputs, *early,
        tokens, TOTAL=total, STAGE=stage, HAS_PRE=given[0] is not None, HAS_POST=given[1] is not None,
        HAS_RES=given[2] is not None, **layout, TWO=not wide, WIDTH=outputs[0].shape[1],
        TOKENS=tokens_a_program(spec.streams), num_warps=1, **activation_constants(spec),
    )  # fmt: skip


@kernel_op(
    "logits_backward_early",
    schema=(
        "(Tensor? d_post, Tensor? d_res, Tensor projection, Tensor bias, Tensor alpha_pre, Tensor? alpha_post, "
        f"Tensor? alpha_res, int total, bool wide, {ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor)"
    ),
)
def early(
    d_post: Tensor | None, d_res: Tensor | None, projection: Tensor, bias: Tensor, alpha_pre: Tensor,
    alpha_post: Tensor | None, alpha_res: Tensor | None, total: int, wide: bool, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of post and res as `logits_backward` takes them -> (its dm, columns of pre not written; inner [T, 2],
    what post and res add to the norm's multiple; sums [P, K + 3], likewise)."""
    dm, inner, sums = _outputs(projection, wide, flat, (2,))
    _run(1, None, d_post, d_res, projection, bias, [alpha_pre, alpha_post, alpha_res], (dm, inner, sums),
         (bias, bias, bias), total, wide, flat)  # fmt: skip
    return dm, inner, sums


@early.register_fake
def _(
    d_post: Tensor | None, d_res: Tensor | None, projection: Tensor, bias: Tensor, alpha_pre: Tensor,
    alpha_post: Tensor | None, alpha_res: Tensor | None, total: int, wide: bool, *flat: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _outputs(projection, wide, flat, (2,))


@kernel_op(
    "logits_backward_rest",
    schema=(
        "(Tensor d_pre, Tensor early_dm, Tensor early_inner, Tensor early_sums, Tensor projection, Tensor bias, "
        f"Tensor alpha_pre, int total, bool wide, {ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor)"
    ),
)
def rest(
    d_pre: Tensor, early_dm: Tensor, early_inner: Tensor, early_sums: Tensor, projection: Tensor, bias: Tensor,
    alpha_pre: Tensor, total: int, wide: bool, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient [T, n] of pre and the results of `early` -> the results of `logits_backward`."""
    dm, multiple, sums = _outputs(projection, wide, flat, ())
    parts = early_dm.contiguous(), early_inner.contiguous(), early_sums.contiguous()
    _run(2, d_pre, None, None, projection, bias, [alpha_pre, None, None], (dm, multiple, sums), parts, total, wide,
         flat)  # fmt: skip
    return dm, multiple, sums


@rest.register_fake
def _(
    d_pre: Tensor, early_dm: Tensor, early_inner: Tensor, early_sums: Tensor, projection: Tensor, bias: Tensor,
    alpha_pre: Tensor, total: int, wide: bool, *flat: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _outputs(projection, wide, flat, ())


__all__ = ["early", "rest"]
