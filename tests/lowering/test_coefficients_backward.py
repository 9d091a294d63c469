"""coefficients' backward kernel compiled for sm_90. Its numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.ops import CoefficientSpec
from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


def test_logits_backward() -> None:
    from mhc_compile.lowering import coefficients, coefficients_backward

    names = (
        "d_pre",
        "d_post",
        "d_res",
        "projection",
        "bias",
        "alpha_pre",
        "alpha_post",
        "alpha_res",
        "multiple",
        "sums",
        "early_dm",
        "early_inner",
        "early_sums",
    )
    constants = {"TOTAL": 4 * WIDTH, "WIDTH": 64, "TOKENS": 8, "STAGE": 0, "STRIDE": 4, "PRE_STRIDE": 4, "PARTS": 1}
    constants |= dict.fromkeys(("HAS_PRE", "HAS_POST", "HAS_RES", "TWO"), True)
    constants |= coefficients.activation_constants(CoefficientSpec())
    pointers = {f"{name}_ptr": FP32 for name in names} | {"dm_ptr": BF16}
    kernel = coefficients_backward.logits_backward_kernel
    assert compile_for_hopper(kernel, pointers, TOKENS, constants, num_warps=1).stack == 0


def test_phi_gradient_adds_the_halves() -> None:
    from mhc_compile.lowering.coefficients_backward import phi_gradient

    dm, x = torch.randn(5, 64).bfloat16(), torch.randn(5, 4, 8).bfloat16()
    want = (dm[:, :24].double() + dm[:, 32:56].double()).t() @ x.flatten(1).double()
    torch.testing.assert_close(phi_gradient(dm, x, CoefficientSpec()).double(), want, rtol=1e-5, atol=1e-5)
