"""Each kernel alone: python -m benchmarks.ops [--sweep] [--width 4096].

Prints microseconds, u (see docs/kernels.md) and the kernel's floor; --sweep tries the candidate configurations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.device import graphed, median_us, unit_us
from benchmarks.record import RESULTS, record
from mhc_compile.lowering import (
    boundary,
    coefficients,
    coefficients_backward,
    post,
    post_pre_norm,
    pre,
    pre_norm,
    replay,
    sinkhorn,
    site_boundary,
)
from mhc_compile.ops import CoefficientSpec

SWEEPS: dict[str, tuple[Any, str, Callable[[int, int], list[dict[str, int]]]]] = {
    "post": (post, "post_config", lambda _, width: post.post_others(width)),
    "pre": (pre, "post_config", lambda _, width: post.post_others(width)),
    "post_dots": (post, "dots_config", lambda _, width: post.dots_others(width)),
    "pre_norm": (pre_norm, "config", lambda *_: [
        {"BC": 512, "num_warps": 2}, {"BC": 512, "num_warps": 4}, {"BC": 1024, "num_warps": 4},
        {"BC": 1024, "num_warps": 8}, {"BC": 1024, "num_warps": 2},
    ]),
    "pre_norm_dots": (pre_norm, "backward_config", lambda _, width: pre_norm.backward_others(width)),
    "pre_dots": (pre, "dots_config", lambda _, width: pre.dots_others(width)),
    "project": (coefficients, "project_config", lambda tokens, width: project_others(tokens, 4 * width)),
    "streams_backward": (boundary, "streams_config", lambda tokens, width: boundary.streams_others(tokens, width, 2)),
}  # fmt: skip
"""Kernel -> the module and function of its fixed setting, and (tokens, width) -> the others: those that `autotune`
measures, but for `pre_norm`, which it leaves alone."""


def project_others(tokens: int, total: int) -> list[dict[str, int]]:
    splits = coefficients.project_splits(tokens, 32, total, 2)
    return coefficients.project_others(tokens, 32, total, 2, splits)


@contextmanager
def configured(module: Any, name: str, config: dict[str, int] | None) -> Iterator[None]:
    if config is None:
        yield
        return
    previous = getattr(module, name)
    setattr(module, name, lambda *_: config)
    try:
        yield
    finally:
        setattr(module, name, previous)


def cases(tokens: int, width: int, n: int = 4) -> dict[str, tuple[Callable[[], object], float]]:
    """Name -> (call, floor in u)."""
    spec = CoefficientSpec()
    flat = list(spec.op_arguments().values())
    make = torch.Generator(device="cuda").manual_seed(0)

    def bf16(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=make).to(torch.bfloat16)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=make)

    x, g, y, du = bf16(tokens, n, width), bf16(tokens, n, width), bf16(tokens, width), bf16(tokens, width)
    q, h, p = fp32(tokens, n), fp32(tokens, n, n), fp32(tokens, n)
    phi, bias, alphas = fp32(24, n * width) * 0.02, fp32(24), [fp32(1) for _ in range(3)]
    hi, lo = coefficients.halves(phi, torch.bfloat16)
    splits = coefficients.project_splits(tokens, 32, n * width, 2)
    partial = coefficients.project(x, hi, lo, 24, 32, splits)
    outs = coefficients.activate(partial, bias, *alphas, n * width, *flat)
    dm, multiple, _ = coefficients_backward.logits_backward(p, q, h, outs[3], bias, *alphas, n * width, False, *flat)
    scale = bf16(width)
    norm = (scale, None, "rms", 1e-6, 0.0, True)
    _, statistics, u = pre_norm.forward(x, p, *norm, True)
    dots = (scale, statistics, "rms", 0.0, True)
    dealt = boundary.dealt_phi(phi, dm.dtype, n)
    branches = [y, *(bf16(tokens, width) for _ in range(3))]
    boundary_of = (g, h, du, p, dm, dealt, multiple, x, y, q, h, False)
    return {
        "post": (lambda: post.forward(x, y, q, h, False), 2 * n + 1),
        "pre": (lambda: pre.forward(x, p), n + 1),
        "project": (lambda: coefficients.project(x, hi, lo, 24, 32, splits), n),
        "activate": (lambda: coefficients.activate(partial, bias, *alphas, n * width, *flat), 0.0),
        "sinkhorn": (lambda: sinkhorn.forward(h, *list(spec.sinkhorn.op_arguments().values())), 0.0),
        "logits_backward": (
            lambda: coefficients_backward.logits_backward(p, q, h, outs[3], bias, *alphas, n * width, False, *flat),
            0.0,
        ),
        "phi_gradient": (lambda: coefficients_backward.phi_gradient(dm, x, spec), n),
        "post_dots": (lambda: post.dots(g, x, y, q, h, False, True), 2 * n + 2),
        "pre_dots": (lambda: pre.dots(du, x, p), n + 1),
        "pre_norm": (lambda: pre_norm.forward(x, p, *norm), n + 1),
        "pre_norm_dots": (lambda: pre_norm.dots(du, x, p, *dots, True, True, False), n + 2),
        "pre_norm_dots, u kept": (lambda: pre_norm.dots(du, x, p, *dots, False, True, False, mixed=u), 3),
        "post_pre_norm": (lambda: post_pre_norm.forward(x, y, q, h, False, p, *norm), 2 * n + 2),
        "post_pre_norm, u kept": (lambda: post_pre_norm.forward(x, y, q, h, False, p, *norm, True), 2 * n + 3),
        "replay of four sites": (lambda: replay.forward(x, branches, [q] * 4, [h] * 4, False), 5 * n + 4),
        "streams_backward": (
            lambda: boundary.streams_backward(x, g, h, False, du, p, dm, dealt, multiple), 3 * n + 1,
        ),
        "site_boundary": (lambda: site_boundary.site_boundary(*boundary_of), 3 * n + 3),
        "site_boundary, gate": (lambda: site_boundary.site_boundary(*boundary_of, True), 3 * n + 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, nargs="*", default=[4096, 2560])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--name", default="ops", help="file under benchmarks/results")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for width in arguments.width:
        u = unit_us(arguments.tokens, width)
        print(f"T {arguments.tokens}  C {width}  u = {u:.2f} us")
        for name, (call, floor) in cases(arguments.tokens, width).items():
            if arguments.only and name not in arguments.only:
                continue
            configs: list[dict[str, int] | None] = [None]
            module: Any = None
            entry = ""
            if arguments.sweep and name in SWEEPS:
                module, entry, others = SWEEPS[name]
                configs += others(arguments.tokens, width)
            for config in configs:
                with configured(module, entry, config):
                    try:
                        us = median_us(graphed(call))
                    except Exception as error:  # a candidate may not fit the chip; the table says so
                        print(f"  {name:24s} {config}: {type(error).__name__} {str(error)[:80]}")
                        continue
                print(f"  {name:24s} {us:8.1f} us  {us / u:6.2f} u  floor {floor:5.1f}  {config or ''}", flush=True)
                results[f"{name}/{width}" + (f"/{config}" if config else "")] = {
                    "us": us,
                    "u": us / u,
                    "floor_u": floor,
                }
    record("ops", results, RESULTS / f"{arguments.name}.json", tokens=arguments.tokens)


if __name__ == "__main__":
    main()
