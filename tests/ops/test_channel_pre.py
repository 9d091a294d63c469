"""channel_pre is a weighted sum of the streams with a weight for every channel, of low rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.ops import channel_pre


def test_it_is_its_formula() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    down, up = torch.randn(6, 20, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    gate = torch.sigmoid(F.linear(F.silu(F.linear(x.flatten(-2), down) / 3), up)).unflatten(-1, (4, 5))
    u, hidden = channel_pre(x, down, up, 1 / 3, 0.25)
    torch.testing.assert_close(u, (gate * x).mean(-2))
    torch.testing.assert_close(hidden, F.linear(x.flatten(-2), down) / 3)
    assert not hidden.requires_grad


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_each_gradient_without_the_others(frozen: tuple[int, ...]) -> None:
    shapes = [(3, 2, 4), (5, 8), (8, 5)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index not in frozen)
    assert torch.autograd.gradcheck(lambda *own: channel_pre(*own, 0.5, 1.0)[0], tensors)


def test_the_products_are_taken_in_the_dtype_of_the_model() -> None:
    x, down, up = torch.randn(7, 4, 16), torch.randn(8, 64), torch.randn(64, 8)
    low = [tensor.bfloat16() for tensor in (x, down, up)]
    exact = channel_pre(*(tensor.double() for tensor in low), 0.1, 1.0)[0]
    u, hidden = channel_pre(*low, 0.1, 1.0)
    assert (u.dtype, hidden.dtype) == (torch.bfloat16, torch.float32)
    assert (u.double() - exact).norm() <= 0.01 * exact.norm()
    assert torch.equal(channel_pre(low[0], down, up, 0.1, 1.0)[1], channel_pre(low[0].float(), down, up, 0.1, 1.0)[1])


@pytest.mark.parametrize(("down", "up", "reason"), [((8, 63), (64, 8), "down must be"), ((8, 64), (8, 64), "up must")])
def test_weights_of_another_shape(down: tuple[int, int], up: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        channel_pre(torch.randn(2, 4, 16), torch.randn(down), torch.randn(up), 1.0, 1.0)
