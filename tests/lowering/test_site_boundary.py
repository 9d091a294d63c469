"""The kernel over a site boundary compiled for sm_90. Its numbers: interpreted_cases.py; the fusion:
interpreted_graphs.py."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("mixed", [True, False])
def test_two_programs_share_a_multiprocessor(mixed: bool, dots: bool) -> None:
    """No spill, at most 255 registers, and the tensor core's results stay out of shared memory within the loop."""
    from mhc_compile.lowering import site_boundary

    config = site_boundary.config(WIDTH)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    names = ("x_ptr", "y_ptr", "grad_ptr", "du_ptr", "dm_ptr", "phi_ptr", "out_ptr", "dy_ptr")
    pointers = dict.fromkeys(names, BF16)
    pointers |= dict.fromkeys(("res_ptr", "pre_ptr", "multiple_ptr", "post_ptr", "mix_ptr", "sums_ptr"), FP32)
    constants = {"C": WIDTH, "CP": WIDTH, "N": 4, "KP": 32 if mixed else 16, "K": 24 if mixed else 16, **config}
    constants |= {"WIDTH": 2 * constants["KP"], "HAS_RES": mixed, "TRANSPOSE": False, "TWO": True, "DOTS": dots}
    constants |= {"FINE": False, "ALIKE": False}
    made = compile_for_hopper(site_boundary.site_boundary_kernel, pointers, TOKENS, constants, **options)
    assert made.stack == 0
    assert made.registers * 2 * 32 * options["num_warps"] <= 65536
    assert made.shared * 2 <= 227 * 1024
    loop = made.ptx[made.ptx.index("wgmma.mma") : made.ptx.rindex("wgmma.mma")]
    assert "st.shared" not in loop, "the tensor core's layout is the one of the loads: see dealt_pairs"


def test_refusals_say_what_is_missing() -> None:
    from mhc_compile.lowering import site_boundary

    assert site_boundary.refusal(torch.empty(2, 4, 64, dtype=torch.bfloat16)) == ""
    assert "8 streams" in site_boundary.refusal(torch.empty(2, 8, 64, dtype=torch.bfloat16))
    assert "float32" in site_boundary.refusal(torch.empty(2, 4, 64))
    assert "multiple of 32" in site_boundary.refusal(torch.empty(2, 4, 50, dtype=torch.bfloat16))
