"""`logits_backward` in two launches is bit for bit the whole: under Triton's interpreter, and compiled for sm_90."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mhc_compile.compat import triton_version
from mhc_compile.ops import CoefficientSpec
from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, compile_for_hopper, compiler_missing
from tests.lowering.interpreter import interpreted

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

CASES = """
import itertools, torch
from mhc_compile.lowering import coefficients
from mhc_compile.lowering.coefficients_backward import logits_backward
from mhc_compile.lowering.logits_backward_parts import early, rest
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

torch.manual_seed(0)

def check(spec, tokens, wide, beside, given):
    n, flat = spec.streams, tuple(spec.op_arguments().values())
    d_pre, d_post, d_res = torch.randn(tokens, n), torch.randn(tokens, n), torch.randn(tokens, n, n)
    if beside:
        d_post, d_res = torch.randn(3, tokens, n + n * n), None
    d_post, d_res = (d_post if "post" in given else None), (d_res if "res" in given else None)
    projection = torch.randn(tokens, spec.rows + 1).abs() + 0.1
    bias, alphas = torch.randn(spec.rows), [torch.randn(1) for _ in range(3)]
    arguments = (projection, bias, *alphas, n * 16, wide, *flat)
    whole = logits_backward(d_pre, d_post, d_res, *arguments)
    first = early(d_post, d_res, *arguments)
    both = rest(d_pre, *first, projection, bias, alphas[0], n * 16, wide, *flat)
    there = [*range(spec.rows), *(spec.rows + i for i, part in enumerate(("pre", "post", "res")) if part in spec.parts)]
    both, whole = ([dm, multiple, sums[:, there]] for dm, multiple, sums in (both, whole))  # nobody writes the others
    for name, a, b in zip(("dm", "multiple", "sums"), both, whole, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.isfinite(b.float()).all() and torch.equal(a, b), (spec, name)

short = SinkhornSpec(steps=4)
for n, norm, wide in itertools.product((4, 3, 2), ("rms", "none", "rms_outside"), (False, True)):
    check(CoefficientSpec(streams=n, norm=norm, sinkhorn=short), 11, wide, False, ("post", "res"))
for layout in ("pre,res,post", "post,pre,res", "res,pre,post"):
    check(CoefficientSpec(layout=layout, sinkhorn=short), 9, False, False, ("post", "res"))
for given in (("post",), ("res",), ()):
    check(CoefficientSpec(sinkhorn=short), 9, False, False, given)
check(CoefficientSpec(layout="pre,post", res="none", sinkhorn=None), 9, False, False, ("post",))
check(CoefficientSpec(), 9, False, True, ("post",))
check(CoefficientSpec(sinkhorn=short), 0, False, False, ("post", "res"))
print("same bits")
"""


def test_same_bits_as_the_whole() -> None:
    assert "same bits" in interpreted(CASES)


def _compiled(stage: int) -> Any:
    from mhc_compile.lowering import coefficients, coefficients_backward

    names = (
        "d_pre", "d_post", "d_res", "projection", "bias", "alpha_pre", "alpha_post", "alpha_res", "multiple", "sums",
        "early_inner", "early_sums",
    )  # fmt: skip
    constants = {"TOTAL": 4 * WIDTH, "WIDTH": 64, "TOKENS": 8, "STAGE": stage, "TWO": True}
    constants |= {"STRIDE": 4, "PRE_STRIDE": 4, "PARTS": 1}
    constants |= {"HAS_PRE": stage != 1, "HAS_POST": stage != 2, "HAS_RES": stage != 2}
    constants |= coefficients.activation_constants(CoefficientSpec())
    pointers = {f"{name}_ptr": FP32 for name in names} | {"dm_ptr": BF16, "early_dm_ptr": BF16}
    kernel = coefficients_backward.logits_backward_kernel
    return compile_for_hopper(kernel, pointers, TOKENS, constants, num_warps=1)


@pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")
def test_compiled_parts_add_in_the_order_of_the_whole() -> None:
    """A sum over lanes adds in an order that its layout decides: the shuffles of the parts are those of the whole."""

    def shuffles(ptx: str) -> list[str]:
        return sorted(re.findall(r"shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, (\d+)", ptx))

    whole, first, second = (_compiled(stage) for stage in (0, 1, 2))
    assert max(whole.stack, first.stack, second.stack) == 0
    assert sorted(shuffles(first.ptx) + shuffles(second.ptx)) == shuffles(whole.ptx)
    assert len(second.ptx) < len(whole.ptx) / 3
