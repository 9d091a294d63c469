"""activate: from the projection of a token to its mixing coefficients, the second half of `coefficients` alone.

    [p, q, s] = m / r * alpha + bias
    pre = pre_scale act(p) + pre_eps    post = post_scale act(q) + post_eps    res = sinkhorn(s) | s

A compiled backward that keeps the projection (m, r), K + 1 numbers a token, and none of the K coefficients gets them
back by it: the same function of the same numbers, hence the same bits. It is put into graphs behind autograd and has no
backward of its own (the gradient of the coefficients is `coefficients_backward`, which reads the projection).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import ForwardOp, without_autocast
from .coefficients import ATTRIBUTE_SCHEMA, ATTRIBUTES, empty_coefficients, run_activate, split_arguments
from .coefficients import activate as from_projection
from .spec import CoefficientSpec

SCHEMA = (
    "(Tensor projection, Tensor bias, Tensor alpha_pre, Tensor? alpha_post, Tensor? alpha_res, "
    f"{ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


def split(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor | None], CoefficientSpec]:
    """The flat arguments of `mhc::activate` -> (projection, bias, alphas, spec)."""
    projection, *rest = args
    _, _, bias, alphas, spec = split_arguments((None, None, *rest))
    return projection, bias, alphas, spec


def _check(projection: Tensor, bias: Tensor, spec: CoefficientSpec) -> None:
    if projection.dim() < 1 or projection.shape[-1] != spec.rows + 1:
        raise ValueError(f"a projection is [..., {spec.rows} + 1], got {tuple(projection.shape)}")
    if bias.shape[0] != spec.rows:
        raise ValueError(f"bias must have {spec.rows} elements, got {tuple(bias.shape)}")


@without_autocast
def native(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """projection [..., K + 1], bias [K], alphas of one element, attributes in the order of `coefficients.ATTRIBUTES`
    -> (pre [..., n], post [..., n], res [..., n, n]); absent parts have a last dim of 0. ValueError for shapes that do
    not fit."""
    projection, bias, alphas, spec = split(args)
    _check(projection, bias, spec)
    return from_projection(projection, bias, alphas, spec)


@without_autocast
def run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`native` for execution instead of tracing: the bits of `mhc::coefficients`, in results of their own."""
    projection, bias, alphas, spec = split(args)
    _check(projection, bias, spec)
    h_pre, h_post, h_res = run_activate(projection, bias, alphas, spec)
    return h_pre.contiguous(), h_post.contiguous(), h_res.clone(memory_format=torch.contiguous_format)


def fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The results' shapes and dtypes."""
    projection, _, _, spec = split(args)
    return empty_coefficients(projection, projection.shape[:-1], spec, projection.dtype)


_forward = torch.library.custom_op("mhc::activate", run, mutates_args=(), schema=SCHEMA)
_forward.register_fake(fake)

activate = ForwardOp("activate", native, _forward)

__all__ = ["ATTRIBUTES", "SCHEMA", "activate", "fake", "native", "run", "split"]
