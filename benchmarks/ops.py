"""Each kernel alone, and each semantic op that has none: python -m benchmarks.ops [--sweep] [--width 4096].

Prints microseconds, u (see docs/kernels.md) and the floor: what must be read and written, in u, the streams' kernels
without the 24 coefficients of a token (0.01 u). --sweep tries the candidate configurations. `expand`, `collapse`,
`stream_norm` and `channel_pre` have no kernel of ours: they run as in a model, by inductor. Kernels that are used up to
some number of tokens are measured with that many.

The result has every row and is written after each: one that would begin after `--seconds`, one that fails and one that
`--only` leaves out are "not measured", with the reason.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.device import graphed, median_us, unit_us
from benchmarks.record import RESULTS, record
from benchmarks.table import Row, attempt, blank, chosen
from mhc_compile.config import Options
from mhc_compile.lowering import (
    activate_again,
    activate_beside_norm,
    activate_post,
    activate_pre,
    activate_pre_norm,
    boundary,
    coefficients,
    coefficients_backward,
    few_tokens,
    gate_pre_norm,
    logits_backward_parts,
    post,
    post_collapse,
    post_pre_norm,
    post_project,
    pre,
    pre_norm,
    replay,
    replay_normed,
    sinkhorn,
    site_boundary,
)
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches
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


@dataclass(frozen=True)
class Case:
    """A row."""

    call: Callable[[], object]
    floor: float
    """What must be read and written, in u."""
    tokens: int
    """The u of so many tokens."""


def through_inductor(function: Callable[[], object]) -> Callable[[], object]:
    """As the ops in `function` run in a model: traced by inductor, with our passes."""
    options: Any = config_patches(Options(autotune=False), LoweringLog())
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def cases(
    tokens: int,
    width: int,
    n: int = 4,
    device: str = "cuda",
    by_inductor: Callable[[Callable[[], object]], Callable[[], object]] = through_inductor,
) -> dict[str, Case]:
    """The rows by name. What stands in front of a comma is a kernel's op or a semantic op."""
    make = torch.Generator(device=device).manual_seed(0)

    def bf16(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=make).to(torch.bfloat16)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=make)

    phi, bias, alphas = fp32(24, n * width) * 0.02, fp32(24), [fp32(1) for _ in range(3)]
    site = (phi, bias, alphas)
    few, most = min(few_tokens.FEW, tokens), min(activate_post.MOST, tokens)
    streams = (bf16(tokens, n, width), bf16(tokens, width), fp32(tokens, n), fp32(tokens, n, n))
    return {
        **_site_cases(streams, site, bf16, fp32),
        **_beside_case(streams[0], site),
        **_own_case(bf16(most, n, width), bf16(most, width), site),
        **_few_cases((bf16(few, n, width), bf16(few, width), fp32(few, n), fp32(few, n, n)), site, bf16(width)),
        **_inductor_cases(streams[0], bf16, by_inductor),
    }


Make = Callable[..., torch.Tensor]
"""Sizes -> a random tensor."""
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Streams [T, n, C] and a branch output [T, C] in bf16; H_post [T, n] and H_res [T, n, n] in fp32."""


def _numbers(count: int, width: int) -> float:
    """`count` fp32 numbers a token, in u."""
    return 2 * count / width


def _site_cases(given: Given, site: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], bf16: Make, fp32: Make
) -> dict[str, Case]:  # fmt: skip
    """The kernels of a site."""
    (x, y, q, h), (phi, bias, alphas) = given, site
    tokens, n, width = x.shape
    spec = CoefficientSpec()
    flat, steps = list(spec.op_arguments().values()), list(spec.sinkhorn.op_arguments().values())
    g, du, p, scale = bf16(tokens, n, width), bf16(tokens, width), fp32(tokens, n), bf16(width)
    mix_gradient = fp32(tokens, n, n)
    hi, lo = coefficients.halves(phi, torch.bfloat16)
    splits = coefficients.project_splits(tokens, 32, n * width, 2)
    partial = coefficients.project(x, hi, lo, 24, 32, splits)
    projection = coefficients.activate(partial, bias, *alphas, n * width, *flat)[3]
    shared = (projection, bias, *alphas, n * width, False, *flat)
    dm, multiple, _ = coefficients_backward.logits_backward(p, q, h, *shared)
    early = logits_backward_parts.early(q, h, *shared)
    late = (projection, bias, alphas[0], n * width, False, *flat)
    norm = (scale, None, "rms", 1e-6, 0.0, True)
    _, statistics, u = pre_norm.forward(x, p, *norm, True)
    dots = (scale, statistics, "rms", 0.0, True)
    dealt = boundary.dealt_phi(phi, dm.dtype, n)
    boundary_of = (g, h, du, p, dm, dealt, multiple, x, y, q, h, False)
    four = ([bf16(tokens, width) for _ in range(4)], [fp32(tokens, n) for _ in range(4)],
            [fp32(tokens, n, n) for _ in range(4)])  # fmt: skip
    gates, scales = [fp32(tokens, n) for _ in range(4)], [bf16(width) for _ in range(4)]

    def normed(count: int) -> list[torch.Tensor]:
        given, yes = [values[:count] for values in (*four, gates, scales)], [True] * count
        return replay_normed.forward(x, *given[:3], False, yes, yes, *given[3:], [], *norm[2:])

    rows: dict[str, tuple[Callable[[], object], float]] = {
        "post": (lambda: post.forward(x, y, q, h, False), 2 * n + 1),
        "pre": (lambda: pre.forward(x, p), n + 1),
        "project": (lambda: coefficients.project(x, hi, lo, 24, 32, splits), n),
        "activate": (
            lambda: coefficients.activate(partial, bias, *alphas, n * width, *flat),
            _numbers(splits * 25 + 49, width),
        ),
        "activate_again": (
            lambda: activate_again.activate_again(projection, bias, *alphas, *flat), _numbers(25 + 24, width),
        ),
        "activate_pre": (
            lambda: activate_pre.activate_pre(partial, bias, alphas[0], n * width, *flat),
            _numbers(splits * 5 + 4, width),
        ),
        "coefficients": (lambda: coefficients.forward(x, phi, bias, *alphas, *flat), n),
        "sinkhorn": (lambda: sinkhorn.forward(h, *steps), _numbers(32, width)),
        "sinkhorn_backward": (lambda: sinkhorn.backward(mix_gradient, h, *steps), _numbers(48, width)),
        "logits_backward": (
            lambda: coefficients_backward.logits_backward(p, q, h, *shared), _numbers(24 + 25 + 33, width),
        ),
        "logits_backward_early": (
            lambda: logits_backward_parts.early(q, h, *shared), _numbers(20 + 25 + 30, width),
        ),
        "logits_backward_rest": (
            lambda: logits_backward_parts.rest(p, *early, *late), _numbers(4 + 34 + 5 + 33, width),
        ),
        "phi_gradient": (lambda: coefficients_backward.phi_gradient(dm, x, spec), n),
        "post_collapse": (lambda: post_collapse.forward(x, y, q, h, False, "mean"), n + 2),
        "post_dots": (lambda: post.dots(g, x, y, q, h, False, True), 2 * n + 2),
        "post_dots, one row": (lambda: post.dots(du, x, y, q, h, False, True), n + 3),
        "pre_dots": (lambda: pre.dots(du, x, p), n + 1),
        "pre_norm": (lambda: pre_norm.forward(x, p, *norm), n + 1),
        "gate_pre_norm": (
            lambda: gate_pre_norm.forward(x, *norm, False, partial, bias, alphas[0], n * width, *flat),
            n + 1 + _numbers(splits * 5 + 4, width),
        ),
        "pre_norm_dots": (lambda: pre_norm.dots(du, x, p, *dots, True, True, False), n + 2),
        "pre_norm_dots, u kept": (lambda: pre_norm.dots(du, x, p, *dots, False, True, False, mixed=u), 3),
        "post_pre_norm": (lambda: post_pre_norm.forward(x, y, q, h, False, p, *norm), 2 * n + 2),
        "post_pre_norm, u kept": (lambda: post_pre_norm.forward(x, y, q, h, False, p, *norm, True), 2 * n + 3),
        # Four sites of four branch outputs: one read of X, and a y and an X' each.
        "replay, four sites": (lambda: replay.forward(x, *four, False), n + 4 * (1 + n)),
        # The same with a normed branch input each: a row written more.
        **{
            f"replay_normed, {word} sites": (functools.partial(normed, count), n + count * (2 + n))
            for word, count in (("two", 2), ("three", 3), ("four", 4))
        },
        "streams_backward": (
            lambda: boundary.streams_backward(x, g, h, False, du, p, dm, dealt, multiple), 3 * n + 1,
        ),
        "streams_backward, summed": (
            lambda: boundary.streams_backward(x, g, h, False, du, p, dm, dealt, multiple, True), 2 * n + 2,
        ),
        "site_boundary": (lambda: site_boundary.site_boundary(*boundary_of), 3 * n + 3),
        "site_boundary, one row": (lambda: site_boundary.site_boundary(du, *boundary_of[1:]), 2 * n + 4),
        "site_boundary, gate": (lambda: site_boundary.site_boundary(*boundary_of, True), 3 * n + 3),
    }  # fmt: skip
    return {name: Case(call, floor, tokens) for name, (call, floor) in rows.items()}


def _beside_case(x: torch.Tensor, site: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]) -> dict[str, Case]:
    """The norm with the coefficients beside it, in one launch."""
    phi, bias, alphas = site
    tokens, n, width = x.shape
    spec = CoefficientSpec()
    partial = coefficients.partials(x, phi, spec)
    branch = (x.new_ones(width), None, "rms", 1e-6, 0.0, True, False)
    given = (x, *branch, partial, bias, *alphas, n * width, *spec.op_arguments().values())
    floor = n + 1 + _numbers(partial.shape[0] * 25 + 49, width)
    return {"activate_beside_norm": Case(lambda: activate_beside_norm.forward(*given), floor, tokens)}


def _own_case(x: torch.Tensor, y: torch.Tensor, site: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]
) -> dict[str, Case]:  # fmt: skip
    """A post that makes its own coefficients."""
    phi, bias, alphas = site
    tokens, n, width = x.shape
    spec = CoefficientSpec()
    partial = coefficients.partials(x, phi, spec)
    given = (x, y, partial, bias, *alphas[1:], n * width, False, *spec.op_arguments().values())
    floor = 2 * n + 1 + _numbers(partial.shape[0] * 21, width)
    return {"activate_post": Case(lambda: activate_post.forward(*given), floor, tokens)}


def _few_cases(given: Given, site: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], scale: torch.Tensor
) -> dict[str, Case]:  # fmt: skip
    """The two launches of a site with few tokens, beside which the weights are not small."""
    (x, y, q, h), (phi, bias, alphas) = given, site
    tokens, n, width = x.shape
    flat = list(CoefficientSpec().op_arguments().values())
    partial = post_project.forward(x, y, q, h, False, phi, 32)[1]
    sums = _numbers(partial.shape[0] * 25, width)
    weights = 2 * 24 * n / tokens  # phi, fp32
    norm = (scale, None, "rms", 1e-6, 0.0, True)
    active = (partial, bias, *alphas, x, None, *norm, False, False, *flat)
    return {
        "post_project": Case(
            lambda: post_project.forward(x, y, q, h, False, phi, 32), 2 * n + 1 + weights + sums, tokens
        ),
        "activate_pre_norm": Case(lambda: activate_pre_norm.forward(*active), n + 1 + sums, tokens),
    }


def _inductor_cases(
    x: torch.Tensor, bf16: Make, by_inductor: Callable[[Callable[[], object]], Callable[[], object]], rank: int = 64
) -> dict[str, Case]:
    """The ops without a kernel, forward and backward; the gates per channel come from weights of `rank`."""
    tokens, n, width = x.shape
    op = torch.ops.mhc
    y, g, scale = bf16(tokens, width), torch.roll(x, 1, 0), bf16(n, width)
    down, up = bf16(rank, n * width), bf16(n * width, rank)
    hidden = bf16(tokens, rank).float()
    gates = (down, up, hidden, 1.0 / n, 1.0 / n, [True, True, True])
    weights = 2 * rank * n / tokens
    rows: dict[str, tuple[Callable[[], object], float]] = {
        "expand": (lambda: op.expand.default(y, n), n + 1),
        "expand, backward": (lambda: op.expand_backward.default(x), n + 1),
        "collapse": (lambda: op.collapse.default(x, "mean"), n + 1),
        "collapse, backward": (lambda: op.collapse_backward.default(y, n, "mean"), n + 1),
        "stream_norm": (lambda: op.stream_norm.default(x, scale, 0.0, 1e-6), 2 * n),
        "stream_norm, backward": (
            lambda: op.stream_norm_backward.default(g, x, scale, 0.0, 1e-6, [True, True]), 3 * n,
        ),
        "channel_pre": (lambda: op.channel_pre.default(x, down, up, 1.0 / n, 1.0 / n), n + 1 + weights),
        "channel_pre, backward": (lambda: op.channel_pre_backward.default(y, x, *gates), 2 * n + 1 + 2 * weights),
    }  # fmt: skip
    return {name: Case(by_inductor(call), floor, tokens) for name, (call, floor) in rows.items()}


def measure(case: Case, u: float) -> Row:
    """``u``: of one token, in microseconds."""
    us = median_us(graphed(case.call))
    return {"us": us, "u": us / (u * case.tokens), "floor_u": case.floor, "tokens": case.tokens}


def told(name: str, row: Row, config: dict[str, int] | None = None) -> str:
    """The line that is printed for a row."""
    if "status" in row:
        return f"  {name:24s} {row['status']}  {config or ''}"
    return (
        f"  {name:24s} {row['us']:8.1f} us  {row['u']:6.2f} u  floor {row['floor_u']:6.2f}  "
        f"{row['tokens']} tokens  {config or ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, nargs="*", default=[4096, 2560])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="*", default=None, help="names of rows; * stands for anything")
    parser.add_argument("--seconds", type=float, default=540, help="rows that would begin later are left out and named")
    parser.add_argument("--name", default="ops", help="file under benchmarks/results")
    arguments = parser.parse_args()
    start = time.perf_counter()
    tables = {width: cases(arguments.tokens, width) for width in arguments.width}
    rows = {f"{name}/{width}": (name, width) for width, table in tables.items() for name in table}
    only = chosen(dict.fromkeys(name for name, _ in rows.values()), arguments.only, parser)
    results = blank(rows, [key for key, (name, _) in rows.items() if name in only])
    path = RESULTS / f"{arguments.name}.json"
    units = {width: unit_us(arguments.tokens, width) / arguments.tokens for width in tables}
    for key, (name, width) in rows.items():
        if name in only:
            configs: list[dict[str, int] | None] = [None]
            module: Any = None
            entry = ""
            if arguments.sweep and name in SWEEPS:
                module, entry, others = SWEEPS[name]
                configs += others(arguments.tokens, width)
            for config in configs:
                with configured(module, entry, config):
                    case = functools.partial(measure, tables[width][name], units[width])
                    row = attempt(case, start, arguments.seconds)
                results[key + (f"/{config}" if config else "")] = row
                print(told(key, row, config), flush=True)
                record("ops", results, path, quiet=True, tokens=arguments.tokens)
        else:
            print(told(key, results[key]), flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
