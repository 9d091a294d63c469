"""stream_norm: each stream over the root of its own mean square, y_i = (offset + w_i) x_i / sqrt(mean_C(x_i^2) + eps).

What the hyper-connections of some families read instead of the streams themselves (`coefficients` has the norm of all
streams of a token at once). Traffic: 2n u forward; 3n u backward (read X and dY, write dX).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, check_streams, compute_dtype, keep, unneeded, without_autocast


def _check(streams: Tensor, weight: Tensor | None) -> None:
    n, width = check_streams(streams)
    if weight is not None and weight.shape != (n, width):
        raise ValueError(f"the weight of a norm of each stream must be [{n}, {width}], got {tuple(weight.shape)}")


def _inverse(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


@without_autocast
def native(streams: Tensor, weight: Tensor | None, offset: float, eps: float) -> Tensor:
    """X [..., n, C], weight [n, C] (None: 1, and `offset` is not used) -> Y [..., n, C] in the dtype of X.

    Raises ValueError for a weight of another shape.
    """
    _check(streams, weight)
    dtype = compute_dtype(streams, weight)
    x = streams.to(dtype)
    y = x * _inverse(x, eps)
    return (y if weight is None else y * (weight.to(dtype) + offset)).to(streams.dtype)


@without_autocast
def native_backward(
    grad: Tensor, streams: Tensor, weight: Tensor | None, offset: float, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dY -> (dX = r (g - y mean(g y)), dw = sum over tokens of dY y), with y = r x unweighted and g = dY (offset + w).

    `needs` = (X, weight); an unneeded gradient is empty.
    """
    dtype = compute_dtype(streams, weight, grad)
    x, g = streams.to(dtype), grad.to(dtype)
    inverse = _inverse(x, eps)
    y = x * inverse
    d_streams, d_weight = unneeded(streams), unneeded(streams if weight is None else weight)
    if needs[1] and weight is not None:
        d_weight = (g * y).reshape(-1, *weight.shape).sum(0).to(weight.dtype)
    if needs[0]:
        if weight is not None:
            g = g * (weight.to(dtype) + offset)
        d_streams = (inverse * (g - y * (g * y).mean(-1, keepdim=True))).to(streams.dtype)
    return d_streams, d_weight


@torch.library.custom_op("mhc::stream_norm", mutates_args=())
def _forward(streams: Tensor, weight: Tensor | None, offset: float, eps: float) -> Tensor:
    return native(streams, weight, offset, eps).contiguous()


@_forward.register_fake
def _(streams: Tensor, weight: Tensor | None, offset: float, eps: float) -> Tensor:
    return streams.new_empty(streams.shape)


@torch.library.custom_op("mhc::stream_norm_backward", mutates_args=())
def _backward(
    grad: Tensor, streams: Tensor, weight: Tensor | None, offset: float, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    d_streams, d_weight = native_backward(grad, streams, weight, offset, eps, needs)
    return d_streams.contiguous(), d_weight.contiguous()


@_backward.register_fake
def _(
    grad: Tensor, streams: Tensor, weight: Tensor | None, offset: float, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    d_streams = streams.new_empty(streams.shape) if needs[0] else unneeded(streams)
    if weight is None:
        return d_streams, unneeded(streams)
    return d_streams, weight.new_empty(weight.shape) if needs[1] else unneeded(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    streams, weight, ctx.offset, ctx.eps = inputs
    ctx.save_for_backward(streams, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    streams, weight = ctx.saved_tensors
    needs = [bool(needed) for needed in ctx.needs_input_grad[:2]]
    gradients = torch.ops.mhc.stream_norm_backward.default(grad, streams, weight, ctx.offset, ctx.eps, needs)
    return (*(keep(needed, gradient) for needed, gradient in zip(needs, gradients, strict=True)), None, None)


_forward.register_autograd(_autograd, setup_context=_setup)

stream_norm = SemanticOp("stream_norm", native, _forward, native_backward, _backward)
