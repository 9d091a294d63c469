"""A site with few tokens, forward, as in decoding: python -m benchmarks.decode [--tokens 1 8 64] [--width 4096 2560].

A chain of sites (coefficients, pre, RMSNorm of the branch input, post; the branch is the identity) in a CUDA graph,
microseconds a site. The L2 is emptied before each replay: in a model the weights of a layer come from memory. Rows:
our kernels with four launches a site, with two, and `torch.compile` of the spelled-out chain. What is not compiled
after `--seconds` is left out and says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import graphed, median_us
from benchmarks.ops import configured
from benchmarks.record import record
from benchmarks.site import Site, make_inputs, ours, single_pass, spelled
from mhc_compile.config import Options
from mhc_compile.lowering import activate_pre_norm, few_tokens, post_project
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches

Chain = Callable[[Tensor, list[Site]], Tensor]


@contextmanager
def few(most: int) -> Iterator[None]:
    """Two launches a site for at most this many tokens."""
    previous = few_tokens.FEW
    few_tokens.FEW = most
    try:
        yield
    finally:
        few_tokens.FEW = previous


def compiled(function: Chain, most: int | None) -> Chain:
    """By our passes, or (None) by inductor alone. No artefact on disk: `few` is not in its name."""
    options: Any = {} if most is None else config_patches(Options(autotune=False), LoweringLog())
    # A site alone is asked for, not what a second number of tokens would make of it.
    return torch.compile(function, fullgraph=True, dynamic=False, options={**options, "fx_graph_cache": False})


SWEEPS: dict[str, tuple[Any, list[dict[str, int]]]] = {
    "post_project": (post_project, [
        {"BT": 16, "BC": block, "WARPS": warps, "num_warps": warps}
        for warps, block in ((8, 32), (4, 32), (4, 64), (8, 16), (16, 16), (4, 16))
    ]),
    "activate_pre_norm": (activate_pre_norm, [
        {"BC": block, "num_warps": warps} for block, warps in ((1024, 4), (2048, 8), (1024, 8), (4096, 16), (2048, 16))
    ]),
}  # fmt: skip
"""Kernel -> its settings to compare (--sweep)."""

ROWS: dict[str, tuple[Chain, Chain, int | None, int]] = {
    "two launches": (ours, spelled, 64, 8),
    "four launches": (ours, spelled, 0, 8),
    "two launches, single_pass": (single_pass, single_pass, 64, 8),
    "torch.compile, spelled": (spelled, spelled, None, 2),
}
"""Name -> (chain, what it should give, `few`, sites)."""


def measure(name: str, tokens: int, width: int) -> dict[str, Any]:
    """Microseconds a site, and the error of the output against float64."""
    chain, reference, most, count = ROWS[name]
    x, sites = make_inputs(tokens, width, count)
    torch._dynamo.reset()
    with torch.no_grad(), few(most or 0):
        function = compiled(chain, most)
        got = function(x, sites).double()
        exact = reference(x.double(), [tuple(t.double() for t in site) for site in sites])  # type: ignore[misc]  # six tensors again
        error = float((got - exact).norm() / exact.norm())
        us = median_us(graphed(lambda: function(x, sites))) / count
    print(f"T {tokens:3d}  C {width}  {name:28s} {us:7.2f} us a site  error {error:.1e}", flush=True)
    return {"us_a_site": us, "sites": count, "error": error}


def sweep(tokens: list[int], widths: list[int]) -> dict[str, Any]:
    """Two launches with each setting of one kernel; the other one keeps its own."""
    results: dict[str, Any] = {}
    for kernel, (module, settings) in SWEEPS.items():
        for setting in settings:
            print(kernel, setting)
            for width in widths:
                for count in tokens:
                    with configured(module, "config", setting):
                        results[f"{kernel}/{setting}/T{count}/C{width}"] = measure("two launches", count, width)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--width", type=int, nargs="*", default=[4096, 2560])
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=45.0, help="nothing is compiled after that")
    parser.add_argument("--sweep", action="store_true", help="settings of the two kernels, takes minutes")
    arguments = parser.parse_args()
    if arguments.sweep:
        record("decode-sweep", sweep(arguments.tokens, arguments.width))
        return
    results: dict[str, Any] = {}
    end = time.monotonic() + arguments.seconds
    for name in arguments.only:
        for width in arguments.width:
            for tokens in arguments.tokens:
                key = f"{name}/T{tokens}/C{width}"
                if time.monotonic() > end:
                    results[key] = {"status": f"not measured: {arguments.seconds:g} s were over"}
                    continue
                try:
                    results[key] = measure(name, tokens, width)
                except Exception as error:  # a row of the table, not the end of it
                    results[key] = {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
                    print(key, results[key]["status"], flush=True)
                record("decode", results, quiet=True, tokens=arguments.tokens, widths=arguments.width)


if __name__ == "__main__":
    main()
