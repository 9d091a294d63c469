"""The gate, the mix and its norm in one kernel, where post, res and Sinkhorn run elsewhere: beside the branch
(`scheduler`), or within the post that reads them (`activate_post`).

What `activate_pre` and `pre_norm` do one after the other, with the same arithmetic and hence the same bits: each
program computes the gate of its own token from the partial projections. One launch less on the path that the branch
waits for.
Traffic, n = 4: n + 1 = 5 u (with u kept n + 2 = 6), and n + 1 numbers a token and split of the partial projections.
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

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA

from .activate_pre import CONSTANTS, gate_scalars, token_gates
from .base import LoweringLog, arguments, readers
from .coefficients import activation_constants, spec_of
from .inline import insert_function, replace
from .launch import by_token, kernel_op, launch, nonempty
from .pre_norm import columns, config, mix_and_norm, normed_like


@triton.jit
def gate_pre_norm_kernel(
    partial_ptr, gate_bias_ptr, alpha_ptr, x_ptr, weight_ptr, bias_ptr, pre_ptr, out_ptr, statistics_ptr, mixed_ptr,
    tokens, TOTAL: tl.constexpr, SPLITS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, PRE: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr, SIGMOID: tl.constexpr,
    PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, KEEP: tl.constexpr,
    LAYER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one token."""
    token = tl.program_id(0).to(tl.int64)
    here = token + tl.zeros((1,), dtype=tl.int64)
    gates = token_gates(partial_ptr, gate_bias_ptr, alpha_ptr, here, tokens, TOTAL, SPLITS, 1, N, NP, K, KP, PRE, NORM,
                        NORM_EPS, SIGMOID, PRE_SCALE, PRE_EPS)  # fmt: skip
    p = gate_scalars(gates, N, NP)
    mix_and_norm(
        p, x_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, mixed_ptr, token, C, N, BC, KEEP, LAYER, EPS, OFFSET,
        ROUND, WEIGHT, BIAS,
    )  # fmt: skip
    lines = tl.arange(0, NP)[None, :]
    tl.store(pre_ptr + token * N + lines, gates, mask=lines < N)


NORM_SCHEMA = (
    "Tensor state, Tensor? weight, Tensor? norm_bias, str kind, float eps, float offset, bool round_first, bool keep"
)
"""The arguments of `mhc_kernel::pre_norm` without its gate, which other kernels make themselves."""


@kernel_op(
    "gate_pre_norm",
    schema=(
        f"({NORM_SCHEMA}, Tensor partial, Tensor bias, Tensor alpha_pre, int total, {ATTRIBUTE_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def forward(
    state: Tensor, weight: Tensor | None, norm_bias: Tensor | None, kind: str, eps: float, offset: float,
    round_first: bool, keep: bool, partial: Tensor, bias: Tensor, alpha_pre: Tensor, total: int, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments of `mhc_kernel::pre_norm` without its gate, then those of `mhc_kernel::activate_pre` -> (out
    [..., C], statistics [..., 1 or 2], u [..., C] or empty, pre [T, n] float32)."""
    spec, x = spec_of(flat), by_token(state, 2)
    tokens, n, width = x.shape
    out = x.new_empty((tokens, width))
    kept = torch.empty_like(out) if keep else x.new_empty(0)
    statistics = partial.new_empty((tokens, columns(kind)))
    h_pre = partial.new_empty((tokens, n))
    if nonempty(tokens):
        every = activation_constants(spec)
        launch(
            gate_pre_norm_kernel, (tokens,), partial.contiguous(), bias.contiguous(), alpha_pre, x,
            x if weight is None else weight.contiguous(), x if norm_bias is None else norm_bias.contiguous(), h_pre,
            out, statistics, kept, tokens, TOTAL=total, SPLITS=partial.shape[0],
            **{name: every[name] for name in CONSTANTS}, C=width, KEEP=keep, LAYER=kind == "layer", EPS=eps,
            OFFSET=offset, ROUND=round_first, WEIGHT=weight is not None, BIAS=norm_bias is not None, **config(width),
        )  # fmt: skip
    batch = state.shape[:-2]
    kept = kept.view(*batch, width) if keep else kept
    return out.view(*batch, width), statistics.view(*batch, columns(kind)), kept, h_pre


@forward.register_fake
def _(
    state: Tensor, weight: Tensor | None, norm_bias: Tensor | None, kind: str, eps: float, offset: float,
    round_first: bool, keep: bool, partial: Tensor, bias: Tensor, alpha_pre: Tensor, total: int, *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (*normed_like(state, kind, keep), partial.new_empty((partial.shape[1], state.shape[-2])))


@dataclass(frozen=True)
class Found:
    """A gate that is made by a call of its own, the views through which it is read, and the norm that reads it
    first."""

    gate: fx.Node
    views: list[fx.Node]
    norm: fx.Node


def norm_of(readers_of_gate: list[fx.Node]) -> fx.Node | None:
    """The one norm among the readers of a gate, where it reads the gate before all others."""
    norms = [reader for reader in readers_of_gate if str(reader.target) == "mhc_kernel.pre_norm.default"]
    return norms[0] if len(norms) == 1 and norms[0] is min(readers_of_gate) else None


def find(graph: fx.Graph) -> list[Found]:
    """The gates that a norm can compute for itself. Changes nothing."""
    found = []
    for gate in graph.nodes:
        if str(gate.target) == "mhc_kernel.activate_pre.default":
            reading, views = readers([gate])
            norm = norm_of(reading)
            if norm is not None:
                found.append(Found(gate, views, norm))
    return found


def merge(graph: fx.Graph, log: LoweringLog) -> int:
    """Replace every pair found by one call; returns how many."""
    pairs = find(graph)
    for one in pairs:
        named = arguments(one.norm)
        del named["h_pre"]  # what is left is in the order of this op
        values = [*named.values(), *arguments(one.gate).values()]
        outputs = insert_function(one.norm, torch.ops.mhc_kernel.gate_pre_norm.default, values)
        one.gate.replace_all_uses_with(outputs[3])
        for view in one.views:
            one.norm.prepend(view)
        replace(one.norm, list(outputs[:3]))
        graph.erase_node(one.gate)
        log.record("activate_pre + pre_norm", "fused", "the gate where it is read, Sinkhorn elsewhere")
    return len(pairs)


__all__ = ["Found", "find", "forward", "merge"]
