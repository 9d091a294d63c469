"""A converted model as MLIR: print what comes out, run it through IREE (or the wheel's engine), compare with PyTorch.

    python examples/mlir.py [out.mlir]

Needs ``pip install 'mhc-compile[mlir]'``.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.lowering.mlir import compile_mlir, to_mlir


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def main(path: str | None = None) -> float:
    """Largest difference between the MLIR and the eager graph, relative to the largest output."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(64) for _ in range(3))).eval()
    tokens = torch.randn(1, 16, 64)

    # The model with its hyper-connections as one graph; the number of tokens may vary.
    graph = mhc_compile.standalone(model, tokens, dynamic={0: 1}, init="paper")

    start = time.perf_counter()
    lowered = to_mlir(graph, tokens)
    text = lowered.text(large_elements=8)
    print(f"lowered in {time.perf_counter() - start:.2f} s: {text.count('linalg.generic')} linalg.generic")
    print(next(line for line in text.splitlines() if "func.func @main" in line).strip())
    if path:
        lowered.save(path)
        print(f"written to {path}; iree-compile --iree-hal-target-backends=... makes it run elsewhere")

    start = time.perf_counter()
    compiled = compile_mlir(graph, tokens)
    print(f"compiled by {compiled.engine} in {time.perf_counter() - start:.2f} s")
    worst = 0.0
    for length in (16, 5):
        x = torch.randn(1, length, 64)
        with torch.no_grad():
            (want,) = graph(x)
        (have,) = compiled(x)
        worst = max(worst, float((have - want).abs().max() / want.abs().max()))
        print(f"{length:3} tokens: {tuple(have.shape)}, relative difference {worst:.1e}")
    return worst


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]) > 1e-5)
