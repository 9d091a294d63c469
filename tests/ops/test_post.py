"""post: orientation of H_res, identity, promotion."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.ops import post


@pytest.mark.parametrize("transpose", [False, True])
def test_orientation(transpose: bool) -> None:
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    q, h = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    matrix = h.transpose(-1, -2) if transpose else h
    torch.testing.assert_close(post(x, y, q, h, transpose), matrix @ x + q.unsqueeze(-1) * y.unsqueeze(-2))


def test_identity_and_gradients() -> None:
    x, y, q = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((3, 4, 5), (3, 5), (3, 4)))
    assert torch.autograd.gradcheck(lambda *a: post(*a, None), (x, y, q))
    torch.library.opcheck(torch.ops.mhc.post.default, (x, y, q, None))


def test_result_is_promoted() -> None:
    x, y = torch.randn(3, 4, 5, dtype=torch.bfloat16), torch.randn(3, 5)
    assert post(x, y, torch.ones(3, 4), None).dtype == torch.float32


def test_equal_streams_stay_equal_when_rows_sum_to_one() -> None:
    x = torch.randn(3, 1, 5).expand(3, 4, 5)
    h = torch.rand(3, 4, 4).softmax(-1)
    out = post(x, torch.randn(3, 5), torch.ones(3, 4), h)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
