"""post's kernels compiled for sm_90: 16-byte accesses, no spills. Their numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.hopper import BF16, FP32, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


def test_forward() -> None:
    from mhc_compile.lowering import post

    config = post.post_config(WIDTH)
    warps = config.pop("num_warps")
    pointers = {"x_ptr": BF16, "y_ptr": BF16, "post_ptr": FP32, "res_ptr": FP32, "out_ptr": BF16}
    constants = {"C": WIDTH, "N": 4, "HAS_RES": True, "TRANSPOSE": False, **config}
    made = compile_for_hopper(post.post_kernel, pointers, {}, constants, num_warps=warps)
    assert (made.stack, made.registers <= 80) == (0, True)
    assert made.ptx.count("ld.global.v4") == 5, "X and y in 16-byte loads"
    assert made.ptx.count("st.global.v4") == 4


def test_dots() -> None:
    from mhc_compile.lowering import post

    config = post.dots_config(WIDTH)
    warps = config.pop("num_warps")
    pointers = dict.fromkeys(("grad_ptr", "x_ptr", "y_ptr", "dy_ptr"), BF16)
    pointers |= dict.fromkeys(("post_ptr", "d_post_ptr", "d_res_ptr"), FP32)
    constants = {"C": WIDTH, "N": 4, "NP": 4, "TRANSPOSE": False, "NEED_Y": True, "NEED_RES": True, "ALIKE": False}
    constants |= config
    assert compile_for_hopper(post.post_dots_kernel, pointers, {}, constants, num_warps=warps).stack == 0


def test_refusals() -> None:
    from mhc_compile.lowering import post

    x, y = torch.ones(2, 4, 8), torch.ones(2, 8)
    assert post.refusal(x, y) == ""
    assert "float64" in post.refusal(x.double(), y)
    assert "6 streams" in post.refusal(torch.ones(2, 6, 8), y)
