"""From partial projections to all coefficients of a site, and beside that the next branch's normed input: one launch.

The branch waits for the gate of its mix alone, four numbers of a token: each program that mixes and norms a row makes
it for itself (as `gate_pre_norm` does). All coefficients, which post and the backward read, are made by programs of the
same launch that nobody waits for: the latency of Sinkhorn is hidden behind 5 u of memory. The arithmetic is that of
`activate` and `pre_norm`, hence the same bits, but with a matrix a thread: fewer instructions for more latency.
Traffic, n = 4: n + 1 = 5 u (with u kept n + 2 = 6), and the numbers of a token: its partial projections, which are read
twice, the coefficients and the projection.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA, empty_coefficients

from .activate_pre import gate_scalars, token_gates
from .base import LoweringLog, arguments, fake, readers, result
from .coefficients import activation_constants, lengths, spec_of, write_coefficients
from .few_tokens import lift, pending
from .gate_pre_norm import NORM_SCHEMA, norm_of
from .inline import insert_function, replace
from .launch import by_token, hint, kernel_op, launch, nonempty, tokens_of
from .pre_norm import columns, config, mix_and_norm, normed_like

WARP = 32
"""Threads of a warp."""
STREAMS = (1, 2, 4)
"""A thread that holds a matrix of three streams adds in another order than `activate`; eight are 64 numbers."""
LEAST = 2048
"""Least tokens (by their example). On an H200 a site gains 7 us of 300 with 8192 tokens and 3 of 86 with 2048; with
fewer, one Sinkhorn a thread takes longer than the norm beside it (36 us for 32 with 1024; `benchmarks.decode`)."""


@triton.jit
def activate_beside_norm_kernel(
    partial_ptr, coefficient_bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, x_ptr, weight_ptr, bias_ptr,
    pre_ptr, post_ptr, res_ptr, projection_ptr, out_ptr, statistics_ptr, mixed_ptr, tokens, TOTAL: tl.constexpr,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr,
    SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr, POST_SCALE: tl.constexpr,
    POST_EPS: tl.constexpr, SINKHORN: tl.constexpr, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr,
    ROW_FIRST: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, KEEP: tl.constexpr, LAYER: tl.constexpr, BRANCH_EPS: tl.constexpr, OFFSET: tl.constexpr,
    ROUND: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Programs 0 to T / TOKENS: the coefficients of TOKENS tokens each; those behind: the branch input of one token."""
    groups = (tokens + TOKENS - 1) // TOKENS
    if tl.program_id(0) < groups:
        group = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        r = lengths(partial_ptr, group * KP, group < tokens, tokens, TOTAL, SPLITS, TOKENS, K, KP, NORM, NORM_EPS)
        tl.store(projection_ptr + group * (K + 1) + K, r, mask=group < tokens)
        write_coefficients(
            partial_ptr, coefficient_bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr, res_ptr,
            projection_ptr, group, r, tokens, SPLITS, TOKENS, N, NP, K, KP, PRE, POST, RES, SIGMOID, PRE_SCALE, PRE_EPS,
            POST_SCALE, POST_EPS, SINKHORN, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, True, True,
        )  # fmt: skip
    else:
        token = (tl.program_id(0) - groups).to(tl.int64)
        here = token + tl.zeros((1,), dtype=tl.int64)
        gates = token_gates(partial_ptr, coefficient_bias_ptr, alpha_pre_ptr, here, tokens, TOTAL, SPLITS, 1, N, NP, K,
                            KP, PRE, NORM, NORM_EPS, SIGMOID, PRE_SCALE, PRE_EPS)  # fmt: skip
        mix_and_norm(
            gate_scalars(gates, N, NP), x_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, mixed_ptr, token, C, N,
            BC, KEEP, LAYER, BRANCH_EPS, OFFSET, ROUND, WEIGHT, BIAS,
        )  # fmt: skip


@kernel_op(
    "activate_beside_norm",
    schema=(
        f"({NORM_SCHEMA}, Tensor partial, Tensor bias, Tensor alpha_pre, Tensor? alpha_post, Tensor? alpha_res, "
        f"int total, {ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def forward(
    state: Tensor, weight: Tensor | None, norm_bias: Tensor | None, kind: str, eps: float, offset: float,
    round_first: bool, keep: bool, partial: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None,
    alpha_res: Tensor | None, total: int, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments of `mhc_kernel::pre_norm` without its gate, then those of `mhc_kernel::activate` -> (out [..., C],
    statistics [..., 1 or 2], u [..., C] or empty, pre [T, n], post [T, n], res [T, n, n], projection [T, K + 1])."""
    spec, x = spec_of(flat), by_token(state, 2)
    tokens, _, width = x.shape
    out = x.new_empty((tokens, width))
    kept = torch.empty_like(out) if keep else x.new_empty(0)
    statistics = partial.new_empty((tokens, columns(kind)))
    h_pre, h_post, h_res = empty_coefficients(partial, [tokens], spec, torch.float32)
    projection = partial.new_empty((tokens, spec.rows + 1))
    if nonempty(tokens):
        settings = config(width)
        group = WARP * settings["num_warps"]  # a matrix a thread
        launch(
            activate_beside_norm_kernel, (tokens + triton.cdiv(tokens, group),), partial.contiguous(),
            bias.contiguous(), alpha_pre, alpha_pre if alpha_post is None else alpha_post,
            alpha_pre if alpha_res is None else alpha_res, x, x if weight is None else weight.contiguous(),
            x if norm_bias is None else norm_bias.contiguous(), h_pre, h_post, h_res, projection, out, statistics, kept,
            tokens, TOTAL=total, SPLITS=partial.shape[0], TOKENS=group, **activation_constants(spec), C=width,
            KEEP=keep, LAYER=kind == "layer", BRANCH_EPS=eps, OFFSET=offset, ROUND=round_first,
            WEIGHT=weight is not None, BIAS=norm_bias is not None, **settings,
        )  # fmt: skip
    batch = state.shape[:-2]
    kept = kept.view(*batch, width) if keep else kept
    normed = (out.view(*batch, width), statistics.view(*batch, columns(kind)), kept)
    return (*normed, h_pre, h_post, h_res, projection)


@forward.register_fake
def _(
    state: Tensor, weight: Tensor | None, norm_bias: Tensor | None, kind: str, eps: float, offset: float,
    round_first: bool, keep: bool, partial: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None,
    alpha_res: Tensor | None, total: int, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec, tokens = spec_of(flat), partial.shape[1]
    projection = partial.new_empty((tokens, spec.rows + 1))
    return (*normed_like(state, kind, keep), *empty_coefficients(partial, [tokens], spec, torch.float32), projection)


@dataclass(frozen=True)
class Found:
    """Coefficients, and the norm that reads their gate."""

    coefficients: fx.Node
    """`mhc_kernel::activate`."""
    norm: fx.Node
    """`mhc_kernel::pre_norm`."""


def find(graph: fx.Graph) -> list[Found]:
    """Every `activate` whose gate is read by a norm first. Changes nothing."""
    found = []
    for node in graph.nodes:
        if str(node.target) == "mhc_kernel.activate.default":
            norm = norm_of(readers(result(node, 0))[0])
            if norm is not None:
                found.append(Found(node, norm))
    return found


def needed(one: Found) -> dict[str, Any]:
    """What the norm reads beside the gate, by its op's names and in the order of this op."""
    return {name: value for name, value in arguments(one.norm).items() if name != "h_pre"}


def reason(one: Found) -> str:
    """Why what was found stays as it is; empty if `merge` takes it."""
    values = needed(one)
    streams: Tensor = fake(values["streams"])
    if streams.shape[-2] not in STREAMS:
        return f"{streams.shape[-2]} streams, a thread holds a matrix of {STREAMS}"
    tokens = hint(tokens_of(streams))
    if tokens < LEAST:
        return f"{tokens} tokens, Sinkhorn beside the norm is for at least {LEAST}"
    if pending(values.values(), one.coefficients) is None:
        return "the norm reads what is not known before the coefficients"
    return ""


def merge(graph: fx.Graph, log: LoweringLog) -> int:
    """Replace every pair found by one call in the place of the first, where all that the norm reads can be known there;
    returns how many."""
    count = 0
    for one in find(graph):
        why = reason(one)
        if why:
            log.record("activate + pre_norm", "two kernels", why)
            continue
        values = needed(one)
        lift(values.values(), one.coefficients)
        given = [*values.values(), *arguments(one.coefficients).values()]
        outputs = insert_function(one.coefficients, torch.ops.mhc_kernel.activate_beside_norm.default, given)
        replace(one.coefficients, list(outputs[3:]))
        replace(one.norm, list(outputs[:3]))
        log.record("activate + pre_norm", "fused", "Sinkhorn beside the norm, in one launch")
        count += 1
    if count:
        graph.eliminate_dead_code()
    return count


__all__ = ["LEAST", "STREAMS", "Found", "find", "forward", "merge", "reason"]
