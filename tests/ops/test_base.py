"""Compute dtype and freedom from autocast."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.ops.base import check_streams, compute_dtype, keep, unneeded, without_autocast


def test_compute_dtype() -> None:
    half, double = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)
    assert compute_dtype(half, None) == torch.float32
    assert compute_dtype(half, double) == torch.float64
    with pytest.raises(TypeError, match="int64"):
        compute_dtype(torch.ones(1, dtype=torch.int64))


def test_without_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert without_autocast(torch.matmul)(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_helpers() -> None:
    assert check_streams(torch.ones(2, 4, 3)) == (4, 3)
    with pytest.raises(ValueError, match="stream state"):
        check_streams(torch.ones(3))
    assert unneeded(torch.ones(3)).shape == (0,)
    assert keep(False, torch.ones(1)) is None
