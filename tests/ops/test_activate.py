"""activate: the coefficients from their projection, the same bits as the op that makes both."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_compile import ops
from mhc_compile.ops import CoefficientSpec, SinkhornSpec
from tests.ops.test_ops import opcheck

LAYOUTS = ("pre,post,res", "pre,res,post", "pre", "pre,post")


def call(
    spec: CoefficientSpec, lead: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """(what `coefficients` gives, the arguments of `activate` for its projection)."""
    make = torch.Generator().manual_seed(7)
    shapes = ((*lead, spec.streams, 6), (spec.rows, 6 * spec.streams), (spec.rows,), (), (1,), ())
    x, phi, *small = (torch.randn(shape, dtype=dtype, generator=make) for shape in shapes)
    flat = tuple(spec.op_arguments().values())
    whole = ops.coefficients(x, phi, *small, *flat)
    return whole, (whole[3], *small, *flat)


@pytest.mark.parametrize(("layout", "norm"), list(itertools.product(LAYOUTS, ("rms", "rms_outside", "none"))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_coefficients(layout: str, norm: str, dtype: torch.dtype) -> None:
    for n, gate in ((4, "sigmoid"), (3, "linear"), (1, "sigmoid")):
        for res in ("sinkhorn", "linear") if "res" in layout else ("none",):
            sinkhorn = SinkhornSpec(steps=7) if res == "sinkhorn" else None
            spec = CoefficientSpec(layout, n, norm, gate=gate, res=res, sinkhorn=sinkhorn)  # type: ignore[arg-type]  # literals
            whole, arguments = call(spec, dtype=dtype)
            again = ops.activate(*arguments)
            assert [value.shape for value in again] == [value.shape for value in whole[:3]]
            assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=False))


def test_native_is_the_second_half_of_coefficients() -> None:
    spec = CoefficientSpec(sinkhorn=SinkhornSpec(steps=6), pre_eps=1e-3, post_scale=1.5)
    whole, arguments = call(spec, dtype=torch.float64)
    for got, want in zip(ops.activate.native(*arguments), whole, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lead", [(2, 3), (1,), (0,), ()])
@pytest.mark.parametrize("mix", [None, torch.bfloat16])
def test_opcheck(lead: tuple[int, ...], mix: torch.dtype | None) -> None:
    whole, arguments = call(CoefficientSpec(sinkhorn=SinkhornSpec(steps=4), mix_dtype=mix), lead)
    opcheck(ops.activate.overload, arguments, {})
    again = ops.activate(*arguments)
    assert [value.dtype for value in again] == [value.dtype for value in whole[:3]]
    pointers = {value.untyped_storage().data_ptr() for value in arguments if isinstance(value, Tensor)}
    assert all(not value.numel() or value.untyped_storage().data_ptr() not in pointers for value in again)
    assert all(value.is_contiguous() for value in again)


def test_autocast_changes_nothing() -> None:
    _, arguments = call(CoefficientSpec(sinkhorn=SinkhornSpec(steps=4)))
    expected = ops.activate(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(ops.activate(*arguments), expected, strict=True))


def test_shapes_that_do_not_fit_are_refused() -> None:
    _, (projection, bias, *rest) = call(CoefficientSpec(sinkhorn=SinkhornSpec(steps=4)))
    with pytest.raises(ValueError, match="24"):
        ops.activate.native(projection[..., 1:], bias, *rest)
    with pytest.raises(ValueError, match="bias"):
        ops.activate.native(projection, bias[1:], *rest)
    with pytest.raises(ValueError, match="alpha_res"):
        ops.activate.native(projection, bias, *rest[:2], None, *rest[3:])


def test_it_is_not_part_of_what_a_model_may_hold() -> None:
    assert set(ops.INNER_OPS) == {"activate"}
    assert not set(ops.INNER_OPS) & set(ops.OPS)
    assert ops.activate.overload is torch.ops.mhc.activate.default
