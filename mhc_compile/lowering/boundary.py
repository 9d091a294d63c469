"""The gradient of the stream state, all its contributions in one pass.

    dX_i = sum_o H[o, i] dX'_o  +  h_pre_i du  +  (dm phi)_i  +  c X_i
           through post            through pre    through the projection and through the norm of the coefficients

Written one by one these are three tensors of n u each and the additions between them: 51 u a site. In one pass 13 u
are read and written (n = 4). A program holds a tile of tokens and channels; dm phi comes from the tensor core with a
contraction of only K rows, accumulated in float32 with the rest.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_compile.ops.spec import CoefficientSpec

from .coefficients import halves
from .coefficients_backward import phi_gradient
from .launch import by_token, dot, hint, is_row, kernel_op, launch_tuned, nonempty

GROUP = 32
"""Channels among which the tensor core's results are dealt out: 4 neighbouring threads hold 8 of them each."""


@triton.jit
def dealt(total, BT: tl.constexpr, BC: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """Rename the rows and columns of a tensor-core result so that a thread's 8 values of a row are neighbours.

    A thread of the tensor core holds columns 8 j + 2 t + e (t its place among four, e of 2, j counts blocks of 8) of
    rows
    16 w + 8 h + g. Calling them column 8 t + 2 j + e and row 8 W h + 8 w + g makes the layout the one of plain 16-byte
    loads, so that nothing passes through shared memory. phi's columns and dm's rows are permuted to fit (`dealt_phi`).
    """
    parts = tl.reshape(total, (BT // (16 * WARPS), WARPS, 2, 8, BC // 32, 4, 4, 2))
    return tl.reshape(tl.permute(parts, (0, 2, 1, 3, 4, 6, 5, 7)), (BT, BC))


@triton.jit
def scalars(pointer, rows, there, COUNT: tl.constexpr) -> tl.tensor:
    """COUNT float32 numbers a token, each [BT, 1]."""
    values = ()
    for index in tl.static_range(COUNT):
        values = values + (tl.load(pointer + rows * COUNT + index, mask=there, other=0.0).to(tl.float32),)
    return values


@triton.jit
def streams_backward_kernel(
    x_ptr, grad_ptr, res_ptr, du_ptr, pre_ptr, dm_ptr, phi_ptr, multiple_ptr, out_ptr, tokens, C: tl.constexpr,
    N: tl.constexpr, KP: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, SPAN: tl.constexpr,
    WARPS: tl.constexpr, POST: tl.constexpr, HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr, PRE: tl.constexpr,
    COEFFICIENTS: tl.constexpr, TWO: tl.constexpr, FINE: tl.constexpr, ALIKE: tl.constexpr, SUMMED: tl.constexpr,
) -> None:  # fmt: skip
    """Program: BT tokens, SPAN channels in blocks of BC, all streams; a block is loaded before any of it is stored.
    ALIKE: dX' is one row for all streams. SUMMED: dX is added up over the streams."""
    SPANS: tl.constexpr = (C + SPAN - 1) // SPAN
    MASKED: tl.constexpr = C % SPAN != 0
    CP: tl.constexpr = (C + 31) // 32 * 32
    program = tl.program_id(0)
    base = (program // SPANS).to(tl.int64) * BT
    line = tl.arange(0, BT)
    rows = line[:, None]
    there = rows < tokens - base
    # Offsets within a tile fit 32 bits; the tile's own place, which need not, goes into the pointers.
    state_base = base * (N * C)
    x_ptr += state_base
    grad_ptr += base * C if ALIKE else state_base
    out_ptr += base * C if SUMMED else state_base
    du_ptr += base * C
    res_ptr += base * (N * N)
    pre_ptr += base * N
    multiple_ptr += base
    dm_ptr += base * WIDTH
    if POST and HAS_RES:
        h = scalars(res_ptr, rows, there, N * N)
    if PRE:
        p = scalars(pre_ptr, rows, there, N)
    ks = tl.arange(0, KP)
    if COEFFICIENTS:
        block = line // (16 * WARPS) * (16 * WARPS)
        core = (block + (line // 8 % 2) * (8 * WARPS) + (line // 16 % WARPS) * 8 + line % 8)[:, None]
        dm = tl.load(dm_ptr + core * WIDTH + ks[None, :], mask=core < tokens - base, other=0.0)
        if TWO:
            low = tl.load(dm_ptr + core * WIDTH + KP + ks[None, :], mask=core < tokens - base, other=0.0)
        multiple = tl.load(multiple_ptr + rows, mask=there, other=0.0)
    first = (program % SPANS) * SPAN
    for step in range(0, SPAN, BC):
        columns = (first + step + tl.arange(0, BC))[None, :]
        mask = (there & (columns < C)) if MASKED else there
        state = rows * (N * C) + columns
        if COEFFICIENTS:
            phis = ()
            xs = ()
            for i in tl.static_range(N):
                offsets = ks[:, None] * (N * CP) + i * CP + columns
                if MASKED:
                    phis = phis + (tl.load(phi_ptr + offsets, mask=columns < CP, other=0.0),)
                else:
                    phis = phis + (tl.load(phi_ptr + offsets),)
            for i in tl.static_range(N):
                xs = xs + (tl.load(x_ptr + state + i * C, mask=mask, other=0.0),)
        if POST:
            gs = ()
            for o in tl.static_range(N):
                own = rows * C + columns if ALIKE else state + o * C
                gs = gs + (tl.load(grad_ptr + own, mask=mask, other=0.0),)
        if PRE:
            du = tl.load(du_ptr + rows * C + columns, mask=mask, other=0.0)
        if SUMMED:
            added = tl.zeros((BT, BC), dtype=tl.float32)
        for i in tl.static_range(N):
            total = tl.zeros((BT, BC), dtype=tl.float32)
            if COEFFICIENTS:
                core_total = dot(dm, phis[i], total)
                if TWO:
                    core_total = dot(low, phis[i], core_total)
                if FINE:
                    offsets = (KP + ks)[:, None] * (N * CP) + i * CP + columns
                    rest = tl.load(phi_ptr + offsets, mask=columns < CP, other=0.0)
                    core_total = dot(dm, rest, core_total)
                total = dealt(core_total, BT, BC, WARPS) + multiple * xs[i].to(tl.float32)
            if POST:
                if HAS_RES:
                    for o in tl.static_range(N):
                        total += h[i * N + o if TRANSPOSE else o * N + i] * gs[o].to(tl.float32)
                else:
                    total += gs[i].to(tl.float32)
            if PRE:
                total += p[i] * du.to(tl.float32)
            value = total.to(out_ptr.dtype.element_ty)
            if SUMMED:
                added += value.to(tl.float32)
            else:
                tl.store(out_ptr + state + i * C, value, mask=mask)
        if SUMMED:
            tl.store(out_ptr + rows * C + columns, added.to(out_ptr.dtype.element_ty), mask=mask)


def span_of(width: int) -> int:
    """Channels that a program walks over: 64, or another width that divides and saves the masks.

    Neighbouring programs run at the same time and read neighbouring channels, 64 bytes a row and step each. A longer
    walk would come back to a row after the memory has closed its page: 256 channels cost a sixth more than 64.
    """
    for span in (64, 96, 32):
        if width % span == 0:
            return span
    return 64


def streams_config(tokens: int, width: int, itemsize: int, streams: int = 4) -> dict[str, int]:
    """64 tokens by 32 channels a step on four warps (phi's tile is shared by them). Smaller tiles for few tokens and
    for float32, with more warps a tile where one warp's registers would not hold it."""
    span = span_of(width)
    if itemsize > 2:
        return _streams_setting(32, span, 2, 4) if streams <= 4 else _streams_setting(16, span, 1, 8)
    if tokens <= 16:
        return _streams_setting(16, span, 1, 1 if streams <= 4 else 4)
    return _streams_setting(64, span, 4, 4)


def _streams_setting(tokens: int, span: int, rows: int, warps: int) -> dict[str, int]:
    """`rows`: warps among which the tensor core's rows are dealt out."""
    return {"BT": tokens, "BC": GROUP, "SPAN": span, "WARPS": rows, "num_warps": warps, "num_stages": 1}


def streams_others(tokens: int, width: int, itemsize: int, streams: int = 4) -> list[dict[str, int]]:
    """Shorter and longer walks over the channels, half the tile and twice the tile."""
    fixed, span = streams_config(tokens, width, itemsize, streams), span_of(width)
    walks = [{**fixed, "SPAN": one} for one in (32, 128) if width % one == 0]
    if tokens <= 16 or itemsize > 2:
        return walks
    return [*walks, _streams_setting(32, span, 2, 2), _streams_setting(128, span, 8, 8)]


def dealt_phi(phi: Tensor, dtype: torch.dtype, streams: int, fine: bool = False) -> Tensor:
    """phi [K, nC] -> [KP, n, C rounded up to 32] in `dtype`, zero-padded, columns in the order that `dealt` undoes;
    `fine`: [2 KP, ..], what the rounding to `dtype` has left over below.

    One bf16 copy is enough for streams in bf16: its rounding is that of one term of a gradient that is rounded to bf16
    itself. Streams in float16 have 3 bits more (and dm, whose range float16 does not have, is in two bf16 halves).
    """
    rows, width = phi.shape[0], phi.shape[1] // streams
    padded = triton.cdiv(width, GROUP) * GROUP
    copies = halves(phi, dtype) if fine else (phi.to(dtype),)
    planes = []
    for copy in copies:
        plane = copy.reshape(rows, streams, width)
        plane = torch.nn.functional.pad(plane, (0, padded - width, 0, 0, 0, padded_width(rows) - rows))
        groups = plane.reshape(padded_width(rows), streams, padded // GROUP, 4, 4, 2)
        planes.append(groups.transpose(3, 4).reshape(padded_width(rows), streams, padded))
    return torch.cat(planes) if fine else planes[0]


def rows_of_phi(dm: Tensor) -> int:
    """KP of dm [T, 2 KP] in two halves, or [T, KP] float32."""
    return dm.shape[1] if dm.dtype == torch.float32 else dm.shape[1] // 2


@kernel_op("streams_backward")
def streams_backward(
    streams: Tensor,
    grad: Tensor | None,
    h_res: Tensor | None,
    transpose: bool,
    du: Tensor | None,
    h_pre: Tensor | None,
    dm: Tensor | None,
    phi: Tensor | None,
    multiple: Tensor | None,
    summed: bool = False,
) -> Tensor:
    """dX [..., n, C] in the dtype of `streams`: the terms whose tensors are given. `summed`: the sum of the streams,
    each rounded first, [..., C].

    grad [..., n, C] (or [..., C] where every stream has the same) with h_res [..., n, n] or None (identity); du
    [..., C] with h_pre [..., n]; dm [T, 2 KP] (or [T, KP] float32) with phi [KP, n, CP] (or [2 KP, n, CP]) from
    `dealt_phi` and multiple [T].
    """
    x = by_token(streams, 2)
    tokens, n, width = x.shape
    out = x.new_empty((tokens, width) if summed else x.shape)
    alike = grad is not None and is_row(grad, streams)
    if nonempty(tokens):
        padded = 16 if dm is None else rows_of_phi(dm)
        shape = (hint(tokens), width, x.element_size(), n)
        launch_tuned(
            streams_backward_kernel,
            lambda tokens, config: (triton.cdiv(tokens, config["BT"]) * triton.cdiv(width, config["SPAN"]),),
            x,
            x if grad is None else by_token(grad, 1 if alike else 2),
            x if h_res is None else by_token(h_res, 2),
            x if du is None else by_token(du, 1),
            x if h_pre is None else by_token(h_pre, 1),
            x if dm is None else dm.contiguous(),
            x if phi is None else phi.contiguous(),
            x if multiple is None else multiple.contiguous(),
            out,
            tokens,
            C=width,
            N=n,
            KP=padded,
            WIDTH=padded if dm is None else dm.shape[1],
            POST=grad is not None,
            HAS_RES=h_res is not None,
            TRANSPOSE=transpose,
            PRE=du is not None,
            COEFFICIENTS=dm is not None,
            TWO=dm is not None and dm.shape[1] == 2 * padded,
            FINE=phi is not None and phi.shape[0] == 2 * padded,
            ALIKE=alike,
            SUMMED=summed,
            config=streams_config(*shape),
            others=functools.partial(streams_others, *shape),
        )
    return out.view((*streams.shape[:-2], width) if summed else streams.shape)


@streams_backward.register_fake
def _(
    streams: Tensor,
    grad: Tensor | None,
    h_res: Tensor | None,
    transpose: bool,
    du: Tensor | None,
    h_pre: Tensor | None,
    dm: Tensor | None,
    phi: Tensor | None,
    multiple: Tensor | None,
    summed: bool = False,
) -> Tensor:
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]) if summed else streams.shape)


def padded_width(rows: int) -> int:
    """KP for K rows of phi."""
    return max(16, int(triton.next_power_of_2(rows + 1)))


def coefficients_pieces(*args: Any) -> tuple[Tensor, ...]:
    """The arguments of `mhc::coefficients_backward` -> (its six results, the first empty; then dm, `dealt_phi` and the
    multiple of vec(X), from which `streams_backward` makes the first). Traced into the graph."""
    from mhc_compile.ops.coefficients import split_backward_arguments

    grads, x, phi, bias, alphas, projection, needs, spec = split_backward_arguments(args)
    dm, multiple, sums = logits_gradients(grads, x, bias, alphas, projection, spec, args[11:])
    parameters = parameter_gradients(dm, sums, x, phi, bias, alphas, spec, needs)
    fine = x.dtype == torch.float16
    return (x.new_empty(0), *parameters, dm, dealt_phi(phi, dm.dtype, x.shape[-2], fine), multiple)


def coefficients_backward(*args: Any) -> tuple[Tensor, ...]:
    """The arguments of `mhc::coefficients_backward` -> its results (traced into the graph)."""
    *results, dm, phi, multiple = coefficients_pieces(*args)
    x, needs = args[3], args[10]
    if needs[0]:
        results[0] = torch.ops.mhc_kernel.streams_backward.default(x, None, None, False, None, None, dm, phi, multiple)
    return tuple(results)


def logits_gradients(
    grads: dict[str, Tensor | None],
    x: Tensor,
    bias: Tensor,
    alphas: dict[str, Tensor | None],
    projection: Tensor,
    spec: CoefficientSpec,
    flat: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dm, multiple, sums) of `logits_backward`, for tensors of any leading shape."""
    shapes = {"pre": 1, "post": 1, "res": 2}
    by_part = [None if grads[part] is None else flatten(grads[part], trailing) for part, trailing in shapes.items()]
    return torch.ops.mhc_kernel.logits_backward.default(
        *by_part, flatten(projection, 1), bias, alphas["pre"], alphas["post"], alphas["res"],
        spec.streams * x.shape[-1], x.dtype == torch.float32, *flat,
    )  # fmt: skip


def flatten(value: Any, trailing: int) -> Tensor:
    """[..., d1 .. dk] -> [T, d1 .. dk] as a view (or copy), traceable."""
    return value.reshape(math.prod(value.shape[: value.dim() - trailing]), *value.shape[value.dim() - trailing :])


def parameter_gradients(
    dm: Tensor,
    sums: Tensor,
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alphas: dict[str, Tensor | None],
    spec: CoefficientSpec,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(dphi, dbias, dalpha_pre, dalpha_post, dalpha_res); an unneeded one is empty."""
    total = sums.sum(0)
    d_phi = phi_gradient(dm, flatten(x, 2), spec).to(phi.dtype) if needs[1] else phi.new_empty(0)
    d_bias = total[: spec.rows].to(bias.dtype) if needs[2] else bias.new_empty(0)
    d_alphas = []
    for index, part in enumerate(("pre", "post", "res")):
        alpha = alphas[part]
        if needs[3 + index] and alpha is not None:
            value = total[spec.rows + index] if part in spec.parts else total.new_zeros(())
            d_alphas.append(value.to(alpha.dtype).reshape(alpha.shape))
        else:
            d_alphas.append(bias.new_empty(0))
    return (d_phi, d_bias, *d_alphas)


__all__ = ["coefficients_backward", "logits_gradients", "parameter_gradients", "streams_backward", "streams_config"]
