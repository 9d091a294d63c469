"""pre's kernels compiled for sm_90. Their numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.hopper import BF16, FP32, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


def test_both() -> None:
    from mhc_compile.lowering import pre

    pointers = {"x_ptr": BF16, "pre_ptr": FP32, "out_ptr": BF16}
    forward = compile_for_hopper(pre.pre_kernel, pointers, {}, {"C": WIDTH, "N": 4, "BC": 1024}, num_warps=4)
    assert (forward.stack, forward.ptx.count("ld.global.v4")) == (0, 4)
    config = pre.dots_config(WIDTH)
    warps = config.pop("num_warps")
    pointers = {"grad_ptr": BF16, "x_ptr": BF16, "out_ptr": FP32}
    constants = {"C": WIDTH, "N": 4, "NP": 4, **config}
    assert compile_for_hopper(pre.pre_dots_kernel, pointers, {}, constants, num_warps=warps).stack == 0


def test_refusals() -> None:
    from mhc_compile.lowering import pre

    assert pre.refusal(torch.ones(2, 4, 8)) == ""
    assert "float64" in pre.refusal(torch.ones(2, 4, 8).double())
    assert "5 streams" in pre.refusal(torch.ones(2, 5, 8))
