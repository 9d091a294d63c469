"""coefficients, forward: a skinny GEMM that also sums the squares, then one small kernel from logits to coefficients.

`project` reads X once: tiles of X go straight from memory to the tensor core (an operand computed in registers would
pay a layout conversion a tile) against phi as two halves of X's dtype, phi = hi + lo, accumulated in float32.
`activate` divides by the norm, scales, adds the bias, applies the gate and runs Sinkhorn on chip.
Traffic, n = 4: project 4 u + phi; activate about 0.1 u.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA, ATTRIBUTES, empty_coefficients, split_arguments
from mhc_compile.ops.spec import CoefficientSpec

from .launch import FLOATS, STREAMS, by_token, dot, hint, kernel_op, launch, launch_tuned, nonempty, tokens_of
from .sinkhorn import constants as sinkhorn_constants
from .sinkhorn import iterate, tokens_a_program
from .sinkhorn import spec_refusal as sinkhorn_refusal

NORMS = {"rms": 0, "rms_outside": 1, "none": 2}


def refusal(named: dict[str, Any], x: Tensor, phi: Tensor, backward: bool) -> str:
    """Why no kernel takes this `mhc::coefficients` call; empty if one does."""
    spec = CoefficientSpec.from_op_arguments(named)
    if x.dtype not in FLOATS:
        return f"dtype {x.dtype}"
    if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in named.values()):
        return "float64 parameters"
    if spec.streams not in STREAMS:
        return f"{spec.streams} streams, kernels exist for {STREAMS}"
    if not isinstance(phi.shape[1], int):
        return "symbolic hidden size"
    return sinkhorn_refusal(spec.sinkhorn, backward) if spec.sinkhorn is not None else ""


def padded_rows(spec: CoefficientSpec) -> int:
    """KP: K coefficients and the sum of squares, rounded up to what the tensor core takes."""
    return max(16, int(triton.next_power_of_2(spec.rows + 1)))


def activation_constants(spec: CoefficientSpec) -> dict[str, Any]:
    """Compile-time attributes of the two `activate` kernels."""
    n, parts = spec.streams, spec.parts
    return {
        "N": n,
        "NP": int(triton.next_power_of_2(n)),
        "K": spec.rows,
        "KP": padded_rows(spec),
        "PRE": spec.offset("pre") if "pre" in parts else -1,
        "POST": spec.offset("post") if "post" in parts else -1,
        "RES": spec.offset("res") if "res" in parts else -1,
        "NORM": NORMS[spec.norm],
        "NORM_EPS": spec.norm_eps,
        "SIGMOID": spec.gate == "sigmoid",
        "PRE_SCALE": spec.pre_scale,
        "PRE_EPS": spec.pre_eps,
        "POST_SCALE": spec.post_scale,
        "POST_EPS": spec.post_eps,
        "SINKHORN": spec.sinkhorn is not None,
        **sinkhorn_constants(spec.sinkhorn),
    }


def halves(phi: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """phi = hi + lo in `dtype`: 16 mantissa bits in bf16, more than tf32 has, at twice its speed."""
    wide = phi.to(torch.float32)
    hi = wide.to(dtype)
    return hi, (wide - hi.to(torch.float32)).to(dtype)


@triton.jit
def project_kernel(
    x_ptr, hi_ptr, lo_ptr, out_ptr, tokens, TOTAL: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SPAN: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr,
) -> None:  # fmt: skip
    """Program (t, s): BT tokens times the s-th SPAN of the channels -> out[s, token, :K] and, at column K, sum of
    x^2."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    there = (rows < tokens)[:, None]
    ks = tl.arange(0, KP)
    inner = tl.arange(0, BK)
    first = tl.program_id(1) * SPAN
    x_ptrs = x_ptr + rows[:, None] * TOTAL + (first + inner)[None, :]
    phi_offsets = ks[:, None] * TOTAL + (first + inner)[None, :]
    known = (ks < K)[:, None]
    acc = tl.zeros((BT, KP), dtype=tl.float32)
    squares = tl.zeros((BT, BK), dtype=tl.float32)
    for start in range(0, SPAN, BK):
        inside = (first + start + inner)[None, :] < TOTAL
        x = tl.load(x_ptrs + start, mask=there & inside, other=0.0)
        hi = tl.load(hi_ptr + phi_offsets + start, mask=known & inside, other=0.0)
        acc = dot(x, tl.trans(hi), acc)
        if TWO:
            lo = tl.load(lo_ptr + phi_offsets + start, mask=known & inside, other=0.0)
            acc = dot(x, tl.trans(lo), acc)
        wide = x.to(tl.float32)
        squares += wide * wide
    out = out_ptr + tl.program_id(1).to(tl.int64) * tokens * KP + rows[:, None] * KP + ks[None, :]
    acc = tl.where((ks == K)[None, :], tl.sum(squares, axis=1)[:, None], acc)
    tl.store(out, acc, mask=there)


@triton.jit
def length(squares, TOTAL: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr) -> tl.tensor:
    """r from the sum of the squares of TOTAL channels, for the two kinds of norm."""
    return tl.sqrt(squares / TOTAL + NORM_EPS) if NORM == 0 else tl.sqrt(squares / TOTAL) + NORM_EPS


@triton.jit
def lengths(
    partial_ptr, base, there, tokens, TOTAL: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """r of each token: the root of the mean square, from the partial sums of squares in column K (1 without a norm)."""
    r = tl.full((TOKENS,), 1.0, dtype=tl.float32)
    if NORM != 2:
        squares = tl.load(partial_ptr + base + K, mask=there, other=1.0)
        for split in tl.static_range(1, SPLITS):
            part = base + K + tl.full((), split * KP, tl.int64) * tokens
            squares += tl.load(partial_ptr + part, mask=there, other=1.0)
        r = length(squares, TOTAL, NORM, NORM_EPS)
    return r


@triton.jit
def logits(m, r, alpha, bias) -> tl.tensor:
    """What the gates and Sinkhorn are applied to."""
    return m / r * alpha + bias


@triton.jit
def gate(p, SIGMOID: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr) -> tl.tensor:
    """SCALE act(p) + EPS."""
    return (tl.sigmoid(p) if SIGMOID else p) * SCALE + EPS


@triton.jit
def part_logits(
    partial_ptr, bias_ptr, alpha_ptr, offsets, lines, mask, r, tokens, START: tl.constexpr, KP: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(m, m / r * alpha + bias) of one part; `offsets` are token * KP + row, `lines` the row within phi."""
    m = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        m += tl.load(partial_ptr + tl.full((), split * KP, tl.int64) * tokens + offsets, mask=mask, other=0.0)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    bias = tl.load(bias_ptr + lines, mask=mask, other=0.0).to(tl.float32)
    return m, logits(m, r, alpha, bias)


@triton.jit
def gate_logits(
    partial_ptr, bias_ptr, alpha_ptr, base, there, r, tokens, SPLITS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, START: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`part_logits` of the N rows of phi from START on, each [TOKENS, NP]; `base` is token * KP, `r` the lengths."""
    lines = tl.arange(0, NP)[None, :] + tl.zeros((TOKENS, NP), dtype=tl.int32)
    mask = there[:, None] & (lines < N)
    return part_logits(partial_ptr, bias_ptr, alpha_ptr, base[:, None] + START + lines, START + lines, mask, r[:, None],
                       tokens, START, KP, SPLITS)  # fmt: skip


@triton.jit
def matrix_logits(
    partial_ptr, bias_ptr, alpha_ptr, base, there, r, tokens, SPLITS: tl.constexpr, TOKENS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, RES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(m, logits, number of each cell, mask of what is no padding) of the N * N rows from RES on, each [TOKENS, NP,
    NP]."""
    row, column = tl.arange(0, NP)[None, :, None], tl.arange(0, NP)[None, None, :]
    cells = row * N + column + tl.zeros((TOKENS, NP, NP), dtype=tl.int32)
    valid = (row < N) & (column < N) & (cells >= 0)
    m, s = part_logits(partial_ptr, bias_ptr, alpha_ptr, base[:, None, None] + RES + cells, RES + cells,
                       valid & there[:, None, None], r[:, None, None], tokens, RES, KP, SPLITS)  # fmt: skip
    return m, s, cells, valid


@triton.jit
def write_coefficients(
    partial_ptr, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr, res_ptr, projection_ptr,
    token, r, tokens, SPLITS: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr, SIGMOID: tl.constexpr,
    PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr, POST_SCALE: tl.constexpr, POST_EPS: tl.constexpr,
    SINKHORN: tl.constexpr, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr,
    STEPS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr, PROJECTION: tl.constexpr, WHOLE: tl.constexpr = False,
) -> None:  # fmt: skip
    """pre, post and res of the tokens `token` [TOKENS] with lengths `r`, from rows of KP sums each; PROJECTION: and the
    sums over the splits. WHOLE: see `sinkhorn.line_sum`."""
    there = token < tokens
    base = token * KP
    line = tl.arange(0, NP)
    lines = line[None, :] + tl.zeros((TOKENS, NP), dtype=tl.int32)
    mask = there[:, None] & (lines < N)
    if PRE >= 0:
        m, p = gate_logits(partial_ptr, bias_ptr, alpha_pre_ptr, base, there, r, tokens, SPLITS, TOKENS, N, NP, KP, PRE)
        if PROJECTION:
            tl.store(projection_ptr + token[:, None] * (K + 1) + PRE + lines, m, mask=mask)
        p = gate(p, SIGMOID, PRE_SCALE, PRE_EPS)
        tl.store(pre_ptr + token[:, None] * N + lines, p, mask=mask)
    if POST >= 0:
        m, q = gate_logits(partial_ptr, bias_ptr, alpha_post_ptr, base, there, r, tokens, SPLITS, TOKENS, N, NP, KP,
                           POST)  # fmt: skip
        if PROJECTION:
            tl.store(projection_ptr + token[:, None] * (K + 1) + POST + lines, m, mask=mask)
        q = gate(q, SIGMOID, POST_SCALE, POST_EPS)
        tl.store(post_ptr + token[:, None] * N + lines, q.to(post_ptr.dtype.element_ty), mask=mask)
    if RES >= 0:
        m, s, cells, valid = matrix_logits(partial_ptr, bias_ptr, alpha_res_ptr, base, there, r, tokens, SPLITS, TOKENS,
                                           N, NP, KP, RES)  # fmt: skip
        mask3 = valid & there[:, None, None]
        if PROJECTION:
            tl.store(projection_ptr + token[:, None, None] * (K + 1) + RES + cells, m, mask=mask3)
        if SINKHORN:
            s = iterate(s, valid, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, N, NP, WHOLE)
        tl.store(res_ptr + token[:, None, None] * (N * N) + cells, s.to(res_ptr.dtype.element_ty), mask=mask3)


@triton.jit
def activate_kernel(
    partial_ptr, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr, res_ptr, projection_ptr,
    tokens, TOTAL: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr, NORM: tl.constexpr,
    NORM_EPS: tl.constexpr, SIGMOID: tl.constexpr, PRE_SCALE: tl.constexpr, PRE_EPS: tl.constexpr,
    POST_SCALE: tl.constexpr, POST_EPS: tl.constexpr, SINKHORN: tl.constexpr, POSITIVITY: tl.constexpr,
    POSITIVE_EPS: tl.constexpr, ROW_FIRST: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr,
) -> None:  # fmt: skip
    """Program: TOKENS tokens from partial projections to pre, post, res and the projection that the backward needs."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    r = lengths(partial_ptr, token * KP, token < tokens, tokens, TOTAL, SPLITS, TOKENS, K, KP, NORM, NORM_EPS)
    tl.store(projection_ptr + token * (K + 1) + K, r, mask=token < tokens)
    write_coefficients(
        partial_ptr, bias_ptr, alpha_pre_ptr, alpha_post_ptr, alpha_res_ptr, pre_ptr, post_ptr, res_ptr, projection_ptr,
        token, r, tokens, SPLITS, TOKENS, N, NP, K, KP, PRE, POST, RES, SIGMOID, PRE_SCALE, PRE_EPS, POST_SCALE,
        POST_EPS, SINKHORN, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, True,
    )  # fmt: skip


def project_tile(tokens: int, padded: int, itemsize: int) -> tuple[int, int]:
    """(tokens, channels) of a tile: 64 x 128 where phi is narrow."""
    if itemsize > 2 or padded > 64:
        return (16 if tokens <= 32 else 32), 64
    return (16 if tokens <= 32 else 64), 128


def project_splits(tokens: int, padded: int, total: int, itemsize: int) -> int:
    """Parts of the channels that make enough programs for every multiprocessor: the fewer tokens, the more parts."""
    bt, bk = project_tile(tokens, padded, itemsize)
    programs, splits = triton.cdiv(max(tokens, 1), bt), 1
    while programs * splits < 256 and splits < 16 and total // (splits * 2) >= 4 * bk:
        splits *= 2
    return splits


def project_config(tokens: int, padded: int, total: int, itemsize: int, splits: int) -> dict[str, int]:
    """Tile, channels a program, warps and stages."""
    bt, bk = project_tile(tokens, padded, itemsize)
    span = triton.cdiv(triton.cdiv(total, splits), bk) * bk
    return {"BT": bt, "BK": bk, "SPAN": span, "num_warps": 4, "num_stages": 3 if itemsize == 2 else 2}


def project_others(tokens: int, padded: int, total: int, itemsize: int, splits: int) -> list[dict[str, int]]:
    """The fixed tile with more stages or warps and, where there are tokens enough, twice as high."""
    fixed = project_config(tokens, padded, total, itemsize, splits)
    found = [{**fixed, "num_stages": fixed["num_stages"] + 1}]
    if itemsize == 2 and tokens >= 1024:
        found += [{**fixed, "BT": 128, "num_warps": 8}, {**fixed, "BT": 128}, {**fixed, "num_warps": 8}]
    return found


@kernel_op("project")
def project(x: Tensor, phi_hi: Tensor, phi_lo: Tensor | None, rows: int, padded: int, splits: int) -> Tensor:
    """X [..., n, C], halves of phi [K, nC] -> partial sums [S, T, KP]: column k < K of phi, column K of x^2.

    S = `splits` parts of the channels, for few tokens; who reads the result sums over S.
    """
    x3 = by_token(x, 2)
    tokens, total = x3.shape[0], x3.shape[1] * x3.shape[2]
    shape = (hint(tokens), padded, total, x.element_size(), splits)
    out = torch.empty((splits, tokens, padded), dtype=torch.float32, device=x.device)
    if nonempty(tokens):
        # A model may keep phi as [nC, K]: what arrives is a view of it.
        hi = phi_hi.contiguous()
        launch_tuned(
            project_kernel,
            lambda tokens, config: (triton.cdiv(tokens, config["BT"]), splits),
            x3,
            hi,
            hi if phi_lo is None else phi_lo.contiguous(),
            out,
            tokens,
            TOTAL=total,
            K=rows,
            KP=padded,
            TWO=phi_lo is not None,
            config=project_config(*shape),
            others=functools.partial(project_others, *shape),
        )
    return out


@project.register_fake
def _(x: Tensor, phi_hi: Tensor, phi_lo: Tensor | None, rows: int, padded: int, splits: int) -> Tensor:
    return x.new_empty((splits, tokens_of(x), padded), dtype=torch.float32)


def in_batch(
    batch: Any, spec: CoefficientSpec, h_pre: Tensor, h_post: Tensor, h_res: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients by token, [T, ..], as [*batch, ..]."""
    n = spec.streams
    return (
        h_pre.reshape(*batch, spec.part_size("pre")),
        h_post.reshape(*batch, spec.part_size("post")),
        h_res.reshape(*batch, n, n if "res" in spec.parts else 0),
    )


def run_activate(
    partial: Tensor, bias: Tensor, alphas: dict[str, Tensor | None], spec: CoefficientSpec, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """partial [S, T, KP] -> (pre [T, n], post [T, n], res [T, n, n], projection [T, K + 1])."""
    splits, tokens, _ = partial.shape
    h_pre, h_post, h_res = empty_coefficients(partial, [tokens], spec, torch.float32)
    projection = partial.new_empty((tokens, spec.rows + 1))
    if nonempty(tokens):
        block = tokens_a_program(spec.streams)
        a = {part: bias if alpha is None else alpha for part, alpha in alphas.items()}
        launch(
            activate_kernel, (triton.cdiv(tokens, block),),
            partial, bias, a["pre"], a["post"], a["res"], h_pre, h_post, h_res, projection, tokens,
            TOTAL=total, SPLITS=splits, TOKENS=block, num_warps=1, **activation_constants(spec),
        )  # fmt: skip
    return h_pre, h_post, h_res, projection


def spec_of(flat: tuple[Any, ...]) -> CoefficientSpec:
    """The attributes in schema order -> the spec."""
    return CoefficientSpec.from_op_arguments(dict(zip(ATTRIBUTES, flat, strict=True)))


@kernel_op(
    "activate",
    schema=(
        "(Tensor partial, Tensor bias, Tensor alpha_pre, Tensor? alpha_post, Tensor? alpha_res, int total, "
        f"{ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def activate(
    partial: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None, total: int,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`run_activate` as an op."""
    alphas = {"pre": alpha_pre, "post": alpha_post, "res": alpha_res}
    return run_activate(partial.contiguous(), bias.contiguous(), alphas, spec_of(flat), total)


@activate.register_fake
def _(
    partial: Tensor, bias: Tensor, alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None, total: int,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec, tokens = spec_of(flat), partial.shape[1]
    return (*empty_coefficients(partial, [tokens], spec, torch.float32), partial.new_empty((tokens, spec.rows + 1)))


def partials(x: Tensor, phi: Tensor, spec: CoefficientSpec) -> Tensor:
    """X [..., n, C], phi [K, nC] -> partial sums [S, T, KP] for `activate`, by `project` (traced into the graph)."""
    hi, lo = (phi.to(torch.float32), None) if x.dtype == torch.float32 else halves(phi, x.dtype)
    padded = padded_rows(spec)
    splits = project_splits(hint(tokens_of(x)), padded, phi.shape[1], x.element_size())
    result: Tensor = torch.ops.mhc_kernel.project.default(x, hi, lo, spec.rows, padded, splits)
    return result


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `mhc::coefficients` -> its results, by `project` and `activate` (traced into the graph)."""
    x, phi, bias, alphas, spec = split_arguments(args)
    batch, total = x.shape[:-2], phi.shape[1]
    partial = partials(x, phi, spec)
    *coefficients, projection = torch.ops.mhc_kernel.activate.default(
        partial, bias, alphas["pre"], alphas["post"], alphas["res"], total, *args[6:]
    )
    return (*in_batch(batch, spec, *coefficients), projection.reshape(*batch, spec.rows + 1))
