"""stream_norm is the RMS norm of each stream on its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.ops import stream_norm


def test_it_is_torchs_rms_norm_of_each_stream() -> None:
    x, w = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    want = torch.stack([F.rms_norm(x[..., i, :], (5,), 0.5 + w[i], 1e-3) for i in range(4)], -2)
    torch.testing.assert_close(stream_norm(x, w, 0.5, 1e-3), want)


def test_without_a_weight() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(stream_norm(x, None, 0.0, 1e-3), F.rms_norm(x, (5,), None, 1e-3))
    assert torch.autograd.gradcheck(lambda own: stream_norm(own, None, 0.0, 1e-3), x)
    torch.library.opcheck(stream_norm.overload, (x, None, 0.0, 1e-3))


def test_a_stream_of_zeros_is_finite() -> None:
    x = torch.zeros(1, 2, 3, requires_grad=True)
    stream_norm(x, None, 0.0, 1e-6).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_weight_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"must be \[4, 5\], got \(5,\)"):
        stream_norm(torch.randn(2, 4, 5), torch.randn(5), 0.0, 1e-6)
