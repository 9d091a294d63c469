"""Every kernel compiled for sm_90 without a GPU: nothing spills, and the shapes of the code are the ones intended.

In a process of its own per run, because the interpreter and the compiler cannot share one.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from mhc_compile.compat import triton_version
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

pytestmark = pytest.mark.skipif(
    not triton_version() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)

BF16, FP32 = "bf16", "fp32"
WIDTH = 4096
SPEC = CoefficientSpec()


def build(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], scalars: dict[str, str], **options: int
) -> Any:
    from tests.lowering.hopper import compile_for_hopper

    return compile_for_hopper(kernel, pointers, scalars, constants, **options)


def test_sinkhorn() -> None:
    from mhc_compile.lowering import sinkhorn

    constants = {"N": 4, "NP": 4, "TOKENS": 8, **sinkhorn.constants(SinkhornSpec())}
    forward = build(
        sinkhorn.sinkhorn_kernel,
        dict.fromkeys(("logits_ptr", "out_ptr"), FP32),
        constants,
        {"tokens": "i32"},
        num_warps=1,
    )
    assert forward.stack == 0
    assert forward.registers <= 64
    backward = build(
        sinkhorn.sinkhorn_backward_kernel, dict.fromkeys(("grad_ptr", "logits_ptr", "out_ptr"), FP32), constants,
        {"tokens": "i32"}, num_warps=1,
    )  # fmt: skip
    assert backward.stack == 0, "the divisors of all steps fit into registers"
    assert "bar.sync" not in backward.ptx


def test_post_and_pre() -> None:
    from mhc_compile.lowering import post, pre

    pointers = {"x_ptr": BF16, "y_ptr": BF16, "post_ptr": FP32, "res_ptr": FP32, "out_ptr": BF16}
    config = post.post_config(WIDTH)
    warps = config.pop("num_warps")
    made = build(
        post.post_kernel,
        pointers,
        {"C": WIDTH, "N": 4, "HAS_RES": True, "TRANSPOSE": False, **config},
        {},
        num_warps=warps,
    )
    assert made.stack == 0
    assert made.registers <= 80
    assert made.ptx.count("ld.global.v4") == 5, "X and y in 16-byte loads"
    assert made.ptx.count("st.global.v4") == 4
    dots = pre.dots_config(WIDTH)
    warps = dots.pop("num_warps")
    made = build(
        pre.pre_dots_kernel, {"grad_ptr": BF16, "x_ptr": BF16, "out_ptr": FP32}, {"C": WIDTH, "N": 4, **dots}, {},
        num_warps=warps,
    )  # fmt: skip
    assert made.stack == 0
    pointers = {
        "grad_ptr": BF16,
        "x_ptr": BF16,
        "y_ptr": BF16,
        "post_ptr": FP32,
        "dy_ptr": BF16,
        "d_post_ptr": FP32,
        "d_res_ptr": FP32,
    }
    constants = {"C": WIDTH, "N": 4, "TRANSPOSE": False, "NEED_Y": True, "NEED_RES": True, **dots}
    assert build(post.post_dots_kernel, pointers, constants, {}, num_warps=warps).stack == 0


def test_project_feeds_the_tensor_core_from_memory() -> None:
    from mhc_compile.lowering import coefficients

    config = coefficients.project_config(8192, 32, 4 * WIDTH, 2, 2)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    made = build(
        coefficients.project_kernel, {"x_ptr": BF16, "hi_ptr": BF16, "lo_ptr": BF16, "out_ptr": FP32},
    flags = dict.fromkeys(("HAS_PRE", "HAS_POST", "HAS_RES", "TWO"), True)
    constants = {"TOTAL": 4 * WIDTH, "WIDTH": 64, "TOKENS": 8, **flags}
    )  # fmt: skip
    assert made.stack == 0
    assert "wgmma.mma_async" in made.ptx
    assert "cp.async" in made.ptx


def test_activate_and_its_backward() -> None:
    from mhc_compile.lowering import coefficients, coefficients_backward

    activation = coefficients.activation_constants(SPEC)
    names = ("partial", "bias", "alpha_pre", "alpha_post", "alpha_res", "pre", "post", "res", "projection")
    made = build(
        coefficients.activate_kernel, {f"{name}_ptr": FP32 for name in names},
        {"TOTAL": 4 * WIDTH, "SPLITS": 2, "TOKENS": 8, **activation}, {"tokens": "i32"}, num_warps=1,
    )  # fmt: skip
    assert made.stack == 0
    assert made.registers <= 80
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
    )
    constants = {
        "TOTAL": 4 * WIDTH,
        "HAS_PRE": True,
        "HAS_POST": True,
        "HAS_RES": True,
        "TWO": True,
        "WIDTH": 64,
        "TOKENS": 8,
    }
    made = build(
        coefficients_backward.logits_backward_kernel, {f"{name}_ptr": FP32 for name in names} | {"dm_ptr": BF16},
        constants | activation, {"tokens": "i32"}, num_warps=1,
    )  # fmt: skip
    assert made.stack == 0


def test_stream_gradient_stays_out_of_shared_memory() -> None:
    from mhc_compile.lowering import boundary

    config = boundary.streams_config(8192, WIDTH, 2)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    pointers = dict.fromkeys(("x_ptr", "grad_ptr", "du_ptr", "dm_ptr", "phi_ptr", "out_ptr"), BF16)
    pointers |= dict.fromkeys(("res_ptr", "pre_ptr", "multiple_ptr"), FP32)
    constants = {"C": WIDTH, "N": 4, "KP": 32, "WIDTH": 64, "WARPS": warps, **config}
    constants |= dict.fromkeys(("POST", "HAS_RES", "PRE", "COEFFICIENTS", "TWO"), True) | {"TRANSPOSE": False}
    made = build(
        boundary.streams_backward_kernel, pointers, constants, {"tokens": "i32"}, num_warps=warps, num_stages=stages
    )
    assert made.stack == 0
    assert "ld.shared" not in made.ptx, "the tensor core's layout is the one of the loads: see `dealt`"
    assert "shfl" not in made.ptx
