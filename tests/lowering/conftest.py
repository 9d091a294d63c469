"""What the tests of kernels ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor holds NaN, so that an element nobody writes is seen. Not for what is compiled on a
    device: deterministic mode stops tuning. It only warns, since cuBLAS has a wish of its own for it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
