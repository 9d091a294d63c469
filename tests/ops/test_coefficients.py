"""coefficients: against the equations spelled for autograd, over layouts, norms, gates and frozen inputs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mhc_compile.ops import CoefficientSpec, SinkhornSpec, coefficients, sinkhorn

LAYOUTS = ("pre,post,res", "pre,res,post", "pre,post", "pre", "res,post")


def spec_of(layout: str, norm: str, gate: str, res: str) -> CoefficientSpec:
    residual = res if "res" in layout else "none"
    inner = SinkhornSpec(steps=3, eps=1e-4) if residual == "sinkhorn" else None
    return CoefficientSpec(
        layout,
        4,
        norm,
        1e-3,
        gate,
        0.9,
        1e-2,
        1.7,
        2e-2,
        residual,
        inner,
        None,
    )


def reference(x: Tensor, phi: Tensor, bias: Tensor, alphas: tuple[Tensor, ...], spec: CoefficientSpec) -> list[Tensor]:
    flat = x.flatten(-2)
    r: Tensor | float = 1.0
    if spec.norm == "rms":
        r = torch.sqrt(flat.square().mean(-1, keepdim=True) + spec.norm_eps)
    elif spec.norm == "rms_outside":
        r = flat.norm(dim=-1, keepdim=True) / math.sqrt(flat.shape[-1]) + spec.norm_eps
    projected = flat @ phi.t() / r
    out = []
    for part, alpha in zip(("pre", "post", "res"), alphas, strict=True):
        if part not in spec.parts:
            continue
        rows = slice(spec.offset(part), spec.offset(part) + spec.part_size(part))
        value = projected[..., rows] * alpha + bias[rows]
        if part == "res":
            value = value.unflatten(-1, (4, 4))
            out.append(sinkhorn(value, **spec.sinkhorn.op_arguments()) if spec.sinkhorn else value)
            continue
        scale, eps = (spec.pre_scale, spec.pre_eps) if part == "pre" else (spec.post_scale, spec.post_eps)
        out.append((value.sigmoid() if spec.gate == "sigmoid" else value) * scale + eps)
    return out


def inputs(spec: CoefficientSpec, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 2, 4, 6), (spec.rows, 24), (spec.rows,), (), (), ())
    return tuple(torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes)


@pytest.mark.parametrize(
    ("layout", "norm", "gate", "res"),
    list(itertools.product(LAYOUTS, ("rms", "rms_outside", "none"), ("sigmoid", "linear"), ("sinkhorn", "linear"))),
)
def test_against_the_equations(layout: str, norm: str, gate: str, res: str) -> None:
    spec = spec_of(layout, norm, gate, res)
    x, phi, bias, *alphas = inputs(spec)
    want = reference(x, phi, bias, tuple(alphas), spec)
    got = [value for value in coefficients(x, phi, bias, *alphas, **spec.op_arguments())[:3] if value.numel()]
    assert len(got) == len(want)
    weights = [torch.randn_like(value) for value in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    present = [x, phi, bias, *(a for a, part in zip(alphas, ("pre", "post", "res"), strict=True) if part in spec.parts)]
    expected = torch.autograd.grad(sum((v * w).sum() for v, w in zip(want, weights, strict=True)), present)
    actual = torch.autograd.grad(sum((v * w).sum() for v, w in zip(got, weights, strict=True)), present)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_an_unused_output_costs_no_gradient() -> None:
    spec = CoefficientSpec(sinkhorn=SinkhornSpec(steps=2))
    x, phi, bias, *alphas = inputs(spec)
    coefficients(x, phi, bias, *alphas, **spec.op_arguments())[0].sum().backward()
    assert phi.grad is not None
    assert not phi.grad[4:].any()
    assert phi.grad[:4].any()


def test_frozen_phi() -> None:
    spec = CoefficientSpec(sinkhorn=SinkhornSpec(steps=2))
    x, phi, bias, *alphas = inputs(spec)
    phi.requires_grad_(False)
    sum(v.sum() for v in coefficients(x, phi, bias, *alphas, **spec.op_arguments())[:3]).backward()
    assert phi.grad is None
    assert x.grad is not None
    empty = coefficients.native_backward(
        torch.ones(3, 2, 4), None, None, x.float(), phi.float(), bias.float(), *alphas,
        coefficients(x, phi, bias, *alphas, **spec.op_arguments())[3].float(),
        [True, False, False, False, False, False], *spec.op_arguments().values(),
    )  # fmt: skip
    assert empty[1].shape == (0,)


def test_mix_dtype_rounds_post_and_res_only() -> None:
    spec = CoefficientSpec(mix_dtype=torch.bfloat16)
    x, phi, bias, *alphas = inputs(spec, torch.float32)
    h_pre, h_post, h_res, projection = coefficients(x.bfloat16(), phi, bias, *alphas, **spec.op_arguments())
    assert (h_pre.dtype, h_post.dtype, h_res.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert projection.shape == (3, 2, 25)
    assert not projection.requires_grad


def test_zero_state_has_finite_gradients() -> None:
    for norm in ("rms", "rms_outside"):
        spec = spec_of("pre,post,res", norm, "sigmoid", "sinkhorn")
        x, phi, bias, *alphas = inputs(spec)
        zero = torch.zeros_like(x).requires_grad_()
        sum(v.sum() for v in coefficients(zero, phi, bias, *alphas, **spec.op_arguments())[:3]).backward()
        assert zero.grad is not None
        assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("wrong", ["streams", "phi", "bias", "alpha"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    spec = CoefficientSpec(sinkhorn=SinkhornSpec(steps=2))
    x, phi, bias, *alphas = inputs(spec)
    arguments: list[Tensor | None] = [x, phi, bias, *alphas]
    index = {"streams": 0, "phi": 1, "bias": 2, "alpha": 5}[wrong]
    arguments[index] = {"streams": x[..., :2, :], "phi": phi[:, 1:], "bias": bias[1:], "alpha": None}[wrong]
    with pytest.raises((ValueError, RuntimeError)):
        coefficients(*arguments, **spec.op_arguments())
