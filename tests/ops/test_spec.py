"""Attributes: validated, hashable, and the same again after their flat form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhc_compile.ops import CoefficientSpec, SinkhornSpec


@pytest.mark.parametrize(
    "spec",
    [
        SinkhornSpec(),
        SinkhornSpec("exp", 0.0, "row", 7, 1e-6, "clamp"),
        SinkhornSpec("log", 0.0, "column", 40, 0.0, "add"),
    ],
)
def test_sinkhorn_round_trip(spec: SinkhornSpec) -> None:
    assert SinkhornSpec.from_op_arguments(spec.op_arguments()) == spec
    assert len({spec, SinkhornSpec.from_op_arguments(spec.op_arguments())}) == 1


@pytest.mark.parametrize(
    "spec",
    [
        CoefficientSpec(),
        CoefficientSpec("pre,res,post", 2, mix_dtype=torch.bfloat16, norm="rms_outside"),
        CoefficientSpec("pre", 4, res="none", sinkhorn=None, gate="linear"),
        CoefficientSpec("pre,post,res", 4, res="linear", sinkhorn=None),
    ],
)
def test_coefficient_round_trip(spec: CoefficientSpec) -> None:
    assert CoefficientSpec.from_op_arguments(spec.op_arguments()) == spec
    assert hash(CoefficientSpec.from_op_arguments(spec.op_arguments())) == hash(spec)


def test_offsets_follow_the_layout() -> None:
    spec = CoefficientSpec("pre,res,post", 4)
    assert (spec.rows, spec.offset("pre"), spec.offset("res"), spec.offset("post")) == (24, 0, 4, 20)
    with pytest.raises(KeyError):
        CoefficientSpec("pre", 4, res="none", sinkhorn=None).offset("post")


@pytest.mark.parametrize(
    ("first", "steps", "last"), [("row", 1, "row"), ("row", 2, "column"), ("column", 40, "row"), ("row", 0, None)]
)
def test_last_axis(first: Any, steps: int, last: str | None) -> None:
    assert SinkhornSpec(first=first, steps=steps).last == last


@pytest.mark.parametrize(
    "arguments",
    [
        {"positivity": "relu"},
        {"first": "rows"},
        {"steps": -1},
        {"eps": -1.0},
        {"eps_mode": "max"},
        {"positivity": "log", "positive_eps": 0.0, "eps": 1e-6},
    ],
)
def test_sinkhorn_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SinkhornSpec(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layout": ""},
        {"layout": "pre,pre"},
        {"layout": "pre,mix"},
        {"layout": "pre,post"},
        {"streams": 0},
        {"res": "none"},
        {"res": "linear"},
        {"norm": "layer"},
        {"gate": "tanh"},
        {"mix_dtype": torch.int32},
    ],
)
def test_coefficients_refuse(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        CoefficientSpec(**arguments)
