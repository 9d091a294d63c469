"""Sites by other people's kernels, and chains of them: Liger and TileKernels, from their wheels.

Both compute DeepSeek-V4's semantics. What cannot be had is a sentence ("not measured: ...") in place of a site.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.chain import EPS, STREAMS, Branch, Chain, Parameters, SiteFunction, chained, rms_norm


def liger_site() -> SiteFunction | str:
    """Liger's mHC functions around a branch."""
    try:
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        return f"not measured: {error}"

    def run(x: Tensor, site: Parameters, branch: Branch) -> Tensor:
        phi, bias, a, b, c = site
        pre, post, res = functional.liger_mhc_coeffs(
            x,
            phi.t(),
            bias,
            a.reshape(()),
            b.reshape(()),
            c.reshape(()),
            allow_fp32=False,
            tmax=20,
            rms_eps=EPS,
            pre_eps=EPS,
            sinkhorn_eps=EPS,
            post_mult=2.0,
        )
        return functional.liger_mhc_post_res(x, branch(functional.liger_mhc_pre(x, pre)), post, res)

    return run


def liger_chain() -> Chain | str:
    """Liger's mHC functions and its RMSNorm."""
    site = liger_site()
    if isinstance(site, str):
        return site
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return chained(site, lambda u, weight: functional.liger_rms_norm(u, weight, EPS))


def tile_kernels_site() -> SiteFunction | str:
    """DeepSeek's TileKernels 1.0 (`tile-kernels==1.0.0` with `tilelang`) around a branch, by its autograd functions.

    Its ``mhc_pre`` and ``mhc_post`` are what its users call: projection in tf32, split, Sinkhorn and mix are kernels of
    their own; in the backward all three users of the streams add into the gradient that ``mhc_post`` began. It mixes
    the streams by the transpose of the projected matrix (see ``chain.spelled_transposed``), at the same cost.

    Version 2 has neither autograd functions nor a projection for mHC (that product has moved to DeepGEMM, which is no
    wheel on PyPI): there is no site to measure without writing half of it here.
    """
    try:
        functional = import_tile_kernels("tile_kernels.modeling.mhc.functional")
        post = import_tile_kernels("tile_kernels.modeling.mhc.ops")
    except Exception as error:  # a library that is built for another CUDA, or no compiler for it: a row of the table
        return f"not measured: {_version_two() or f'{type(error).__name__}: {error}'}"
    return tile_kernels_functions(functional.mhc_pre, post.mhc_post)


def tile_kernels_chain() -> Chain | str:
    """TileKernels has no kernel for the branch's norm: inductor's is taken, the fastest there is in torch."""
    site = tile_kernels_site()
    if isinstance(site, str):
        return site
    norm: Any = torch.compile(rms_norm, fullgraph=True, dynamic=False)
    return chained(site, norm)


def tile_kernels_functions(mhc_pre: Callable[..., Any], mhc_post: Callable[..., Tensor]) -> SiteFunction:
    """A site from TileKernels' two functions.

    ``mhc_pre(streams [B, T, 4, C] bf16, phi [24, 4 C] fp32, scale [3] fp32, base [24] fp32)`` gives the branch input
    [B, T, C] bf16 and (post [B, T, 4, 1], comb [B, T, 4, 4]) fp32, which ``mhc_post(y, streams, post, comb)`` takes.
    """

    def run(x: Tensor, site: Parameters, branch: Branch) -> Tensor:
        phi, bias, *alphas = site
        u, (post, comb) = mhc_pre(
            x,
            phi,
            torch.cat(alphas),
            bias,
            norm_eps=EPS,
            mhc_mult=STREAMS,
            post_mult_value=2.0,
            pre_eps=EPS,
            sinkhorn_eps=EPS,
            sinkhorn_repeat=20,
        )
        return mhc_post(branch(u), x, post, comb)

    return run


def import_tile_kernels(name: str) -> types.ModuleType:
    """A module of ``tile_kernels``, in at most two attempts.

    Version 1.0 takes ``determine_target`` from where tilelang 0.1.9 had it. A newer tilelang fails the first import
    on that; then the function is put where it was looked for.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "tilelang.utils.target":
            raise
    former = types.ModuleType("tilelang.utils.target")
    vars(former)["determine_target"] = importlib.import_module("tilelang.backend.target").determine_target
    sys.modules[former.__name__] = former
    return importlib.import_module(name)


def _version_two() -> str | None:
    """Why an installed TileKernels is not measured for its version, None if that is not why."""
    try:
        version = importlib.metadata.version("tile-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None
    if version.split(".")[0] == "1":
        return None
    return f"tile-kernels {version} has no autograd functions and no projection for mHC; 1.0.0 has both"
