"""From partial sums to the normed branch input compiled for sm_90. Its numbers: interpreted_few_tokens.py."""

from __future__ import annotations

from typing import Any

import pytest

from mhc_compile.ops import CoefficientSpec
from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, Resources, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


def compiled(width: int, n: int = 4, tokens: int = 64, known: bool = False, **changes: Any) -> Resources:
    """The kernel in inference; `known`: the gate of the mix is given."""
    from mhc_compile.lowering import activate_pre_norm, coefficients, post_project

    spec = CoefficientSpec(streams=n)
    config = activate_pre_norm.config(width)
    warps = config.pop("num_warps")
    splits = post_project.splits_of(width, n, coefficients.padded_rows(spec))
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "norm_bias_ptr", "out_ptr"), BF16)
    names = ("partial", "bias", "alpha_pre", "alpha_post", "alpha_res", "given", "pre", "post", "res", "projection")
    pointers |= {f"{name}_ptr": FP32 for name in (*names, "statistics")}
    constants = {"TOTAL": n * width, "SPLITS": splits, "SP": 1 << (splits - 1).bit_length(), "C": width, "ROLES": 2}
    constants |= {"GIVEN": known, "STORE_PRE": known, "PROJECTION": False, "NORMED": True, "LAYER": False}
    constants |= {"BRANCH_EPS": 1e-6, "OFFSET": 0.0, "ROUND": True, "WEIGHT": True, "BIAS": False}
    constants |= {"EARLY": activate_pre_norm.early(n, width, warps), **config}
    constants |= coefficients.activation_constants(spec) | changes
    scalars = TOKENS
    if tokens == 1:
        scalars, constants = {}, constants | {"tokens": 1}
    kernel = activate_pre_norm.activate_pre_norm_kernel
    return compile_for_hopper(kernel, pointers, scalars, constants, num_warps=warps)


@pytest.mark.parametrize(("width", "n", "tokens"), [(WIDTH, 4, 1), (WIDTH, 4, 64), (2560, 4, 8), (WIDTH, 8, 8)])
@pytest.mark.parametrize("known", [False, True])
def test_nothing_is_spilled(width: int, n: int, tokens: int, known: bool) -> None:
    made = compiled(width, n, tokens, known)
    assert (made.stack, made.registers <= 128) == (0, True)


@pytest.mark.parametrize("changes", [{"NORMED": False}, {"RES": -1, "ROLES": 2}, {"POST": -1, "RES": -1, "ROLES": 1}])
def test_variants_compile(changes: dict[str, Any]) -> None:
    """Without a norm, without res, and a layout of pre alone."""
    assert compiled(WIDTH, **changes).stack == 0
