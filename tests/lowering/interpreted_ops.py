"""What holds for every kernel: opcheck of its op, the laws of Sinkhorn on chip, errors beside eager's own.

Under Triton's interpreter (test_interpreter.py) and on a device (test_on_gpu.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile import ops
from mhc_compile.lowering import (
    boundary,
    coefficients,
    coefficients_backward,
    kernels,
    logits_backward_parts,
    post,
    pre,
    pre_norm,
    sinkhorn,
)
from mhc_compile.lowering.launch import INTERPRETED, KERNEL_OPS
from mhc_compile.ops import CoefficientSpec, SinkhornSpec
from mhc_compile.ops.coefficients import activate
from tests.lowering.operands import DEVICE, N, operands

kernels.register_kernels(torch.device(DEVICE))
WIDTH, TOKENS = 64, 5
SPEC = CoefficientSpec(sinkhorn=SinkhornSpec(steps=4))
FLAT = list(SPEC.op_arguments().values())


def calls() -> dict[str, list[tuple[Any, ...]]]:
    """Name of each kernel's op -> arguments of small calls."""
    x, g, y, du, q, h, p, weight, phi, bias, alphas, hi, lo = operands(TOKENS, WIDTH)
    partial = coefficients.project(x, hi, lo, 24, 32, 1)
    active = (partial, bias, *alphas, N * WIDTH, *FLAT)
    projection = coefficients.activate(*active)[3]
    shared = (projection, bias, *alphas, N * WIDTH, False, *FLAT)
    dm, multiple, _ = coefficients_backward.logits_backward(p, q, h, *shared)
    early = logits_backward_parts.early(q, h, *shared)
    norm = (weight, None, "rms", 1e-6, 0.0, True)
    _, statistics, mixed = pre_norm.forward(x, p, *norm, True)
    dots = (du, x, p, weight, statistics, "rms", 0.0, True)
    dealt, hidden = boundary.dealt_phi(phi, dm.dtype, N), (q, h)
    across = (g, h, du, p, dm, dealt, multiple, x, y, q, h, False)
    steps = list(SinkhornSpec(steps=4).op_arguments().values())
    return {
        "post": [(x, y, *hidden, False), (x, y, q, None, False)],
        "post_dots": [(g, x, y, *hidden, True, True), (g, x, y, q, None, False, False)],
        "pre": [(x, p)],
        "pre_dots": [(du, x, p)],
        "pre_norm": [(x, p, *norm, keep) for keep in (False, True)],
        "pre_norm_dots": [(*dots, True, True, False, du), (*dots, False, True, False, None, None, mixed)],
        "post_pre_norm": [(x, y, *hidden, False, p, *norm, keep) for keep in (False, True)],
        "project": [(x, hi, lo, 24, 32, 1)],
        "activate": [active],
        "activate_pre": [(partial, bias, alphas[0], N * WIDTH, *FLAT)],
        "activate_pre_norm": [(partial, bias, *alphas, x, None, *norm, True, True, *FLAT)],
        "post_project": [(x, y, *hidden, False, phi, 32)],
        "logits_backward": [(p, *hidden, *shared)],
        "logits_backward_early": [(*hidden, *shared)],
        "logits_backward_rest": [(p, *early, projection, bias, alphas[0], N * WIDTH, False, *FLAT)],
        "streams_backward": [(x, g, h, False, du, p, dm, dealt, multiple)],
        "site_boundary": [across, (*across, True)],
        "replay": [(x, [y, y], [q, q], [h, h], False)],
        "sinkhorn": [(h, *steps)],
        "sinkhorn_backward": [(h, h, *steps)],
    }


def test_every_kernel_is_called_here() -> None:
    assert {str(op).removeprefix("mhc_kernel.").removesuffix(".default") for op in KERNEL_OPS} == set(calls())


@pytest.mark.parametrize("name", sorted(calls()))
def test_opcheck(name: str) -> None:
    """What the schema says of aliasing and mutation, and a fake result that fits the real one."""
    for arguments in calls()[name]:
        overload = getattr(torch.ops.mhc_kernel, name).default
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


LOGIT = st.floats(-80.0, 80.0, width=32)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_the_laws_of_sinkhorn(n: int) -> None:
    """The axis normalised last sums to 1, the other one is no worse than in float64, entries are positive, and lines
    that are exchanged before are exchanged behind."""
    spec = SinkhornSpec()
    arguments = spec.op_arguments()

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(st.lists(LOGIT, min_size=n * n, max_size=n * n), st.permutations(range(n)), st.permutations(range(n)))
    def laws(values: list[float], rows: list[int], columns: list[int]) -> None:
        logits = torch.tensor(values, dtype=torch.float32, device=DEVICE).view(1, n, n)
        got = sinkhorn.forward(logits, **arguments)
        exact = ops.sinkhorn.native(logits.double(), **arguments)
        axis = -1 if spec.last == "row" else -2
        assert float((got.sum(axis) - 1).abs().max()) <= 1e-5
        off, exact_off = (float((value.sum(-3 - axis) - 1).abs().max()) for value in (got, exact))
        assert off <= exact_off + 1e-4
        assert float(got.min()) > 0
        turned = sinkhorn.forward(logits[:, rows][:, :, columns].contiguous(), **arguments)
        torch.testing.assert_close(turned, got[:, rows][:, :, columns], rtol=1e-4, atol=1e-6)

    laws()


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("op", ["post", "pre", "coefficients"])
def test_the_error_is_no_more_than_eagers_own(op: str) -> None:
    """In 16-bit types, against float64: the median over outputs at most 1, none beyond 1.5 times."""
    make = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device="cpu").to(DEVICE)

    narrow = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts to bf16, it does not round
    x, y = random(64, N, 256).to(narrow), random(64, 256).to(narrow)
    p, q, h = (random(64, N).sigmoid(), random(64, N).sigmoid(), random(64, N, N).softmax(-1))
    spec = CoefficientSpec(sinkhorn=SinkhornSpec(steps=10))
    small = (random(24, N * 256) * 0.05, random(24), *(torch.tensor(0.5, device=DEVICE) for _ in range(3)))
    flat = list(spec.op_arguments().values())

    def eager_coefficients(*args: Any) -> Any:
        """As a model spells it: the projection in the streams' dtype."""
        state, phi, *rest = args
        m = state.flatten(-2) @ phi.to(state.dtype).t()
        r = torch.sqrt(state.to(phi.dtype).flatten(-2).square().mean(-1, keepdim=True) + spec.norm_eps)
        alphas = dict(zip(("pre", "post", "res"), rest[1:4], strict=True))
        projection = torch.cat((m.to(phi.dtype), r.to(phi.dtype)), -1)
        return activate(projection, rest[0], alphas, spec)

    table: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
        "post": (
            lambda *a: post.forward(*a, False),
            lambda x, y, q, h: q.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + h.to(x.dtype) @ x,
            lambda *a: ops.post.native(*a),
            (x, y, q, h),
        ),
        "pre": (
            pre.forward,
            lambda x, p: (p.to(x.dtype).unsqueeze(-1) * x).sum(-2),
            ops.pre.native,
            (x, p),
        ),
        "coefficients": (
            lambda *a: coefficients.forward(*a, *flat)[:3],
            eager_coefficients,
            lambda *a: ops.coefficients.native(*a, *flat)[:3],
            (x, *small),
        ),
    }
    kernel, eager, native, arguments = table[op]
    exact = native(*(value.double() for value in arguments))
    got, theirs = kernel(*arguments), eager(*arguments)
    rows = [(got, theirs, exact)] if isinstance(got, Tensor) else list(zip(got, theirs, exact, strict=True))
    ratios = sorted(_error(a, c) / _error(b, c) for a, b, c in rows)
    assert ratios[len(ratios) // 2] <= 1.0
    assert ratios[-1] <= 1.5
