"""A site of inference, forward: python -m benchmarks.decode [--tokens 1 8 64 512 2048] [--width 4096 2560].

A chain of sites (coefficients, pre, RMSNorm of the branch input, post; the branch is the identity) in a CUDA graph,
microseconds a site. The L2 is emptied before each replay: in a model the weights of a layer come from memory. Rows: our
kernels with two launches a site (`few_tokens`, up to 64 tokens), with three (`activate_post` or `activate_beside_norm`,
here for any number of tokens) and with four, and `torch.compile` of the spelled-out chain. The result has every row
and is written after each: one that would begin after `--seconds`, one that fails and one that is not asked for are "not
measured", with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.chain import Chain, make_inputs, spelled, spelled_single_pass
from benchmarks.device import graphed, median_us
from benchmarks.ops import configured
from benchmarks.record import record
from benchmarks.site import WIDTHS, ours, single_pass
from benchmarks.table import Row, attempt, blank, not_measured
from mhc_compile.config import FUSIONS, Options
from mhc_compile.lowering import activate_beside_norm, activate_post, activate_pre_norm, post_project
from mhc_compile.lowering.base import FEW, LoweringLog
from mhc_compile.lowering.inductor import config_patches

TOKENS = (1, 8, 64, 512, 2048)


def without(*names: str) -> tuple[str, ...]:
    """All fusions but these."""
    return tuple(name for name in FUSIONS if name not in names)


def compiled(function: Chain, fuse: bool | tuple[str, ...] | None) -> Chain:
    """By our passes with these fusions, or (None) by inductor alone. No artefact on disk: the setting that a sweep
    tries is not in its name."""
    options: Any = {} if fuse is None else config_patches(Options(autotune=False, fuse=fuse), LoweringLog())
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

ROWS: dict[str, tuple[Chain, Chain, bool | tuple[str, ...] | None, int]] = {
    "two launches": (ours, spelled, True, 8),
    "three launches": (ours, spelled, without("few_tokens", "activate_beside_norm"), 8),
    "three launches, Sinkhorn beside the norm": (ours, spelled, without("few_tokens", "activate_post"), 8),
    "four launches": (ours, spelled, without("few_tokens", "activate_post", "activate_beside_norm"), 8),
    "two launches, single_pass": (single_pass, spelled_single_pass, True, 8),
    "torch.compile, spelled": (spelled, spelled, None, 2),
}
"""Name -> (chain, what it should give, fusions, sites)."""


@contextlib.contextmanager
def within_limits(tokens: int) -> Iterator[None]:
    """A row's fusion is taken for any number of tokens, also where a model would not take it."""
    with (
        mock.patch.object(activate_post, "MOST", max(tokens, activate_post.MOST)),
        mock.patch.object(activate_beside_norm, "LEAST", min(tokens, activate_beside_norm.LEAST)),
    ):
        yield


def measure(name: str, tokens: int, width: int) -> Row:
    """Microseconds a site, and the error of the output against float64."""
    chain, reference, fuse, count = ROWS[name]
    if name.startswith("two") and tokens > FEW:
        return not_measured(f"two launches are for at most {FEW} tokens")
    x, sites = make_inputs(tokens, width, count)
    torch._dynamo.reset()
    with torch.no_grad(), within_limits(tokens):
        function = compiled(chain, fuse)
        got = function(x, sites).double()
        exact = reference(x.double(), [tuple(t.double() for t in site) for site in sites])  # type: ignore[misc]  # six tensors again
        error = float((got - exact).norm() / exact.norm())
        us = median_us(graphed(lambda: function(x, sites))) / count
    return {"us_a_site": us, "sites": count, "error": error}


def told(name: str, tokens: int, width: int, row: Row) -> str:
    """The line that is printed for a row."""
    found = row.get("status") or f"{row['us_a_site']:7.2f} us a site  error {row['error']:.1e}"
    return f"T {tokens:4d}  C {width}  {name:40s} {found}"


def sweep(tokens: list[int], widths: list[int]) -> dict[str, Any]:
    """Two launches with each setting of one kernel; the other one keeps its own."""
    results: dict[str, Any] = {}
    for kernel, (module, settings) in SWEEPS.items():
        for setting in settings:
            print(kernel, setting)
            for width in widths:
                for count in tokens:
                    with configured(module, "config", setting):
                        row = measure("two launches", count, width)
                    results[f"{kernel}/{setting}/T{count}/C{width}"] = row
                    print(told("two launches", count, width, row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=240.0, help="nothing is compiled after that")
    parser.add_argument("--sweep", action="store_true", help="settings of the two kernels, takes minutes")
    arguments = parser.parse_args()
    if arguments.sweep:
        record("decode-sweep", sweep(arguments.tokens, arguments.width))
        return
    start = time.perf_counter()
    widths = dict.fromkeys([*arguments.width, *WIDTHS])
    counts = dict.fromkeys([*arguments.tokens, *TOKENS])
    every = [(name, tokens, width) for name in ROWS for width in widths for tokens in counts]
    rows = {f"{name}/T{tokens}/C{width}": (name, tokens, width) for name, tokens, width in every}

    def is_asked(name: str, tokens: int, width: int) -> bool:
        return name in arguments.only and tokens in arguments.tokens and width in arguments.width

    asked = [key for key, row in rows.items() if is_asked(*row)]
    results = blank(rows, asked)
    for key, row in rows.items():
        if key in asked:
            results[key] = attempt(functools.partial(measure, *row), start, arguments.seconds)
            record("decode", results, quiet=True, tokens=arguments.tokens, widths=arguments.width)
        print(told(*row, results[key]), flush=True)


if __name__ == "__main__":
    main()
