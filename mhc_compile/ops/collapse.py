"""collapse: the n streams read out as one hidden state, by mean (function-preserving) or sum. Traffic: n + 1 u each
way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, check_streams, compute_dtype, without_autocast

KINDS = ("mean", "sum")


def scale(kind: str, streams: int) -> float:
    """What the sum over the streams is multiplied by. ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return 1.0 / streams if kind == "mean" else 1.0


@without_autocast
def native(streams: Tensor, kind: str) -> Tensor:
    """X [..., n, C] -> x [..., C] in the dtype of X, accumulated in the compute dtype. ValueError for an unknown
    kind."""
    n, _ = check_streams(streams)
    return (streams.to(compute_dtype(streams)).sum(-2) * scale(kind, n)).to(streams.dtype)


@without_autocast
def native_backward(grad: Tensor, streams: int, kind: str) -> Tensor:
    """dx [..., C] -> dX [..., n, C]: the same gradient for every stream."""
    scaled = (grad.to(compute_dtype(grad)) * scale(kind, streams)).to(grad.dtype)
    shape = (*grad.shape[:-1], streams, grad.shape[-1])
    return scaled.unsqueeze(-2).expand(shape).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("mhc::collapse", mutates_args=())
def _forward(streams: Tensor, kind: str) -> Tensor:
    return native(streams, kind)


@_forward.register_fake
def _(streams: Tensor, kind: str) -> Tensor:
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]))


@torch.library.custom_op("mhc::collapse_backward", mutates_args=())
def _backward(grad: Tensor, streams: int, kind: str) -> Tensor:
    return native_backward(grad, streams, kind)


@_backward.register_fake
def _(grad: Tensor, streams: int, kind: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], streams, grad.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.streams, ctx.kind = inputs[0].shape[-2], inputs[1]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mhc.collapse_backward.default(grad, ctx.streams, ctx.kind), None


_forward.register_autograd(_autograd, setup_context=_setup)

collapse = SemanticOp("collapse", native, _forward, native_backward, _backward)
