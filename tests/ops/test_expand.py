"""expand and its refusal."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.ops import expand


def test_copies() -> None:
    x = torch.randn(2, 3, 5)
    state = expand(x, 4)
    assert state.shape == (2, 3, 4, 5)
    assert all(torch.equal(state[..., i, :], x) for i in range(4))
    state.zero_()
    assert x.any()


def test_no_streams() -> None:
    with pytest.raises(ValueError, match="streams"):
        expand.native(torch.ones(3), 0)
