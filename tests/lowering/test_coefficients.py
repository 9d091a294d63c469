"""coefficients' forward kernels compiled for sm_90. Their numbers: interpreted_cases.py."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.ops import CoefficientSpec, SinkhornSpec
from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


def test_project_feeds_the_tensor_core_from_memory() -> None:
    from mhc_compile.lowering import coefficients

    config = coefficients.project_config(8192, 32, 4 * WIDTH, 2, 2)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    pointers = {"x_ptr": BF16, "hi_ptr": BF16, "lo_ptr": BF16, "out_ptr": FP32}
    constants = {"TOTAL": 4 * WIDTH, "K": 24, "KP": 32, "TWO": True, **config}
    made = compile_for_hopper(
        coefficients.project_kernel, pointers, TOKENS, constants, num_warps=warps, num_stages=stages
    )
    assert made.stack == 0
    assert "wgmma.mma_async" in made.ptx
    assert "cp.async" in made.ptx


def test_activate() -> None:
    from mhc_compile.lowering import coefficients

    names = ("partial", "bias", "alpha_pre", "alpha_post", "alpha_res", "pre", "post", "res", "projection")
    constants = {"TOTAL": 4 * WIDTH, "SPLITS": 2, "TOKENS": 8, **coefficients.activation_constants(CoefficientSpec())}
    pointers = {f"{name}_ptr": FP32 for name in names}
    made = compile_for_hopper(coefficients.activate_kernel, pointers, TOKENS, constants, num_warps=1)
    assert (made.stack, made.registers <= 80) == (0, True)


def test_one_token_is_a_constant_to_the_compiler() -> None:
    """Triton takes an argument of 1 for a constant, which has no `.to`: a single token of a decode step."""
    from mhc_compile.lowering import activate_pre, coefficients

    names = ("partial", "bias", "alpha_pre", "alpha_post", "alpha_res", "pre", "post", "res", "projection")
    every = {"TOTAL": 4 * WIDTH, "SPLITS": 16, "TOKENS": 8, **coefficients.activation_constants(CoefficientSpec())}
    pointers = {f"{name}_ptr": FP32 for name in names}
    kernel = coefficients.activate_kernel
    assert compile_for_hopper(kernel, pointers, {}, every | {"tokens": 1}, num_warps=1).stack == 0
    pointers = {f"{name}_ptr": FP32 for name in ("partial", "bias", "alpha", "pre")}
    constants = {name: value for name, value in every.items() if name in activate_pre.activate_pre_kernel.arg_names}
    kernel = activate_pre.activate_pre_kernel
    assert compile_for_hopper(kernel, pointers, {}, constants | {"tokens": 1}, num_warps=1).stack == 0


def test_halves_hold_sixteen_bits() -> None:
    from mhc_compile.lowering import coefficients

    phi = torch.randn(24, 64)
    hi, lo = coefficients.halves(phi, torch.bfloat16)
    assert float(((hi.double() + lo.double()) - phi.double()).abs().max() / phi.abs().max()) < 2**-16


def test_few_tokens_are_split_over_the_channels() -> None:
    from mhc_compile.lowering import coefficients

    assert coefficients.project_splits(1, 32, 4 * WIDTH, 2) == 16
    assert coefficients.project_splits(65536, 32, 4 * WIDTH, 2) == 1


def test_refusals() -> None:
    from mhc_compile.lowering import coefficients

    x, phi = torch.ones(2, 4, 8), torch.ones(24, 32)
    flat = {**CoefficientSpec().op_arguments(), "phi": phi}
    assert coefficients.refusal(flat, x, phi, backward=True) == ""
    assert "float64" in coefficients.refusal({**flat, "phi": phi.double()}, x, phi, backward=False)
    long = CoefficientSpec(sinkhorn=SinkhornSpec(steps=100)).op_arguments()
    assert "100 half steps" in coefficients.refusal(long, x, phi, backward=True)
