"""What is one opaque call on the CPU: the part of `coefficients` that is computed from the K numbers of a token.

Traced, the gates of a site and their backward are 20 buffers of a few numbers a token around an opaque Sinkhorn, and
cost inductor more than the branch. Here they are two calls of the native body, `mhc_native::activate` and
`mhc_native::small_gradients`; what reads or writes a tensor of n C elements a token (the projection, its norm, dX and
dphi) stays in the graph, where inductor fuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_compile.ops.activate import SCHEMA, fake, run, split
from mhc_compile.ops.base import unneeded
from mhc_compile.ops.coefficients import (
    ATTRIBUTE_SCHEMA,
    native_backward_spec,
    native_spec,
    run_small_gradients,
    split_arguments,
    split_backward_arguments,
)
from mhc_compile.ops.spec import CoefficientSpec

_ALPHAS = "Tensor bias, Tensor alpha_pre, Tensor? alpha_post, Tensor? alpha_res"
Alphas = dict[str, Tensor | None]


def _flat(bias: Tensor, alphas: Alphas, spec: CoefficientSpec) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    return (bias, *(alphas[part] for part in ("pre", "post", "res"))), tuple(spec.op_arguments().values())


def _unflat(bias: Tensor, *rest: Any) -> tuple[Tensor, Alphas, CoefficientSpec]:
    _, _, bias, alphas, spec = split_arguments((None, None, bias, *rest))
    return bias, alphas, spec


_activate = torch.library.custom_op("mhc_native::activate", run, mutates_args=(), schema=SCHEMA)
_activate.register_fake(fake)


@torch.library.custom_op(
    "mhc_native::small_gradients",
    mutates_args=(),
    schema=(
        f"(Tensor? d_pre, Tensor? d_post, Tensor? d_res, Tensor projection, SymInt size, bool[] needs, {_ALPHAS}, "
        f"{ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _small_gradients(
    d_pre: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    projection: Tensor,
    size: int,
    needs: Sequence[bool],
    *flat: Any,
) -> tuple[Tensor, ...]:
    bias, alphas, spec = _unflat(*flat)
    grads = {"pre": d_pre, "post": d_post, "res": d_res}
    found = run_small_gradients(grads, projection, bias, alphas, spec, size, needs)
    return tuple(value.contiguous() for value in found)


@_small_gradients.register_fake
def _(
    d_pre: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    projection: Tensor,
    size: int,
    needs: Sequence[bool],
    *flat: Any,
) -> tuple[Tensor, ...]:
    bias, alphas, spec = _unflat(*flat)
    batch = projection.shape[:-1]
    given = [alphas[part] for part in ("pre", "post", "res")]
    return (
        projection.new_empty((*batch, spec.rows)),
        unneeded(projection) if spec.norm == "none" else projection.new_empty((*batch, 1)),
        bias.new_empty(bias.shape) if needs[2] else unneeded(bias),
        *(
            alpha.new_empty(alpha.shape) if needed and alpha is not None else unneeded(bias)
            for needed, alpha in zip(needs[3:], given, strict=True)
        ),
    )


def _called_activate(projection: Tensor, bias: Tensor, alphas: Alphas, spec: CoefficientSpec) -> Any:
    tensors, attributes = _flat(bias, alphas, spec)
    return torch.ops.mhc_native.activate.default(projection, *tensors, *attributes)


def _called_small_gradients(
    grads: Alphas,
    projection: Tensor,
    bias: Tensor,
    alphas: Alphas,
    spec: CoefficientSpec,
    size: int,
    needs: Sequence[bool],
) -> Any:
    tensors, attributes = _flat(bias, alphas, spec)
    parts = (grads[part] for part in ("pre", "post", "res"))
    return torch.ops.mhc_native.small_gradients.default(*parts, projection, size, list(needs), *tensors, *attributes)


def _coefficients(*args: Any) -> Any:
    return native_spec(*split_arguments(args), activation=_called_activate)


def _activate_alone(*args: Any) -> Any:
    return _called_activate(*split(args))


def _coefficients_backward(*args: Any) -> Any:
    grads, x, phi, bias, alphas, projection, needs, spec = split_backward_arguments(args)
    return native_backward_spec(grads, x, phi, bias, alphas, projection, spec, needs, _called_small_gradients)


BODIES: dict[str, Callable[..., Any]] = {
    "activate": _activate_alone,
    "coefficients": _coefficients,
    "coefficients_backward": _coefficients_backward,
}
"""What is traced for an op in place of its native body."""
