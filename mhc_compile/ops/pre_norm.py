"""pre_norm: the branch input u = sum_i h_pre_i X_i and the norm that the branch begins with, as one op.

    rms    z = u / sqrt(mean(u^2) + eps)            layer  z = (u - mean(u)) / sqrt(var(u) + eps)
    out = z (offset + weight) + bias

u is rounded to the dtype of X before it is normalised, as it is when pre stands alone. Least traffic: n + 1 u forward
(u itself is not written); 2n + 1 u backward (read X and dY, write dX). The second result, `statistics` [..., 1] (rms:
1 / root) or [..., 2] (layer: mean, 1 / root), is not differentiable: the backward needs it, a few bytes a token.

With `keep` the third result is u, not differentiable either and empty otherwise: its backward then reads u where it
would mix the streams again. That pays where the gate is known before the streams are (`single_pass`), since nothing of
the norm's backward needs X then but dh_pre, which the pass over the site boundary gives (`lowering.site_boundary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, check_streams, compute_dtype, keep, unneeded, without_autocast
from .pre import native as pre_native
from .pre import native_backward as pre_native_backward

STATISTICS = {"rms": 1, "layer": 2}
"""Kind of norm -> numbers a token that the backward needs."""


def _check(streams: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str) -> None:
    width = check_streams(streams)[1]
    if kind not in STATISTICS:
        raise ValueError(f"kind must be one of {', '.join(STATISTICS)}, got {kind!r}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (width,):
            raise ValueError(f"the {name} of a norm over C must be [{width}], got {tuple(value.shape)}")


def _normalised(u: Tensor, statistics: Tensor) -> Tensor:
    """z [..., C] of u [..., C] in the compute dtype."""
    return (u if statistics.shape[-1] == 1 else u - statistics[..., :1]) * statistics[..., -1:]


def _gain(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + offset if offset else weight.to(dtype)


@without_autocast
def native(
    streams: Tensor,
    h_pre: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """X [..., n, C], h_pre [..., n], weight [C]?, bias [C]? -> (out [..., C] in the dtype of X, statistics, u [..., C]
    with `keep`, else empty).

    `offset` only counts with a weight. `round_first`: z is rounded to the dtype of X before it meets the weight.
    Raises ValueError for a weight or a bias of another shape, or an unknown kind.
    """
    _check(streams, weight, bias, kind)
    dtype = compute_dtype(streams, h_pre, weight, bias)
    mixed = pre_native(streams, h_pre)
    u = mixed.to(dtype)
    if kind == "rms":
        statistics = torch.rsqrt((u * u).mean(-1, keepdim=True) + eps)
    else:
        mean = u.mean(-1, keepdim=True)
        centred = u - mean
        statistics = torch.cat((mean, torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)), -1)
    out = _normalised(u, statistics)
    if round_first:
        out = out.to(streams.dtype).to(dtype)
    if weight is not None:
        out = out * _gain(weight, offset, dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(streams.dtype), statistics, mixed if keep else unneeded(mixed)


@without_autocast
def native_backward(
    grad: Tensor,
    streams: Tensor,
    h_pre: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    mixed: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dY [..., C] -> (dX, dh_pre, dweight, dbias); `needs` in that order, an unneeded or absent one is empty. `mixed`
    is u where it was kept.

    g = dY (offset + weight)     du = r (g - z mean(g z) [- mean(g)])     dweight = sum over tokens of dY z

    du is rounded to the dtype of X before it goes on through pre, as it is when pre stands alone. The gradient passes
    a `round_first` as it passes any cast.
    """
    dtype = compute_dtype(streams, h_pre, weight, bias)
    g = grad.to(dtype)
    width = streams.shape[-1]
    z = _normalised((pre_native(streams, h_pre) if mixed is None else mixed).to(dtype), statistics)
    d_streams, d_pre = unneeded(streams), unneeded(h_pre)
    d_weight = unneeded(streams if weight is None else weight)
    d_bias = unneeded(streams if bias is None else bias)
    if needs[2] and weight is not None:
        seen = z.to(streams.dtype).to(dtype) if round_first else z
        d_weight = (g * seen).reshape(-1, width).sum(0).to(weight.dtype)
    if needs[3] and bias is not None:
        d_bias = g.reshape(-1, width).sum(0).to(bias.dtype)
    if needs[0] or needs[1]:
        if weight is not None:
            g = g * _gain(weight, offset, dtype)
        inner = g - z * (g * z).mean(-1, keepdim=True)
        if kind == "layer":
            inner = inner - g.mean(-1, keepdim=True)
        du = (inner * statistics[..., -1:]).to(streams.dtype)
        d_streams, d_pre = pre_native_backward(du, streams, h_pre, needs[:2])
    return d_streams, d_pre, d_weight, d_bias


_NORM = "Tensor streams, Tensor h_pre, Tensor? weight, Tensor? bias"
_ATTRIBUTES = "str kind, float eps, float offset, bool round_first"


@torch.library.custom_op(
    "mhc::pre_norm",
    mutates_args=(),
    schema=f"({_NORM}, {_ATTRIBUTES}, bool keep=False) -> (Tensor out, Tensor statistics, Tensor mixed)",
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, statistics, mixed = native(*args)
    return out.contiguous(), statistics.contiguous(), mixed.contiguous()


@_forward.register_fake
def _(
    streams: Tensor,
    h_pre: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(streams, weight, bias, kind)
    batch = streams.shape[:-2]
    dtype = compute_dtype(streams, h_pre, weight, bias)
    out = streams.new_empty((*batch, streams.shape[-1]))
    statistics = streams.new_empty((*batch, STATISTICS[kind]), dtype=dtype)
    return out, statistics, streams.new_empty(out.shape) if keep else unneeded(streams)


@torch.library.custom_op(
    "mhc::pre_norm_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_NORM}, Tensor statistics, Tensor? mixed, {_ATTRIBUTES}, bool[] needs) -> "
    "(Tensor d_streams, Tensor d_h_pre, Tensor d_weight, Tensor d_bias)",
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_streams, d_pre, d_weight, d_bias = native_backward(*args)
    return d_streams.contiguous(), d_pre.contiguous(), d_weight.contiguous(), d_bias.contiguous()


@_backward.register_fake
def _(
    grad: Tensor, streams: Tensor, h_pre: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    return tuple(
        value.new_empty(value.shape) if needed and value is not None else unneeded(streams if value is None else value)
        for needed, value in zip(needs, (streams, h_pre, weight, bias), strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *attributes, with_mixed = inputs[4:]
    ctx.save_for_backward(*inputs[:4], output[1], output[2] if with_mixed else None)
    ctx.attributes = attributes
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs = [bool(needed) for needed in ctx.needs_input_grad[:4]]
    gradients = torch.ops.mhc.pre_norm_backward.default(grad, *ctx.saved_tensors, *ctx.attributes, needs)
    return (*(keep(needed, gradient) for needed, gradient in zip(needs, gradients, strict=True)), *(None,) * 5)


_forward.register_autograd(_autograd, setup_context=_setup)

pre_norm = SemanticOp("pre_norm", native, _forward, native_backward, _backward)
