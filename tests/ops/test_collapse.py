"""collapse undoes expand, and refuses an unknown kind."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.ops import collapse, expand


def test_mean_undoes_expand() -> None:
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(collapse(expand(x, 4), "mean"), x)
    torch.testing.assert_close(collapse(expand(x, 4), "sum"), 4 * x)


def test_unknown_kind() -> None:
    with pytest.raises((ValueError, RuntimeError), match="kind"):
        collapse(torch.ones(2, 4, 5), "max")
