"""Coefficients made again from the kept projection are bit for bit those of ``activate``: under Triton's interpreter,
in a process of its own, and by what the compiler for sm_90 makes of the two kernels."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mhc_compile.compat import triton_version
from tests.lowering.hopper import compiler_missing
from tests.lowering.interpreter import interpreted

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

CASES = """
import itertools, torch
from mhc_compile import ops
from mhc_compile.lowering import coefficients
from mhc_compile.lowering.activate_again import activate_again, forward
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

def check(spec, splits=2, tokens=11):
    torch.manual_seed(0)
    flat, n = tuple(spec.op_arguments().values()), spec.streams
    partial = torch.randn(splits, tokens, coefficients.padded_rows(spec)).abs()
    small = torch.randn(spec.rows), *(torch.randn(1) for _ in range(3))
    *whole, projection = coefficients.activate(partial, *small, n * 16, *flat)
    again = activate_again(projection, *small, *flat)
    for a, b in zip(again, whole, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.isfinite(a).all()
        assert torch.equal(a, b), spec
    exact = ops.activate.native(projection.double(), *(value.double() for value in small), *flat)
    narrow = spec.mix_dtype is not None
    for index, (a, b) in enumerate(zip(again, exact, strict=True)):
        bound = 1e-2 if narrow and index else 2e-6
        assert float((a.double() - b.double()).norm()) <= bound * float(b.double().norm() + 1e-12), (spec, index)
    lead = forward(projection.reshape(1, tokens, -1), *small, *flat)
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(lead, again, strict=True))
    assert lead[2].shape[:2] == (1, tokens)

layouts = ("pre,post,res", "pre,res,post", "pre,post", "pre")
for n, layout, norm in itertools.product((4, 3), layouts, ("rms", "none", "rms_outside")):
    for res in ("sinkhorn", "linear") if "res" in layout else ("none",):
        sinkhorn = SinkhornSpec(steps=5) if res == "sinkhorn" else None
        check(CoefficientSpec(layout, n, norm, pre_eps=0.01, pre_scale=1.5, res=res, sinkhorn=sinkhorn))
for positivity, first in itertools.product(("softmax", "exp", "exp_rowmax", "log", "abs"), ("row", "column")):
    eps = 0.0 if positivity == "log" else 1e-6
    check(CoefficientSpec(sinkhorn=SinkhornSpec(positivity, eps, first, 6)))
for n, mix in itertools.product((1, 2, 8), (None, torch.bfloat16, torch.float16)):
    check(CoefficientSpec(streams=n, mix_dtype=mix), splits=1)
check(CoefficientSpec(gate="linear"), tokens=1)
spec = CoefficientSpec()
empty = activate_again(torch.empty(0, 25), torch.randn(24), *[torch.randn(1)] * 3, *spec.op_arguments().values())
assert [tuple(value.shape) for value in empty] == [(0, 4), (0, 4), (0, 4, 4)]
print("same bits")
"""


def test_same_bits_as_activate() -> None:
    assert "same bits" in interpreted(CASES)


def test_float64_has_no_kernel() -> None:
    import torch

    from mhc_compile.lowering.activate_again import refusal
    from mhc_compile.ops import CoefficientSpec

    attributes = CoefficientSpec().op_arguments()
    assert not refusal({"projection": torch.empty(3, 25), **attributes})
    assert "float64" in refusal({"projection": torch.empty(3, 25).double(), **attributes})
    assert "5 streams" in refusal({"projection": torch.empty(3, 36), **attributes, "streams": 5})


# ------------------------------------------------------------------------------------------------ on a device
def compiled(kernel: Any, constants: dict[str, Any]) -> Any:
    """A kernel of float32 tensors for sm_90, one warp."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = list(kernel.arg_names)
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in order} | dict.fromkeys(
        constants, "constexpr"
    )
    aligned = {(order.index(name),): [["tt.divisibility", 16]] for name in order if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})


def reductions(code: str) -> list[tuple[str, str]]:
    """(axis, type with its layout spelled out) of every reduction: the order in which a sum is added up."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", code, re.MULTILINE))
    found = re.findall(r'"tt\.reduce"\(.*?\) <\{axis = (\d) : i32\}>.*?\}\) : \((tensor<.*?>)\) ->', code, re.DOTALL)
    return [(axis, re.sub(r"#\w+", lambda name: layouts[name[0]], kind)) for axis, kind in found]


def arithmetic(ptx: str) -> dict[str, int]:
    """How many of each float32 instruction and of the exchanges between lanes that sums are made of."""
    names = re.findall(r"^\s+((?:add|sub|mul|fma|div|ex2|lg2|max|rcp|shfl)\.[\w.]+) ", ptx, re.MULTILINE)
    counted = [name for name in names if "f32" in name or "bfly" in name]  # the rest moves numbers
    return {name: counted.count(name) for name in set(counted)}


@pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("positivity", ["softmax", "log"])
def test_the_compiler_makes_the_same_of_both(n: int, positivity: str) -> None:
    """Sums are added up in the same layout, and without the norm (which the one computes and the other reads) the
    instructions are the same: a product that is fused with a sum in one kernel is in the other."""
    from mhc_compile.lowering import activate_again, coefficients, sinkhorn
    from mhc_compile.ops import CoefficientSpec, SinkhornSpec

    tokens = sinkhorn.tokens_a_program(n)
    spec = SinkhornSpec(positivity, 0.0 if positivity == "log" else 1e-6)  # type: ignore[arg-type]  # literals
    for norm in ("rms", "none"):
        constants = coefficients.activation_constants(
            CoefficientSpec(streams=n, norm=norm, sinkhorn=spec)  # type: ignore[arg-type]  # literals
        )
        less = {name: value for name, value in constants.items() if name not in activate_again._PROJECTED}
        whole = compiled(coefficients.activate_kernel, {**constants, "TOTAL": 256, "SPLITS": 1, "TOKENS": tokens})
        again = compiled(activate_again.activate_again_kernel, {**less, "TOKENS": tokens})
        assert reductions(again.asm["ttgir"]) == reductions(whole.asm["ttgir"])
        assert len(reductions(again.asm["ttgir"])) >= 4
        if norm == "none":
            assert arithmetic(again.asm["ptx"]) == arithmetic(whole.asm["ptx"])
            assert arithmetic(again.asm["ptx"])["fma.rn.f32"] > 0
