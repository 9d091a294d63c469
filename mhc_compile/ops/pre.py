"""pre: the branch input u = sum_i h_pre_i X_i. Least traffic: n + 1 u forward; 2n + 1 u backward (read X, du; write
dX)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, check_streams, compute_dtype, keep, unneeded, without_autocast


@without_autocast
def native(streams: Tensor, h_pre: Tensor) -> Tensor:
    """X [..., n, C], h_pre [..., n] -> u [..., C] in the dtype of X, accumulated in the compute dtype."""
    check_streams(streams)
    dtype = compute_dtype(streams, h_pre)
    return (h_pre.to(dtype).unsqueeze(-1) * streams.to(dtype)).sum(-2).to(streams.dtype)


@without_autocast
def native_backward(grad: Tensor, streams: Tensor, h_pre: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """du [..., C] -> (dX_i = h_pre_i du, dh_pre_i = <du, X_i>); `needs` = (X, h_pre), an unneeded one is empty."""
    dtype = compute_dtype(streams, h_pre, grad)
    du = grad.to(dtype).unsqueeze(-2)
    d_streams, d_pre = unneeded(streams), unneeded(h_pre)
    if needs[0]:
        d_streams = (h_pre.to(dtype).unsqueeze(-1) * du).to(streams.dtype)
    if needs[1]:
        d_pre = (du * streams.to(dtype)).sum(-1).to(h_pre.dtype)
    return d_streams, d_pre


@torch.library.custom_op("mhc::pre", mutates_args=())
def _forward(streams: Tensor, h_pre: Tensor) -> Tensor:
    return native(streams, h_pre)


@_forward.register_fake
def _(streams: Tensor, h_pre: Tensor) -> Tensor:
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]))


@torch.library.custom_op("mhc::pre_backward", mutates_args=())
def _backward(grad: Tensor, streams: Tensor, h_pre: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    d_streams, d_pre = native_backward(grad, streams, h_pre, needs)
    return d_streams.contiguous(), d_pre.contiguous()


@_backward.register_fake
def _(grad: Tensor, streams: Tensor, h_pre: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    d_streams = streams.new_empty(streams.shape) if needs[0] else unneeded(streams)
    d_pre = h_pre.new_empty(h_pre.shape) if needs[1] else unneeded(h_pre)
    return d_streams, d_pre


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    streams, h_pre = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    d_streams, d_pre = torch.ops.mhc.pre_backward.default(grad, streams, h_pre, needs)
    return keep(needs[0], d_streams), keep(needs[1], d_pre)


_forward.register_autograd(_autograd, setup_context=_setup)

pre = SemanticOp("pre", native, _forward, native_backward, _backward)
