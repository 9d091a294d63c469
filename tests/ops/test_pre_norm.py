"""pre_norm is pre and then torch's norm: values, gradients, the roundings in between, its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_compile.ops import pre, pre_norm
from mhc_compile.ops.pre_norm import native_backward

LEAD, N, C = (2, 3), 4, 5
SPELLINGS = [
    pytest.param(kind, offset, first, weight, bias, id=f"{kind}-{offset:g}-{first}-{weight:d}{bias:d}")
    for kind, offset, first, weight, bias in [
        ("rms", 0.0, False, True, False),
        ("rms", 1.0, False, True, False),
        ("rms", 0.0, True, True, False),
        ("rms", 1.0, False, False, False),
        ("rms", 0.5, True, True, True),
        ("layer", 0.0, False, True, True),
        ("layer", 0.0, False, True, False),
        ("layer", 0.0, False, False, True),
        ("layer", 1.0, False, False, False),
    ]
]


def inputs(weight: bool, bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    return [make(*LEAD, N, C), make(*LEAD, N), make(C) if weight else None, make(C) if bias else None]


def composed(
    x: Tensor, h: Tensor, w: Tensor | None, b: Tensor | None, kind: str, eps: float, offset: float, first: bool
) -> Tensor:
    """The same of pre and torch's norms; float32 inside where the streams are narrower."""
    u = pre(x, h)
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    z = F.rms_norm(wide, (C,), None, eps) if kind == "rms" else F.layer_norm(wide, (C,), None, None, eps)
    if first:
        z = z.to(u.dtype).to(z.dtype)
    z = z if w is None else z * (w.to(z.dtype) + offset)
    return (z if b is None else z + b.to(z.dtype)).to(x.dtype)


@pytest.mark.parametrize(("kind", "offset", "first", "weight", "bias"), SPELLINGS)
def test_it_is_pre_and_torchs_norm(kind: str, offset: float, first: bool, weight: bool, bias: bool) -> None:
    tensors = inputs(weight, bias)
    attributes = (kind, 1e-3, offset, first)
    out, *_ = pre_norm(*tensors, *attributes)
    want = composed(*tensors, *attributes)
    torch.testing.assert_close(out, want)
    given = [t for t in tensors if t is not None]
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, given, grad), torch.autograd.grad(want, given, grad))


@pytest.mark.parametrize(("kind", "offset", "first", "weight", "bias"), SPELLINGS)
def test_gradcheck(kind: str, offset: float, first: bool, weight: bool, bias: bool) -> None:
    tensors = inputs(weight, bias)
    given = [t for t in tensors if t is not None]

    def run(*own: Tensor) -> Tensor:
        values = iter(own)
        return pre_norm(*(None if t is None else next(values) for t in tensors), kind, 1e-3, offset, first)[0]

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "offset", "first", "weight", "bias"), SPELLINGS)
def test_low_precision_is_rounded_where_it_says(
    kind: str, offset: float, first: bool, weight: bool, bias: bool, dtype: torch.dtype
) -> None:
    """u, z of ``round_first`` and the result are rounded, nothing else: the composition in float32 gives the same."""
    tensors = inputs(weight, bias, dtype)
    attributes = (kind, 1e-3, offset, first)
    out, statistics, _ = pre_norm(*tensors, *attributes)
    want = composed(*tensors, *attributes)
    assert out.dtype is dtype
    assert statistics.dtype is torch.float32
    torch.testing.assert_close(out, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    given = [t for t in tensors if t is not None]
    grad = torch.randn_like(out)
    for got, exact in zip(torch.autograd.grad(out, given, grad), torch.autograd.grad(want, given, grad), strict=True):
        torch.testing.assert_close(got, exact, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("first", [False, True])
def test_the_rounding_of_z_is_seen(first: bool) -> None:
    """Llama's ``weight * z.to(bf16)`` and Gemma's ``(weight * z).to(bf16)`` differ in some elements."""
    x, h = torch.randn(64, 4, 32, dtype=torch.bfloat16), torch.rand(64, 4)
    w = torch.randn(32, dtype=torch.bfloat16)
    out, *_ = pre_norm(x, h, w, None, "rms", 1e-6, 0.0, first)
    u = pre(x, h).float()
    z = u * torch.rsqrt((u * u).mean(-1, keepdim=True) + 1e-6)
    llama, gemma = w * z.to(torch.bfloat16), (w.float() * z).to(torch.bfloat16)
    assert torch.equal(out, llama if first else gemma)
    assert not torch.equal(llama, gemma)


@pytest.mark.parametrize(("kind", "offset", "first", "weight", "bias"), SPELLINGS)
def test_opcheck(kind: str, offset: float, first: bool, weight: bool, bias: bool) -> None:
    arguments = (*inputs(weight, bias, torch.float32), kind, 1e-3, offset, first)
    torch.library.opcheck(pre_norm.overload, arguments)
    torch.library.opcheck(pre_norm.overload, arguments, test_utils="test_aot_dispatch_static")


def test_statistics_are_what_the_backward_needs_and_carry_no_gradient() -> None:
    x, h, w, b = inputs(True, True)
    u = pre(x, h)
    _, rms, _ = pre_norm(x, h, w, None, "rms", 1e-3, 0.0, False)
    _, layer, _ = pre_norm(x, h, w, b, "layer", 1e-3, 0.0, False)
    torch.testing.assert_close(rms, torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-3))
    variance = u.var(-1, keepdim=True, correction=0)
    torch.testing.assert_close(layer, torch.cat((u.mean(-1, keepdim=True), torch.rsqrt(variance + 1e-3)), -1))
    assert not rms.requires_grad
    assert not layer.requires_grad


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("wanted", range(4))
def test_what_nobody_needs_is_empty(kind: str, wanted: int) -> None:
    tensors = [t.detach() for t in inputs(True, True) if t is not None]
    out, statistics, _ = pre_norm(*tensors, kind, 1e-3, 0.0, False)
    attributes: tuple[Any, ...] = (kind, 1e-3, 0.0, False)
    everything = native_backward(out, *tensors, statistics, None, *attributes, [True] * 4)
    needs = [index == wanted for index in range(4)]
    for call in (native_backward, pre_norm.backward_overload):
        gradients = call(out, *tensors, statistics, None, *attributes, needs)
        for index, gradient in enumerate(gradients):
            assert gradient.numel() == 0 if index != wanted else torch.equal(gradient, everything[index])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_no_tokens(kind: str) -> None:
    x, h = torch.randn(0, 4, 5, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    w, b = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    out, statistics, _ = pre_norm(x, h, w, b, kind, 1e-6, 0.0, False)
    assert out.shape == (0, 5)
    assert statistics.shape == (0, 1 if kind == "rms" else 2)
    out.sum().backward()
    assert torch.equal(w.grad, torch.zeros(5))
    assert torch.equal(b.grad, torch.zeros(5))
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_token_of_zeros_is_finite(kind: str) -> None:
    x, h = torch.zeros(1, 4, 5, requires_grad=True), torch.ones(1, 4)
    pre_norm(x, h, None, None, kind, 1e-6, 0.0, False)[0].sum().backward()
    assert torch.isfinite(x.grad).all()


def test_what_it_refuses() -> None:
    x, h = torch.randn(2, 4, 5), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"the weight of a norm over C must be \[5\], got \(4, 5\)"):
        pre_norm(x, h, torch.randn(4, 5), None, "rms", 1e-6, 0.0, False)
    with pytest.raises(ValueError, match="the bias of a norm"):
        pre_norm(x, h, None, torch.randn(4), "layer", 1e-6, 0.0, False)
    with pytest.raises(ValueError, match="kind must be one of rms, layer"):
        pre_norm(x, h, None, None, "batch", 1e-6, 0.0, False)
