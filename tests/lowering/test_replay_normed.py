"""A block of sites with their branch inputs, compiled for sm_90: registers, and what gives it the bits of a kernel a
site. Where it is taken: test_replay_runs.py. Numbers: interpreted_cases.py."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch

from mhc_compile.compat import triton_version
from tests.lowering.hopper import BF16, FP16, FP32, Resources, compile_for_hopper, compiler_missing

compiles = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")
ITEMS = {BF16: torch.bfloat16, FP16: torch.float16, FP32: torch.float32}
BITS = ("FFMA", "FMUL", "FADD", "MUFU", "SHFL")
"""Instructions that decide about bits: what is fused with what, and the sums over threads."""


def compiled(kernel: Any, width: int, dtype: str, layer: bool, constants: dict[str, Any]) -> Resources:
    """A kernel of one token a program, for four streams unless `constants` says otherwise."""
    from mhc_compile.lowering import pre_norm

    setting = pre_norm.config(width)
    warps = setting.pop("num_warps")
    norm = {"KEEP": False, "LAYER": layer, "EPS": 1e-6, "OFFSET": 0.0, "ROUND": True, "WEIGHT": True, "BIAS": layer}
    every = {"C": width, "N": 4, "HAS_RES": True, "TRANSPOSE": False, **norm, **setting, **constants}
    every = {name: value for name, value in every.items() if name in kernel.arg_names}
    pointers = {
        name: FP32 if re.match(r"(q|h|p|statistics)\d$|(post|res|pre|statistics)_ptr$", name) else dtype
        for name in kernel.arg_names
        if name not in every
    }
    return compile_for_hopper(kernel, pointers, {}, every, num_warps=warps)


def replayed(width: int, dtype: str = BF16, sites: int = 4, layer: bool = False, **constants: Any) -> Resources:
    from mhc_compile.lowering import replay_normed

    every = {"SITES": sites, "NORMED": 2**sites - 1, "WRITTEN": 2**sites - 1, **constants}
    return compiled(replay_normed.replay_normed_kernel, width, dtype, layer, every)


@compiles
@pytest.mark.parametrize("width", [2560, 4096])
@pytest.mark.parametrize("layer", [False, True])
def test_two_programs_of_eight_warps_share_a_multiprocessor(width: int, layer: bool) -> None:
    made = replayed(width, layer=layer, KEEP=layer)
    assert (made.stack, made.registers <= 128) == (0, True)
    blocks = 5 if width == 2560 else 4
    assert made.ptx.count("ld.global.v2") >= blocks * (4 + 4), "the streams once, each branch once"
    assert made.ptx.count("st.global.v2") == blocks * 4 * (4 + 1 + layer), "each state once, each normed input once"


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(("width", "n", "dtype"), [
    *((width, 4, dtype) for width in (1024, 2560) for dtype in (BF16, FP16, FP32)), (3072, 4, BF16), (5120, 4, BF16),
    (4096, 4, FP16), *((4096, n, dtype) for n in (2, 3) for dtype in (BF16, FP32)), (2560, 1, BF16), (1000, 4, BF16),
    (64, 8, BF16),
])  # fmt: skip
def test_what_is_taken_spills_nothing(width: int, n: int, dtype: str) -> None:
    from mhc_compile.lowering import pre_norm, replay_normed

    assert replay_normed.refusal(torch.empty(1, n, width, dtype=ITEMS[dtype])) == ""
    made = replayed(width, dtype, N=n)
    warps = pre_norm.config(width)["num_warps"]
    programs = 65536 // (made.registers * 32 * warps)
    assert (made.stack, programs >= (3 if warps <= 4 else 2)) == (0, True), made.registers


@pytest.mark.skipif(not triton_version(), reason="Triton is not installed")
@pytest.mark.parametrize(("n", "width", "dtype", "taken"), [
    (4, 2560, BF16, True), (4, 4096, FP16, True), (4, 5120, BF16, True), (4, 5120, FP16, False),
    (4, 8192, BF16, False), (4, 2560, FP32, True), (4, 4096, FP32, False), (8, 1024, BF16, False),
    (1, 8192, BF16, False), (5, 64, BF16, False),
])  # fmt: skip
def test_what_is_taken(n: int, width: int, dtype: str, taken: bool) -> None:
    from mhc_compile.lowering import replay_normed

    reason = replay_normed.refusal(torch.empty(1, n, width, dtype=ITEMS[dtype]))
    assert (reason == "") == taken, reason
    assert taken or f"{n} streams" in reason


@compiles
def test_a_state_that_is_not_wanted_is_not_stored() -> None:
    whole, some = (replayed(2560, sites=2, WRITTEN=bits).ptx.count("st.global.v2") for bits in (3, 2))
    assert whole - some == 5 * 4


@functools.cache
def three(width: int, dtype: str, layer: bool) -> list[Resources]:
    """`pre_norm`, `post_pre_norm`, and two sites of `replay_normed`."""
    from mhc_compile.lowering import post_pre_norm, pre_norm

    kernels = (pre_norm.pre_norm_kernel, post_pre_norm.post_pre_norm_kernel)
    alone = [compiled(kernel, width, dtype, layer, {}) for kernel in kernels]
    return [*alone, replayed(width, dtype, 2, layer)]


def reductions(made: Resources) -> set[str]:
    """The layouts of what is summed over the threads of a program."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", made.ttgir, re.MULTILINE))
    summed = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<[^,]*, (#\w+)>', made.ttgir, re.DOTALL)
    assert summed
    return {layouts[name] for name in summed}


@compiles
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(2560, BF16), (4096, BF16), (4096, FP16), (1000, FP32), (4095, BF16)])
def test_the_bits_of_a_kernel_a_site(width: int, dtype: str, layer: bool) -> None:
    """The row is dealt out to the threads alike before it is summed, and each site multiplies, adds and fuses as often
    as the kernel that made the state and the norm in the forward, or remakes them alone."""
    norm, one, two = three(width, dtype, layer)
    assert reductions(norm) == reductions(one) == reductions(two)
    counts = [[made.instructions()[name] for name in BITS] for made in (one, two)]
    assert counts[1] == [2 * count for count in counts[0]]
