"""post with the next site's projection compiled for sm_90. Its numbers: interpreted_few_tokens.py."""

from __future__ import annotations

from typing import Any

import pytest

from mhc_compile.ops import CoefficientSpec
from tests.lowering.hopper import BF16, FP32, TOKENS, WIDTH, Resources, compile_for_hopper, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")


def compiled(n: int, width: int, tokens: int, state: str = BF16, **changes: Any) -> Resources:
    """The kernel for `tokens` tokens; a 1 is a constant to the compiler."""
    from mhc_compile.lowering import coefficients, post_project

    spec = CoefficientSpec(streams=n)
    padded = coefficients.padded_rows(spec)
    config = post_project.config(padded)
    warps = config.pop("num_warps")
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "state_ptr"), state)
    pointers |= dict.fromkeys(("post_ptr", "res_ptr", "phi_ptr", "out_ptr"), FP32)
    constants = {"C": width, "N": n, "K": spec.rows, "KP": padded, "HAS_RES": True, "TRANSPOSE": False}
    constants |= {"TWO": state != FP32, **config, **changes}
    scalars = TOKENS
    if tokens == 1:
        scalars, constants = {}, constants | {"tokens": 1}
    return compile_for_hopper(post_project.post_project_kernel, pointers, scalars, constants, num_warps=warps)


@pytest.mark.parametrize(("n", "width", "tokens"), [(4, WIDTH, 1), (4, WIDTH, 64), (4, 2560, 8), (8, WIDTH, 64)])
def test_nothing_is_spilled(n: int, width: int, tokens: int) -> None:
    made = compiled(n, width, tokens)
    assert made.stack == 0
    assert "mma.sync" in made.ptx
    before, _, _ = made.ptx.partition("bar.sync")
    assert before.count("ld.global") == made.ptx.count("ld.global"), "all of memory is on its way before the first wait"
    assert made.registers <= 128, "256 threads: a multiprocessor holds two programs"


def test_float32() -> None:
    assert compiled(4, WIDTH, 8, FP32).stack == 0


def test_the_splits_follow_from_the_shape() -> None:
    from mhc_compile.lowering import post_project

    assert [post_project.splits_of(width, 4, 32) for width in (32, 2560, 4096, 4097)] == [4, 40, 64, 68]
    assert post_project.splits_of(4096, 8, 128) == 256
