"""pre made early is bit for bit the pre of ``activate``; under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import pytest

from mhc_compile.compat import triton_version
from tests.lowering.interpreter import interpreted

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

CASES = """
import itertools, torch
from mhc_compile.lowering import coefficients
from mhc_compile.lowering.activate_pre import activate_pre
from mhc_compile.ops import CoefficientSpec

torch.manual_seed(0)
layouts = ("pre,post,res", "pre,res,post", "post,pre,res")
for n, layout, splits, norm in itertools.product((4, 3), layouts, (1, 2), ("rms", "none", "rms_outside")):
    spec = CoefficientSpec(streams=n, layout=layout, norm=norm, pre_eps=0.01, pre_scale=1.5)
    flat = tuple(spec.op_arguments().values())
    padded, tokens = coefficients.padded_rows(spec), 11
    partial = torch.randn(splits, tokens, padded).abs()
    bias, alphas = torch.randn(spec.rows), [torch.randn(1) for _ in range(3)]
    whole = coefficients.activate(partial, bias, *alphas, n * 16, *flat)
    early = activate_pre(partial, bias, alphas[0], n * 16, *flat)
    assert early.shape == (tokens, n) and torch.isfinite(early).all()
    assert torch.equal(early, whole[0]), (n, layout, splits, norm)
empty = activate_pre(partial[:, :0], bias, alphas[0], 48, *flat)
assert empty.shape == (0, 3)
print("same bits")
"""


def test_same_bits_as_the_whole() -> None:
    assert "same bits" in interpreted(CASES)
