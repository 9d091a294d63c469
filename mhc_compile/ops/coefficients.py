"""coefficients: from the streams of a token to its n + n + n^2 mixing coefficients (mHC equations 14-19).

    m = vec(X) phi^T        r = rms(vec X)        [p, q, s] = m / r * alpha + bias
    pre = pre_scale act(p) + pre_eps    post = post_scale act(q) + post_eps    res = sinkhorn(s) | s

The custom op returns a fourth tensor next to (pre, post, res): `projection` [..., K + 1] = (m, r), not
differentiable, about 100 bytes a token. The backward needs m and r, and reading X once more to get them back would
cost n u. Least traffic: n u forward; backward 2n u for dX (read X, write dX) and n u for dphi.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, check_streams, compute_dtype, unneeded, without_autocast
from .sinkhorn import native as sinkhorn_native
from .sinkhorn import native_backward as sinkhorn_native_backward
from .sinkhorn import run as sinkhorn_run
from .sinkhorn import run_backward as sinkhorn_run_backward
from .spec import CoefficientSpec

NEEDS = ("streams", "phi", "bias", "alpha_pre", "alpha_post", "alpha_res")


def _check(streams: Tensor, phi: Tensor, bias: Tensor, spec: CoefficientSpec) -> None:
    n, width = check_streams(streams)
    if n != spec.streams:
        raise ValueError(f"the state has {n} streams, the attributes say {spec.streams}")
    if phi.shape[0] != spec.rows or phi.shape[1] != n * width:
        raise ValueError(f"phi must be [{spec.rows}, {n} * C], got {tuple(phi.shape)} for C = {width}")
    if bias.shape[0] != spec.rows:
        raise ValueError(f"bias must have {spec.rows} elements, got {tuple(bias.shape)}")


def _alpha(alphas: dict[str, Tensor | None], part: str, dtype: torch.dtype) -> Tensor:
    alpha = alphas[part]
    if alpha is None:
        raise ValueError(f"the layout has {part!r}, so alpha_{part} is needed")
    return alpha.to(dtype).reshape(())


def _rows(value: Tensor, spec: CoefficientSpec, part: str) -> Tensor:
    start = spec.offset(part)
    return value[..., start : start + spec.part_size(part)]


def project(streams: Tensor, phi: Tensor, spec: CoefficientSpec, dtype: torch.dtype) -> Tensor:
    """X [..., n, C] -> projection [..., K + 1] = (vec(X) phi^T, r)."""
    x = streams.to(dtype).flatten(-2)
    mixes = torch.matmul(x, phi.to(dtype).t())
    if spec.norm == "rms":
        r = torch.sqrt((x * x).mean(-1, keepdim=True) + spec.norm_eps)
    elif spec.norm == "rms_outside":
        r = torch.sqrt((x * x).sum(-1, keepdim=True)) / math.sqrt(phi.shape[1]) + spec.norm_eps
    else:
        r = torch.ones_like(mixes[..., :1])
    return torch.cat((mixes, r), -1)


def activate(
    projection: Tensor,
    bias: Tensor,
    alphas: dict[str, Tensor | None],
    spec: CoefficientSpec,
    sinkhorn: Callable[..., Tensor] = sinkhorn_native,
) -> tuple[Tensor, Tensor, Tensor]:
    """projection [..., K + 1] -> (pre [..., n], post [..., n], res [..., n, n]); absent parts have a last dim of 0."""
    dtype, n, batch = projection.dtype, spec.streams, projection.shape[:-1]
    z = projection[..., :-1] / projection[..., -1:]
    b = bias.to(dtype)
    mix_dtype = spec.mix_dtype or dtype
    results: dict[str, Tensor] = {}
    for part in ("pre", "post", "res"):
        out_dtype = dtype if part == "pre" else mix_dtype
        if part not in spec.parts:
            results[part] = z.new_empty((*batch, n, 0) if part == "res" else (*batch, 0), dtype=out_dtype)
            continue
        value = _rows(z, spec, part) * _alpha(alphas, part, dtype) + _rows(b, spec, part)
        if part == "res":
            value = value.unflatten(-1, (n, n))
            if spec.sinkhorn is not None:
                value = sinkhorn(value, **spec.sinkhorn.op_arguments())
        else:
            scale, eps = (spec.pre_scale, spec.pre_eps) if part == "pre" else (spec.post_scale, spec.post_eps)
            value = (torch.sigmoid(value) if spec.gate == "sigmoid" else value) * scale + eps
        results[part] = value.to(out_dtype)
    return results["pre"], results["post"], results["res"]


def native_spec(
    streams: Tensor,
    phi: Tensor,
    bias: Tensor,
    alphas: dict[str, Tensor | None],
    spec: CoefficientSpec,
    activation: Callable[..., tuple[Tensor, Tensor, Tensor]] = activate,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pre, post, res, projection), the attributes given as a spec. `activation` stands for `activate`: a tracer keeps
    it, or the Sinkhorn in it, as one node."""
    _check(streams, phi, bias, spec)
    projection = project(streams, phi, spec, compute_dtype(streams, phi, bias, *alphas.values()))
    return (*activation(projection, bias, alphas, spec), projection)


def empty_coefficients(
    like: Tensor, batch: Sequence[Any], spec: CoefficientSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (pre [*batch, n], post [*batch, n], res [*batch, n, n]) on the device of `like`, computed in
    `dtype`; absent parts have a last dim of 0."""
    n, mix_dtype = spec.streams, spec.mix_dtype or dtype
    return (
        like.new_empty((*batch, spec.part_size("pre")), dtype=dtype),
        like.new_empty((*batch, spec.part_size("post")), dtype=mix_dtype),
        like.new_empty((*batch, n, n if "res" in spec.parts else 0), dtype=mix_dtype),
    )


def _scale_of_rms(size: int, r: Tensor, spec: CoefficientSpec) -> Tensor | None:
    """dr/dx divided by x, [..., 1], for x of `size` elements: the norm's gradient is a multiple of x itself. None where
    r does not depend on x."""
    if spec.norm == "rms":
        return 1.0 / (size * r)
    if spec.norm == "rms_outside":
        length = r - spec.norm_eps
        # At x = 0 the norm has no gradient; torch.norm gives 0 there and so do we.
        return torch.where(length > 0, 1.0 / (size * length), torch.zeros_like(length))
    return None


def logit_gradients(
    grads: dict[str, Tensor | None],
    projection: Tensor,
    bias: Tensor,
    alphas: dict[str, Tensor | None],
    spec: CoefficientSpec,
    sinkhorn_backward: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of the outputs -> (dp [..., K], z [..., K]) with p = z * alpha + bias, z = m / r."""
    dtype, n = projection.dtype, spec.streams
    z = projection[..., :-1] / projection[..., -1:]
    b = bias.to(dtype)
    pieces = []
    for part in spec.parts:
        grad, rows = grads[part], _rows(z, spec, part)
        if grad is None:
            pieces.append(torch.zeros_like(rows))
            continue
        g = grad.to(dtype)
        if part == "res":
            if spec.sinkhorn is not None:
                logits = (rows * _alpha(alphas, part, dtype) + _rows(b, spec, part)).unflatten(-1, (n, n))
                g = sinkhorn_backward(g, logits, **spec.sinkhorn.op_arguments())
            pieces.append(g.flatten(-2))
            continue
        g = g * (spec.pre_scale if part == "pre" else spec.post_scale)
        if spec.gate == "sigmoid":
            act = torch.sigmoid(rows * _alpha(alphas, part, dtype) + _rows(b, spec, part))
            g = g * act * (1.0 - act)
        pieces.append(g)
    return torch.cat(pieces, -1), z


def small_gradients(
    grads: dict[str, Tensor | None],
    projection: Tensor,
    bias: Tensor,
    alphas: dict[str, Tensor | None],
    spec: CoefficientSpec,
    size: int,
    needs: Sequence[bool],
    sinkhorn_backward: Callable[..., Tensor] = sinkhorn_native_backward,
) -> tuple[Tensor, ...]:
    """What of the backward touches neither X nor phi: (dm [..., K], multiple [..., 1], dbias, three dalphas).

    dz = dp alpha     dm = dz / r     dr = -<dz, z> / r     multiple = <dm, z> (dr/dx) / x, empty without a norm

    `size` is n C; an unneeded gradient (`needs`, in the order of `NEEDS`) is empty.
    """
    dtype = projection.dtype
    dp, z = logit_gradients(grads, projection, bias, alphas, spec, sinkhorn_backward)
    r = projection[..., -1:]
    per_row = torch.cat([_alpha(alphas, part, dtype).expand(spec.part_size(part)) for part in spec.parts])
    dm = dp * per_row / r
    scale = _scale_of_rms(size, r, spec)
    multiple = unneeded(dm) if scale is None else (dm * z).sum(-1, keepdim=True) * scale
    d_bias = dp.reshape(-1, spec.rows).sum(0).to(bias.dtype) if needs[2] else unneeded(bias)
    d_alphas = []
    for part, needed in zip(("pre", "post", "res"), needs[3:], strict=True):
        alpha = alphas[part]
        if needed and alpha is not None:
            total = (_rows(dp, spec, part) * _rows(z, spec, part)).sum() if part in spec.parts else dp.new_zeros(())
            d_alphas.append(total.to(alpha.dtype).reshape(alpha.shape))
        else:
            d_alphas.append(unneeded(bias))
    return dm, multiple, d_bias, *d_alphas


def native_backward_spec(
    grads: dict[str, Tensor | None],
    streams: Tensor,
    phi: Tensor,
    bias: Tensor,
    alphas: dict[str, Tensor | None],
    projection: Tensor,
    spec: CoefficientSpec,
    needs: Sequence[bool],
    small: Callable[..., tuple[Tensor, ...]] = small_gradients,
) -> tuple[Tensor, ...]:
    """Gradients in the order of `NEEDS`; an unneeded one is empty, and its work (dphi's GEMM above all) is not done.

    dX = dm phi + x multiple     dphi = dm^T vec(X)     and `small_gradients`, for which `small` may stand.
    """
    dtype = projection.dtype
    size = streams.shape[-2] * streams.shape[-1]
    dm, multiple, *rest = small(grads, projection, bias, alphas, spec, size, needs)
    x = streams.to(dtype).flatten(-2)
    d_streams, d_phi = unneeded(streams), unneeded(phi)
    if needs[0]:
        dx = torch.matmul(dm, phi.to(dtype))
        if spec.norm != "none":
            dx = dx - x * multiple
        d_streams = dx.to(streams.dtype).unflatten(-1, (streams.shape[-2], streams.shape[-1]))
    if needs[1]:
        rows = dm.reshape(-1, spec.rows)
        d_phi = torch.matmul(rows.t(), x.reshape(-1, phi.shape[1])).to(phi.dtype)
    return d_streams, d_phi, *rest


def _spec(*flat: object) -> CoefficientSpec:
    return CoefficientSpec.from_op_arguments(dict(zip(ATTRIBUTES, flat, strict=True)))


ATTRIBUTES = tuple(CoefficientSpec().op_arguments())
"""The op's attribute arguments, in the order of its schema."""


def _alphas(alpha_pre: Tensor, alpha_post: Tensor | None, alpha_res: Tensor | None) -> dict[str, Tensor | None]:
    return {"pre": alpha_pre, "post": alpha_post, "res": alpha_res}


ATTRIBUTE_SCHEMA = (
    "str layout, int streams, str norm, float norm_eps, str gate, float pre_scale, float pre_eps, float post_scale, "
    "float post_eps, str res, ScalarType? mix_dtype, str sinkhorn_positivity, float sinkhorn_positive_eps, "
    "str sinkhorn_first, int sinkhorn_steps, float sinkhorn_eps, str sinkhorn_eps_mode"
)
_TENSORS = "Tensor phi, Tensor bias, Tensor alpha_pre, Tensor? alpha_post, Tensor? alpha_res"


def split_arguments(
    args: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None], CoefficientSpec]:
    """The flat arguments of `mhc::coefficients` -> (x, phi, bias, alphas, spec)."""
    x, phi, bias, alpha_pre, alpha_post, alpha_res, *flat = args
    return x, phi, bias, _alphas(alpha_pre, alpha_post, alpha_res), _spec(*flat)


def split_backward_arguments(
    args: Sequence[Any],
) -> tuple[
    dict[str, Tensor | None], Tensor, Tensor, Tensor, dict[str, Tensor | None], Tensor, Sequence[bool], CoefficientSpec
]:
    """The flat arguments of `mhc::coefficients_backward` -> (grads, x, phi, bias, alphas, projection, needs, spec)."""
    d_pre, d_post, d_res, x, phi, bias, alpha_pre, alpha_post, alpha_res, projection, needs, *flat = args
    grads = {"pre": d_pre, "post": d_post, "res": d_res}
    return grads, x, phi, bias, _alphas(alpha_pre, alpha_post, alpha_res), projection, needs, _spec(*flat)


@without_autocast
def native(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X [..., n, C], phi [K, nC], bias [K], alphas of one element, attributes in the order of `ATTRIBUTES`
    -> (pre [..., n], post [..., n], res [..., n, n], projection [..., K + 1]). ValueError for shapes that do not
    fit."""
    return native_spec(*split_arguments(args))


@without_autocast
def native_backward(*args: Any) -> tuple[Tensor, ...]:
    """(d_pre?, d_post?, d_res?, x, phi, bias, alphas.., projection, needs, attributes..) -> gradients in the order of
    `NEEDS`; an unneeded one is empty."""
    grads, x, phi, bias, alphas, projection, needs, spec = split_backward_arguments(args)
    return native_backward_spec(grads, x, phi, bias, alphas, projection, spec, needs)


run_activate = functools.partial(activate, sinkhorn=sinkhorn_run)
"""`activate` for execution instead of tracing."""
run_small_gradients = functools.partial(small_gradients, sinkhorn_backward=sinkhorn_run_backward)
"""`small_gradients` for execution instead of tracing."""


@without_autocast
def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native_spec(*split_arguments(args), activation=run_activate)


@without_autocast
def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, x, phi, bias, alphas, projection, needs, spec = split_backward_arguments(args)
    return native_backward_spec(grads, x, phi, bias, alphas, projection, spec, needs, run_small_gradients)


@torch.library.custom_op(
    "mhc::coefficients",
    mutates_args=(),
    schema=f"(Tensor x, {_TENSORS}, {ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h_pre, h_post, h_res, projection = _run(*args)
    return h_pre.contiguous(), h_post.contiguous(), h_res.clone(memory_format=torch.contiguous_format), projection


@_forward.register_fake
def _(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor | None,
    alpha_res: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec = _spec(*flat)
    dtype = compute_dtype(x, phi, bias, alpha_pre, alpha_post, alpha_res)
    batch = x.shape[:-2]
    return (*empty_coefficients(x, batch, spec, dtype), x.new_empty((*batch, spec.rows + 1), dtype=dtype))


@torch.library.custom_op(
    "mhc::coefficients_backward",
    mutates_args=(),
    schema=(
        f"(Tensor? d_pre, Tensor? d_post, Tensor? d_res, Tensor x, {_TENSORS}, Tensor projection, bool[] needs, "
        f"{ATTRIBUTE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(gradient.contiguous() for gradient in _run_backward(*args))


@_backward.register_fake
def _(
    d_pre: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor | None,
    alpha_res: Tensor | None,
    projection: Tensor,
    needs: Sequence[bool],
    *flat: Any,
) -> tuple[Tensor, ...]:
    arguments = (x, phi, bias, alpha_pre, alpha_post, alpha_res)
    return tuple(
        value.new_empty(value.shape)
        if needed and value is not None
        else unneeded((x, phi)[index] if index < 2 else bias)
        for index, (needed, value) in enumerate(zip(needs, arguments, strict=True))
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], output[3])
    ctx.attributes = inputs[6:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])


def _autograd(ctx: Any, d_pre: Tensor | None, d_post: Tensor | None, d_res: Tensor | None, _: None) -> tuple[Any, ...]:
    *tensors, projection = ctx.saved_tensors
    needs = [bool(needed) for needed in ctx.needs_input_grad[:6]]
    gradients = torch.ops.mhc.coefficients_backward.default(
        d_pre, d_post, d_res, *tensors, projection, needs, *ctx.attributes
    )
    wanted = (gradient if needed else None for needed, gradient in zip(needs, gradients, strict=True))
    return (*wanted, *(None for _ in ctx.attributes))


_forward.register_autograd(_autograd, setup_context=_setup)

coefficients = SemanticOp("coefficients", native, _forward, native_backward, _backward)
