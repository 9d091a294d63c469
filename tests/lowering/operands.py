"""What the tests of single kernels are called with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_compile.lowering import coefficients
from mhc_compile.ops import CoefficientSpec

N = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Operands(NamedTuple):
    """Random operands of one site; the streams and what is as wide are of one dtype, the coefficients float32."""

    x: Tensor
    """X [T, n, C]; the gradient `g` of X' too."""
    g: Tensor
    y: Tensor
    """[T, C]; `du` too."""
    du: Tensor
    q: Tensor
    """H_post [T, n]; H_pre `p` too."""
    h: Tensor
    """H_res [T, n, n]."""
    p: Tensor
    weight: Tensor
    """[C] in the dtype of the streams."""
    phi: Tensor
    """[n^2 + 2n, n C]."""
    bias: Tensor
    alphas: list[Tensor]
    hi: Tensor
    """phi in two addends of the streams' dtype; float32 is one."""
    lo: Tensor | None


def operands(
    tokens: Any, width: int, n: int = N, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE
) -> Operands:
    """The same numbers in every call."""
    make, rows = torch.Generator("cpu").manual_seed(0), CoefficientSpec(streams=n).rows

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, device="cpu").normal_(generator=make).to(device)  # randn takes no symbol

    def narrow(*shape: int) -> Tensor:
        return fp32(*shape).to(dtype)

    x, g, y, du = narrow(tokens, n, width), narrow(tokens, n, width), narrow(tokens, width), narrow(tokens, width)
    q, h, p, weight = fp32(tokens, n), fp32(tokens, n, n), fp32(tokens, n), narrow(width)
    phi, bias, alphas = fp32(rows, n * width) * 0.1, fp32(rows), [fp32(1) for _ in range(3)]
    parts = (phi, None) if dtype == torch.float32 else coefficients.halves(phi, dtype)
    return Operands(x, g, y, du, q, h, p, weight, phi, bias, alphas, *parts)


def partials(given: Operands) -> tuple[Tensor, list[Any]]:
    """(partial projections [S, T, KP] of the streams, the default spec's attributes as ops take them)."""
    spec = CoefficientSpec(streams=given.x.shape[1])
    return coefficients.partials(given.x, given.phi, spec), list(spec.op_arguments().values())
