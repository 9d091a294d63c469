"""A call of every kernel's op: what opcheck, the opening into launches and the compiler for sm_90 go over."""

from __future__ import annotations

import functools
from typing import Any

import torch

from mhc_compile.lowering import (
    activate_again,
    activate_beside_norm,
    activate_post,
    activate_pre,
    activate_pre_norm,
    boundary,
    coefficients,
    coefficients_backward,
    ends,
    gate_pre_norm,
    logits_backward_parts,
    post,
    post_collapse,
    post_pre_norm,
    post_project,
    pre,
    pre_norm,
    replay,
    replay_normed,
    sinkhorn,
    site_boundary,
)
from mhc_compile.lowering.launch import KERNEL_OPS
from mhc_compile.ops import CoefficientSpec, SinkhornSpec
from tests.lowering.operands import DEVICE, N, operands

MODULES = (
    activate_again, activate_beside_norm, activate_post, activate_pre, activate_pre_norm, gate_pre_norm, post,
    post_collapse, post_pre_norm, post_project, pre, replay, replay_normed, sinkhorn,
)  # fmt: skip
"""Imported for the ops that they register."""
NAMES = sorted(str(op).removeprefix("mhc_kernel.").removesuffix(".default") for op in KERNEL_OPS)
"""Every kernel's op."""


def calls(
    tokens: Any,
    width: int,
    n: int = N,
    dtype: torch.dtype = torch.bfloat16,
    device: str = DEVICE,
    steps: int = SinkhornSpec().steps,
    norm: str = "rms",
) -> dict[str, list[tuple[Any, ...]]]:
    """Name of each kernel's op -> arguments of calls of it, for `n` streams of `dtype`. `tokens` may be a symbol: under
    a fake mode nothing runs, and any device will do."""
    x, g, y, du, q, h, p, weight, phi, bias, alphas, hi, lo = operands(tokens, width, n, dtype, device)
    spec = CoefficientSpec(streams=n, sinkhorn=SinkhornSpec(steps=steps))
    flat, total, wide = list(spec.op_arguments().values()), n * width, dtype == torch.float32
    padded = coefficients.padded_rows(spec)
    splits = coefficients.project_splits(coefficients.hint(tokens), padded, total, x.element_size())
    partial = torch.ops.mhc_kernel.project(x, hi, lo, spec.rows, padded, splits)
    active = (partial, bias, *alphas, total, *flat)
    projection = torch.ops.mhc_kernel.activate(*active)[3]
    shared = (projection, bias, *alphas, total, wide, *flat)
    dm, multiple, _ = coefficients_backward.logits_backward(p, q, h, *shared)
    early = logits_backward_parts.early(q, h, *shared)
    branch = (weight, weight if norm == "layer" else None, norm, 1e-6, 0.0, True)
    _, statistics, mixed = pre_norm.forward(x, p, *branch, True)
    dots = (du, x, p, weight, statistics, norm, 0.0, True)

    def gated(norms: int) -> tuple[list[torch.Tensor], ...]:
        return [p] * norms, [weight] * norms, [weight] * norms if norm == "layer" else []

    biased, dealt, hidden = norm == "layer", boundary.dealt_phi(phi, dm.dtype, n, dtype == torch.float16), (q, h)
    own = list((spec.sinkhorn or SinkhornSpec()).op_arguments().values())
    few = torch.ops.mhc_kernel.post_project(x, y, *hidden, False, phi, padded)[1]
    found: dict[str, list[tuple[Any, ...]]] = {
        "post": [(x, y, *hidden, False), (x, y, q, None, False)],
        "post_collapse": [(x, y, *hidden, False, "mean"), (x, y, q, None, False, "sum")],
        "post_dots": [
            (g, x, y, *hidden, True, True),
            (g, x, y, q, None, False, False),
            (du, x, y, *hidden, False, True),
        ],
        "pre": [(x, p)],
        "pre_dots": [(du, x, p)],
        "pre_norm": [(x, p, *branch, keep) for keep in (False, True)],
        "pre_norm_dots": [
            (*dots, True, True, biased, du, du),
            (*dots, False, True, biased, None, None, mixed),
        ],
        "post_pre_norm": [(x, y, *hidden, False, p, *branch, keep) for keep in (False, True)],
        "project": [(x, hi, lo, spec.rows, padded, splits)],
        "activate": [active],
        "activate_again": [(projection, bias, *alphas, *flat)],
        "activate_beside_norm": [(x, *branch, keep, *active) for keep in (False, True)],
        "activate_post": [(x, y, partial, bias, *alphas[1:], total, False, *flat)],
        "activate_pre": [(partial, bias, alphas[0], total, *flat)],
        "activate_pre_norm": [
            (few, bias, *alphas, x, given, *branch, store, store, *flat)
            for given, store in ((None, True), (None, False), (p, False))
        ],
        "gate_pre_norm": [(x, *branch, keep, partial, bias, alphas[0], total, *flat) for keep in (False, True)],
        "post_project": [(x, y, *hidden, False, phi, padded)],
        "logits_backward": [(p, *hidden, *shared)],
        "logits_backward_early": [(*hidden, *shared)],
        "logits_backward_rest": [(p, *early, projection, bias, alphas[0], total, wide, *flat)],
        "streams_backward": [
            (x, g, h, False, du, p, dm, dealt, multiple),
            (x, du, h, False, du, p, dm, dealt, multiple),
            *([] if ends.sum_refusal(x) else [(x, g, h, False, du, p, dm, dealt, multiple, True)]),
        ],
        "replay_normed": [
            (
                x,
                [y] * len(normed),
                [q] * len(normed),
                [h] * len(normed),
                False,
                normed,
                written,
                *gated(sum(normed)),
                *branch[2:],
                keep,
            )
            for normed, written, keep in (
                ([True] * replay.MOST, [True] * replay.MOST, False),
                ([True, False, True], [False, True, True], True),
            )
        ],
        "replay": [(x, [y] * replay.MOST, [q] * replay.MOST, [h] * replay.MOST, False)],
        "sinkhorn": [(h, *own)],
        "sinkhorn_backward": [(h, h, *own)],
    }
    if not site_boundary.refusal(x):
        across = (g, h, du, p, dm, dealt, multiple, x, y, q, h, False)
        sums = torch.ops.mhc_kernel.site_boundary(*across)[2]
        found["site_boundary"] = [across, (*across, True), (du, *across[1:])]
        found["logits_backward"].append((p, sums, None, *shared))
    return found


@functools.cache
def small() -> dict[str, list[tuple[Any, ...]]]:
    """`calls` that Triton's interpreter does not take long for."""
    return calls(5, 64, steps=4)
