"""pre is the weighted sum of the streams."""

from __future__ import annotations

import torch

from mhc_compile.ops import pre


def test_weighted_sum() -> None:
    x, h = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(pre(x, h), torch.einsum("btnc,btn->btc", x, h))
