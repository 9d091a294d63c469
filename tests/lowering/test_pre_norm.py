"""pre_norm's kernels compiled for sm_90, and who takes the op. Their numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")

ATTRIBUTES = {"N": 4, "LAYER": False, "OFFSET": 0.0, "ROUND": True, "WEIGHT": True}


@pytest.mark.parametrize("width", [WIDTH, 2560])
def test_registers(width: int) -> None:
    from mhc_compile.lowering import pre_norm

    config = pre_norm.config(width)
    warps = config.pop("num_warps")
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr", "mixed_ptr"), BF16)
    pointers |= dict.fromkeys(("pre_ptr", "statistics_ptr"), FP32)
    constants = {"C": width, "EPS": 1e-6, "BIAS": False, "KEEP": True, **ATTRIBUTES, **config}
    made = compile_for_hopper(pre_norm.pre_norm_kernel, pointers, {}, constants, num_warps=warps)
    assert made.stack == 0
    assert made.registers <= 64, "forward: many programs a multiprocessor hide the loads of each other"

    config = pre_norm.backward_config(width)
    warps = config.pop("num_warps")
    names = ("grad_ptr", "second_ptr", "third_ptr", "x_ptr", "mixed_ptr", "weight_ptr", "du_ptr")
    pointers = dict.fromkeys(names, BF16)
    pointers |= dict.fromkeys(("pre_ptr", "statistics_ptr", "d_pre_ptr", "d_weight_ptr", "d_bias_ptr"), FP32)
    constants = {"C": width, "NP": 4, "GRADS": 3, "TOKENS": pre_norm.tokens_a_program(width), **ATTRIBUTES, **config}
    for kept in (False, True):
        constants |= {"NEED_PRE": not kept, "GIVEN": kept, "NEED_WEIGHT": True, "NEED_BIAS": False}
        made = compile_for_hopper(pre_norm.pre_norm_backward_kernel, pointers, TOKENS, constants, num_warps=warps)
        assert made.stack == 0
        assert not kept or made.registers <= 128, "with u kept no row of the streams is held"


def test_refusals() -> None:
    from mhc_compile.lowering import pre_norm

    x = torch.ones(2, 4, 8)
    assert pre_norm.refusal(x, None, None) == ""
    assert "float64" in pre_norm.refusal(x.double(), None, None)
    assert "5 streams" in pre_norm.refusal(torch.ones(2, 5, 8), None, None)
    assert "16384" in pre_norm.refusal(torch.ones(1, 4, 20000), None, None)
