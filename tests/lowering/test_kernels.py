"""Which node a kernel takes."""

from __future__ import annotations

import torch

from mhc_compile.lowering import kernels


def test_platforms() -> None:
    assert "cpu" in kernels.platform_refusal(torch.device("cpu")) or kernels.interpreted()
    assert kernels.platform_refusal(torch.device("meta"))
    assert kernels.platform_refusal(None)


def test_copies_are_left_to_inductor() -> None:
    assert "inductor" in kernels.refusal("expand", {})
    assert "inductor" in kernels.refusal("collapse_backward", {})
