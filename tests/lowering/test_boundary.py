"""The stream gradient's kernel compiled for sm_90. Its numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


def test_stays_out_of_shared_memory() -> None:
    from mhc_compile.lowering import boundary

    config = boundary.streams_config(8192, WIDTH, 2)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    pointers = dict.fromkeys(("x_ptr", "grad_ptr", "du_ptr", "dm_ptr", "phi_ptr", "out_ptr"), BF16)
    pointers |= dict.fromkeys(("res_ptr", "pre_ptr", "multiple_ptr"), FP32)
    constants = {"C": WIDTH, "N": 4, "KP": 32, "WIDTH": 64, "WARPS": warps, "TRANSPOSE": False, **config}
    constants |= dict.fromkeys(("POST", "HAS_RES", "PRE", "COEFFICIENTS"), True) | {"ALIKE": False, "SUMMED": False}
    kernel = boundary.streams_backward_kernel
    for two, fine in ((False, False), (True, False), (True, True)):
        constants |= {"TWO": two, "FINE": fine}
        made = compile_for_hopper(kernel, pointers, TOKENS, constants, num_warps=warps, num_stages=stages)
        assert made.stack == 0
        assert "ld.shared" not in made.ptx, "the tensor core's layout is the one of the loads: see dealt"
        assert "shfl" not in made.ptx


def test_dealt_phi_is_a_padded_permutation() -> None:
    from mhc_compile.lowering import boundary

    phi = torch.arange(24 * 4 * 40, dtype=torch.float32).view(24, 160)
    dealt = boundary.dealt_phi(phi, torch.float32, 4)
    assert dealt.shape == (32, 4, 64)
    assert torch.equal(dealt[:24, :, :32].sort(-1).values, phi.view(24, 4, 40)[..., :32])
    assert dealt[0, 0, :10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3], "column 8 j + 2 t + e holds 8 t + 2 j + e"
    assert not dealt[24:].any()


def test_spans_divide_the_width_or_are_masked() -> None:
    from mhc_compile.lowering import boundary

    assert [boundary.span_of(width) for width in (2560, 1600, 288, 352, 50)] == [64, 64, 96, 32, 64]
