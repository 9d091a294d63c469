"""Settings of kernels measured ahead of time: the kernels of two sites, forward and backward, without a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from mhc_compile.config import Options
from mhc_compile.ops import CoefficientSpec

from . import tune
from .base import LoweringLog
from .inductor import config_patches


def two_sites(n: int) -> Callable[..., Tensor]:
    """Two sites of a widened model, with a norm and a matrix product for a branch: what lies between them is what lies
    between all. (x [T, C], weight [C, C], norm [C], phi, bias, alpha) -> [T, C]."""
    attributes = CoefficientSpec(streams=n).op_arguments()

    def run(x: Tensor, weight: Tensor, norm: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
        state = torch.ops.mhc.expand.default(x, n)
        for _ in range(2):
            pre, post, res, _ = torch.ops.mhc.coefficients.default(state, phi, bias, alpha, alpha, alpha, **attributes)
            u, *_ = torch.ops.mhc.pre_norm.default(state, pre, norm, None, "rms", 1e-6, 0.0, True)
            state = torch.ops.mhc.post.default(state, u @ weight, post, res, False)
        out: Tensor = torch.ops.mhc.collapse.default(state, "mean")
        return out

    return run


def tune_ahead(tokens: int, width: int, streams: int = 4) -> list[str]:
    """Measure all settings of the kernels of a training step at this size, bfloat16, on the current CUDA device, and
    replace what is kept of them; some ten seconds. Returns a line a kernel."""
    spec, log = CoefficientSpec(streams=streams), LoweringLog()
    make = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=make).to(dtype).requires_grad_()

    x, weight = random(tokens, width, dtype=torch.bfloat16), random(width, width, dtype=torch.bfloat16)
    norm, phi = random(width, dtype=torch.bfloat16), random(spec.rows, streams * width)
    bias, alpha = random(spec.rows), random(1)
    with tune.session(tune.Session(log.record_setting, budget=math.inf, again=True)):
        patches: Any = config_patches(Options(streams=streams), log)
    compiled = torch.compile(two_sites(streams), fullgraph=True, dynamic=False, options=patches)
    with torch._inductor.config.patch(force_disable_caches=True):  # a graph from the cache has its settings already
        compiled(x, weight, norm, phi, bias, alpha).float().sum().backward()
    return list(log.tuned)


__all__ = ["tune_ahead", "two_sites"]
