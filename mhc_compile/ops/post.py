"""post: the streams after the branch, X'_o = sum_i H[o, i] X_i + h_post_o y.

Least traffic: 2n + 1 u forward (read X and y, write X'); backward 3n + 2 u (read dX', X, y; write dX, dy).
The equality of equal streams survives only where the rows of H (the axis contracted over) sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, check_streams, compute_dtype, keep, unneeded, without_autocast


def _oriented(h_res: Tensor, transpose: bool) -> Tensor:
    return h_res.transpose(-1, -2) if transpose else h_res


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [..., n, n] times x [..., n, C], one stream at a time: element-wise, so that a compiler fuses it, and
    exact in the compute dtype whatever the matmul precision setting says."""
    total = matrix[..., 0:1] * x[..., 0:1, :]
    for i in range(1, x.shape[-2]):
        total = total + matrix[..., i : i + 1] * x[..., i : i + 1, :]
    return total


@without_autocast
def native(streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool = False) -> Tensor:
    """X [..., n, C], y [..., C], h_post [..., n], h_res [..., n, n] or None (identity) -> X' in promote(X, y).

    `transpose` contracts over the rows of h_res instead (DeepSeek-V4: `comb.transpose(-1, -2) @ X`).
    """
    check_streams(streams)
    dtype = compute_dtype(streams, y, h_post, h_res)
    x = streams.to(dtype)
    mixed = x if h_res is None else _mix(_oriented(h_res.to(dtype), transpose), x)
    out = mixed + h_post.to(dtype).unsqueeze(-1) * y.to(dtype).unsqueeze(-2)
    return out.to(torch.promote_types(streams.dtype, y.dtype))


@without_autocast
def native_backward(
    grad: Tensor,
    streams: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor | None,
    transpose: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX' -> (dX = H^T dX', dy = sum_o h_post_o dX'_o, dh_post_o = <dX'_o, y>, dH[o, i] = <dX'_o, X_i>).

    `needs` = (X, y, h_post, h_res); an unneeded gradient is empty.
    """
    dtype = compute_dtype(streams, y, h_post, h_res, grad)
    g = grad.to(dtype)
    d_streams, d_y, d_post = unneeded(streams), unneeded(y), unneeded(h_post)
    d_res = unneeded(h_post if h_res is None else h_res)
    if needs[0]:
        mixed = g if h_res is None else _mix(_oriented(h_res.to(dtype), not transpose), g)
        d_streams = mixed.to(streams.dtype, copy=True)
    if needs[1]:
        d_y = (h_post.to(dtype).unsqueeze(-1) * g).sum(-2).to(y.dtype)
    if needs[2]:
        d_post = (g * y.to(dtype).unsqueeze(-2)).sum(-1).to(h_post.dtype)
    if needs[3] and h_res is not None:
        x = streams.to(dtype)
        outer = torch.stack([(g * x[..., i : i + 1, :]).sum(-1) for i in range(x.shape[-2])], -1)
        d_res = _oriented(outer, transpose).to(h_res.dtype)
    return d_streams, d_y, d_post, d_res


@torch.library.custom_op("mhc::post", mutates_args=())
def _forward(streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool = False) -> Tensor:
    return native(streams, y, h_post, h_res, transpose).contiguous()


@_forward.register_fake
def _(streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool = False) -> Tensor:
    return streams.new_empty(streams.shape, dtype=torch.promote_types(streams.dtype, y.dtype))


@torch.library.custom_op("mhc::post_backward", mutates_args=())
def _backward(
    grad: Tensor,
    streams: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor | None,
    transpose: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_streams, d_y, d_post, d_res = native_backward(grad, streams, y, h_post, h_res, transpose, needs)
    return d_streams.contiguous(), d_y.contiguous(), d_post.contiguous(), d_res.contiguous()


@_backward.register_fake
def _(
    grad: Tensor,
    streams: Tensor,
    y: Tensor,
    h_post: Tensor,
    h_res: Tensor | None,
    transpose: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        streams.new_empty(streams.shape) if needs[0] else unneeded(streams),
        y.new_empty(y.shape) if needs[1] else unneeded(y),
        h_post.new_empty(h_post.shape) if needs[2] else unneeded(h_post),
        h_res.new_empty(h_res.shape)
        if needs[3] and h_res is not None
        else unneeded(h_post if h_res is None else h_res),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    streams, y, h_post, h_res, *rest = inputs
    ctx.transpose = rest[0] if rest else False
    ctx.save_for_backward(streams, y, h_post, h_res)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    streams, y, h_post, h_res = ctx.saved_tensors
    needs = [bool(needed) for needed in ctx.needs_input_grad[:4]]
    gradients = torch.ops.mhc.post_backward.default(grad, streams, y, h_post, h_res, ctx.transpose, needs)
    return (*(keep(needed, gradient) for needed, gradient in zip(needs, gradients, strict=True)), None)


_forward.register_autograd(_autograd, setup_context=_setup)

post = SemanticOp("post", native, _forward, native_backward, _backward)
