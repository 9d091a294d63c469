"""channel_pre: the branch input with a gate per channel, u = scale sum_i g_i * X_i, g = sigmoid(up silu(down vec(X))).

`pre` has one weight a stream; here every channel of every stream has its own, made by two weights of low rank R:

    t = inner * vec(X) down^T      [..., R]          z = silu(t) up^T      [..., n C]          g = sigmoid(z)

The two products are taken in the dtype of their operands, as the models take them (they are GEMMs over n C, and float32
would not run on tensor cores); everything else in the compute dtype. The custom op returns t as well, not
differentiable: the backward needs it, and R numbers a token save a pass over X. Least traffic: n + 1 u forward;
2n + 1 u backward, and the two weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, check_streams, compute_dtype, keep, unneeded, without_autocast


def _check(streams: Tensor, down: Tensor, up: Tensor) -> None:
    n, width = check_streams(streams)
    if down.dim() != 2 or down.shape[1] != n * width:
        raise ValueError(f"down must be [R, {n * width}], got {tuple(down.shape)}")
    if up.shape != (down.shape[1], down.shape[0]):
        raise ValueError(f"up must be {(down.shape[1], down.shape[0])}, got {tuple(up.shape)}")


def _product_dtype(streams: Tensor, down: Tensor, up: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(streams.dtype, down.dtype), up.dtype)


def _gate(hidden: Tensor, up: Tensor, shape: Sequence[int], product: torch.dtype, dtype: torch.dtype) -> Tensor:
    """hidden [..., R] = silu(t) -> g [..., n, C] in the compute dtype."""
    return torch.sigmoid(torch.matmul(hidden.to(product), up.to(product).t()).to(dtype)).reshape(shape)


@without_autocast
def native(streams: Tensor, down: Tensor, up: Tensor, inner: float, scale: float) -> tuple[Tensor, Tensor]:
    """X [..., n, C], down [R, nC], up [nC, R] -> (u [..., C] in the dtype of X, t [..., R] in the compute dtype).

    Raises ValueError for weights of another shape.
    """
    _check(streams, down, up)
    dtype, product = compute_dtype(streams, down, up), _product_dtype(streams, down, up)
    t = torch.matmul(streams.to(product).flatten(-2), down.to(product).t()).to(dtype) * inner
    gate = _gate(torch.nn.functional.silu(t), up, streams.shape, product, dtype)
    return ((gate * streams.to(dtype)).sum(-2) * scale).to(streams.dtype), t


@without_autocast
def native_backward(
    grad: Tensor,
    streams: Tensor,
    down: Tensor,
    up: Tensor,
    t: Tensor,
    inner: float,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """du [..., C] -> gradients of (X, down, up); an unneeded one (`needs`) is empty and its products are not taken.

    dz = scale du X g (1 - g)     ds = dz up     dt = ds silu'(t) inner     dX = scale du g + dt down
    """
    dtype, product = compute_dtype(streams, down, up, grad), _product_dtype(streams, down, up)
    sigma = torch.sigmoid(t)
    hidden = t * sigma
    x = streams.to(dtype)
    du = grad.to(dtype).unsqueeze(-2) * scale
    gate = _gate(hidden, up, streams.shape, product, dtype)
    dz = (du * x * gate * (1.0 - gate)).flatten(-2).to(product)
    d_streams, d_down, d_up = unneeded(streams), unneeded(down), unneeded(up)
    if needs[2]:
        rows = dz.reshape(-1, up.shape[0])
        d_up = torch.matmul(rows.t(), hidden.to(product).reshape(-1, up.shape[1])).to(up.dtype)
    if needs[0] or needs[1]:
        ds = torch.matmul(dz, up.to(product)).to(dtype)
        dt = (ds * (sigma * (1.0 + t * (1.0 - sigma))) * inner).to(product)
        if needs[1]:
            flat = streams.to(product).reshape(-1, down.shape[1])
            d_down = torch.matmul(dt.reshape(-1, down.shape[0]).t(), flat).to(down.dtype)
        if needs[0]:
            through = torch.matmul(dt, down.to(product)).to(dtype).reshape(streams.shape)
            d_streams = (du * gate + through).to(streams.dtype)
    return d_streams, d_down, d_up


@torch.library.custom_op("mhc::channel_pre", mutates_args=())
def _forward(streams: Tensor, down: Tensor, up: Tensor, inner: float, scale: float) -> tuple[Tensor, Tensor]:
    u, t = native(streams, down, up, inner, scale)
    return u.contiguous(), t.contiguous()


@_forward.register_fake
def _(streams: Tensor, down: Tensor, up: Tensor, inner: float, scale: float) -> tuple[Tensor, Tensor]:
    _check(streams, down, up)
    u = streams.new_empty((*streams.shape[:-2], streams.shape[-1]))
    return u, streams.new_empty((*streams.shape[:-2], down.shape[0]), dtype=compute_dtype(streams, down, up))


@torch.library.custom_op("mhc::channel_pre_backward", mutates_args=())
def _backward(
    grad: Tensor,
    streams: Tensor,
    down: Tensor,
    up: Tensor,
    t: Tensor,
    inner: float,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_streams, d_down, d_up = native_backward(grad, streams, down, up, t, inner, scale, needs)
    return d_streams.contiguous(), d_down.contiguous(), d_up.contiguous()


@_backward.register_fake
def _(
    grad: Tensor,
    streams: Tensor,
    down: Tensor,
    up: Tensor,
    t: Tensor,
    inner: float,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        streams.new_empty(streams.shape) if needs[0] else unneeded(streams),
        down.new_empty(down.shape) if needs[1] else unneeded(down),
        up.new_empty(up.shape) if needs[2] else unneeded(up),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    streams, down, up, ctx.inner, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(streams, down, up, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    streams, down, up, t = ctx.saved_tensors
    needs = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    gradients = torch.ops.mhc.channel_pre_backward.default(grad, streams, down, up, t, ctx.inner, ctx.scale, needs)
    return (*(keep(needed, gradient) for needed, gradient in zip(needs, gradients, strict=True)), None, None)


_forward.register_autograd(_autograd, setup_context=_setup)

channel_pre = SemanticOp("channel_pre", native, _forward, native_backward, _backward)
