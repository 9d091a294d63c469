"""The errors of the kernels against float64, forward and backward: beside eager's own, and in the size of the result.

Under Triton's interpreter (test_interpreter.py) and on a device (test_on_gpu.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mhc_compile.lowering import boundary, coefficients, post, pre, pre_norm, sinkhorn
from mhc_compile.lowering.launch import INTERPRETED
from mhc_compile.ops import CoefficientSpec, SinkhornSpec
from mhc_compile.ops.coefficients import activate
from tests.lowering.operands import DEVICE, N

pytestmark = pytest.mark.usefixtures("poisoned")

NARROW = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts to bf16, it does not round
TOKENS, WIDTH = 64, 256
SPEC = CoefficientSpec(sinkhorn=SinkhornSpec(steps=10))
FLAT = list(SPEC.op_arguments().values())
STEPS = SinkhornSpec(steps=10).op_arguments()
NORM = ("rms", 1e-6, 0.0, True)

Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    """An op three times over: by its kernels, and as a model spells it, which in float64 is the exact result."""

    forward: Callable[..., Tensors]
    backward: Callable[[Tensors, Tensors], Tensors]
    """(Gradients of the results, arguments) -> gradients of the arguments."""
    eager: Callable[..., Tensors]
    arguments: Tensors


def eager_post(x: Tensor, y: Tensor, q: Tensor, h: Tensor) -> Tensors:
    return (q.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + h.to(x.dtype) @ x,)


def eager_pre(x: Tensor, p: Tensor) -> Tensors:
    return ((p.to(x.dtype).unsqueeze(-1) * x).sum(-2),)


def eager_pre_norm(x: Tensor, p: Tensor, weight: Tensor) -> Tensors:
    u = eager_pre(x, p)[0].to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + NORM[1])).to(x.dtype),)


def eager_sinkhorn(logits: Tensor) -> Tensors:
    matrix = logits.softmax(-1) + 1e-6
    for step in range(10):
        matrix = matrix / matrix.sum(-2 + step % 2, keepdim=True)
    return (matrix,)


def eager_coefficients(x: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor) -> Tensors:
    """The projection in the streams' dtype, the rest in phi's."""
    m = x.flatten(-2) @ phi.to(x.dtype).t()
    r = torch.sqrt(x.to(phi.dtype).flatten(-2).square().mean(-1, keepdim=True) + SPEC.norm_eps)
    named = dict(zip(("pre", "post", "res"), alphas, strict=True))
    return activate(torch.cat((m.to(phi.dtype), r), -1), bias, named, SPEC)[:3]


def coefficients_backward(grads: Tensors, arguments: Tensors) -> Tensors:
    projection = coefficients.forward(*arguments, *FLAT)[3]
    return boundary.coefficients_backward(*grads, *arguments, projection, [True] * 6, *FLAT)


def pre_norm_backward(grads: Tensors, arguments: Tensors) -> Tensors:
    x, p, weight = arguments
    statistics = pre_norm.forward(x, p, weight, None, *NORM)[1]
    return pre_norm.backward(*grads, x, p, weight, None, statistics, None, *NORM, [True, True, True, False])[:3]


def case(op: str) -> Case:
    make = torch.Generator("cpu").manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device="cpu").to(DEVICE)

    x, y = random(TOKENS, N, WIDTH).to(NARROW), random(TOKENS, WIDTH).to(NARROW)
    p, q, h = random(TOKENS, N).sigmoid(), random(TOKENS, N).sigmoid(), random(TOKENS, N, N)
    if op == "post":
        needs = [True] * 4
        return Case(
            lambda *a: (post.forward(*a, False),), lambda g, a: post.backward(*g, *a, False, needs), eager_post,
            (x, y, q, h.softmax(-1)),
        )  # fmt: skip
    if op == "pre":
        return Case(lambda *a: (pre.forward(*a),), lambda g, a: pre.backward(*g, *a, [True, True]), eager_pre, (x, p))
    if op == "pre_norm":
        weight = (1 + 0.1 * random(WIDTH)).to(NARROW)
        return Case(lambda *a: pre_norm.forward(*a, None, *NORM)[:1], pre_norm_backward, eager_pre_norm, (x, p, weight))
    if op == "sinkhorn":
        return Case(
            lambda a: (sinkhorn.forward(a, **STEPS),), lambda g, a: (sinkhorn.backward(*g, *a, **STEPS),),
            eager_sinkhorn, (h,),
        )  # fmt: skip
    small = (random(24, N * WIDTH) * 0.05, random(24), *(torch.tensor(0.5, device=DEVICE) for _ in range(3)))
    return Case(lambda *a: coefficients.forward(*a, *FLAT)[:3], coefficients_backward, eager_coefficients, (x, *small))


def with_gradients(eager: Callable[..., Tensors], arguments: Tensors, weights: Tensors) -> tuple[Tensors, Tensors]:
    """Results, and gradients of the arguments for these gradients of the results, by autograd."""
    leaves = [value.detach().clone().requires_grad_() for value in arguments]
    results = eager(*leaves)
    gradients = torch.autograd.grad(results, leaves, [a.to(b.dtype) for a, b in zip(weights, results, strict=True)])
    return tuple(value.detach() for value in results), gradients


@functools.cache
def compared(op: str, backward: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(The kernels', eager's, the exact) of each result or gradient."""
    each = case(op)
    got = each.forward(*each.arguments)
    make = torch.Generator("cpu").manual_seed(2)
    weights = tuple(torch.randn(one.shape, generator=make, device="cpu").to(one) for one in got)
    theirs = with_gradients(each.eager, each.arguments, weights)
    exact = with_gradients(each.eager, tuple(value.double() for value in each.arguments), weights)
    own = each.backward(weights, each.arguments) if backward else got
    return list(zip(own, theirs[backward], exact[backward], strict=True))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


OPS = ("post", "pre", "pre_norm", "sinkhorn", "coefficients")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_the_error_is_no_more_than_eagers_own(op: str, backward: bool) -> None:
    """Streams in 16 bits, against float64: the median over results at most 1, none beyond 1.5 times."""
    ratios = [error(own, exact) / error(theirs, exact) for own, theirs, exact in compared(op, backward)]
    ratios.sort()
    # Sinkhorn is float32 for a model too: the kernel divides once for a line, and multiplies.
    assert ratios[len(ratios) // 2] <= (1.5 if op == "sinkhorn" else 1.0), ratios
    assert ratios[-1] <= 1.5, ratios


@pytest.mark.parametrize(("backward", "bound"), [(False, 0.001), (True, 0.004)])
@pytest.mark.parametrize("op", OPS)
def test_results_are_of_the_right_size(op: str, backward: bool, bound: float) -> None:
    """|RMS(kernel) / RMS(float64) - 1|: rounding must not make what flows through the sites larger or smaller."""
    sizes = [abs(float(own.double().norm() / exact.norm()) - 1) for own, _, exact in compared(op, backward)]
    assert max(sizes) <= bound, sizes
