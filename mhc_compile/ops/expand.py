"""expand: the first state, n copies of the embedding. Least traffic: 1 + n u forward, n + 1 u backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SemanticOp, compute_dtype, without_autocast


@without_autocast
def native(x: Tensor, streams: int) -> Tensor:
    """x [..., C] -> X [..., n, C], X_i = x; never a view of x. ValueError for streams < 1."""
    if streams < 1:
        raise ValueError(f"streams must be >= 1, got {streams}")
    shape = (*x.shape[:-1], streams, x.shape[-1])
    return x.unsqueeze(-2).expand(shape).clone(memory_format=torch.contiguous_format)


@without_autocast
def native_backward(grad: Tensor) -> Tensor:
    """dX [..., n, C] -> dx [..., C], the sum over the streams, accumulated in the compute dtype."""
    return grad.to(compute_dtype(grad)).sum(-2).to(grad.dtype)


@torch.library.custom_op("mhc::expand", mutates_args=())
def _forward(x: Tensor, streams: int) -> Tensor:
    return native(x, streams)


@_forward.register_fake
def _(x: Tensor, streams: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], streams, x.shape[-1]))


@torch.library.custom_op("mhc::expand_backward", mutates_args=())
def _backward(grad: Tensor) -> Tensor:
    return native_backward(grad)


@_backward.register_fake
def _(grad: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-2], grad.shape[-1]))


def _autograd(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mhc.expand_backward.default(grad), None


_forward.register_autograd(_autograd)

expand = SemanticOp("expand", native, _forward, native_backward, _backward)
