"""What the tests of single kernels are called with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_compile.lowering import coefficients

N, ROWS = 4, 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Operands(NamedTuple):
    """Random operands of one site of four streams, on the device if there is one."""

    x: Tensor
    """X [T, n, C] bf16; the gradient `g` of X' too."""
    g: Tensor
    y: Tensor
    """[T, C] bf16; `du` too."""
    du: Tensor
    q: Tensor
    """H_post [T, n] float32; H_pre `p` too."""
    h: Tensor
    """H_res [T, n, n] float32."""
    p: Tensor
    weight: Tensor
    """[C] bf16."""
    phi: Tensor
    """[n^2 + 2n, n C] float32."""
    bias: Tensor
    alphas: list[Tensor]
    hi: Tensor
    """phi in two bf16 addends."""
    lo: Tensor


def operands(tokens: int, width: int) -> Operands:
    """The same numbers in every call."""
    make = torch.Generator().manual_seed(0)

    def fp32(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device="cpu").to(DEVICE)

    def bf16(*shape: int) -> Tensor:
        return fp32(*shape).to(torch.bfloat16)

    x, g, y, du = bf16(tokens, N, width), bf16(tokens, N, width), bf16(tokens, width), bf16(tokens, width)
    q, h, p, weight = fp32(tokens, N), fp32(tokens, N, N), fp32(tokens, N), bf16(width)
    phi, bias, alphas = fp32(ROWS, N * width) * 0.1, fp32(ROWS), [fp32(1) for _ in range(3)]
    return Operands(x, g, y, du, q, h, p, weight, phi, bias, alphas, *coefficients.halves(phi, torch.bfloat16))
