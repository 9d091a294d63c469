"""sinkhorn's kernels compiled for sm_90: everything stays in registers. Their numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.ops import SinkhornSpec
from tests.lowering.hopper import FP32, TOKENS, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


@pytest.mark.parametrize("spec", [SinkhornSpec(), SinkhornSpec("exp")])
def test_registers(spec: SinkhornSpec) -> None:
    from mhc_compile.lowering import sinkhorn

    constants = {"N": 4, "NP": 4, "TOKENS": 8, **sinkhorn.constants(spec)}
    pointers = dict.fromkeys(("logits_ptr", "out_ptr"), FP32)
    forward = compile_for_hopper(sinkhorn.sinkhorn_kernel, pointers, TOKENS, constants, num_warps=1)
    assert (forward.stack, forward.registers <= 64) == (0, True)
    pointers = {"grad_ptr": FP32, **pointers}
    backward = compile_for_hopper(sinkhorn.sinkhorn_backward_kernel, pointers, TOKENS, constants, num_warps=1)
    assert backward.stack == 0, "the divisors of all steps fit into registers"
    assert "bar.sync" not in backward.ptx


def test_refusals() -> None:
    from mhc_compile.lowering import sinkhorn

    flat = SinkhornSpec(steps=200).op_arguments()
    logits = torch.ones(3, 4, 4)
    assert sinkhorn.refusal(flat, logits, backward=False) == ""
    assert "at most 64" in sinkhorn.refusal(flat, logits, backward=True)
    assert "float64" in sinkhorn.refusal(flat, logits.double(), backward=False)
    assert "5 streams" in sinkhorn.refusal(flat, torch.ones(3, 5, 5), backward=False)
