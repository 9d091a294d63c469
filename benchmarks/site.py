"""One site with its norm, forward and backward: python -m benchmarks.site [--width 4096 2560] [--sites 8].

A chain of sites (coefficients, pre, RMSNorm of the branch input, post; the branch itself is the identity) is timed
and divided by their number, so that what fuses across a site boundary counts as it does in a model of four layers.
Every implementation computes DeepSeek-V4's semantics (softmax start, 20 rounds, bf16 streams) and is checked against
float64 before it is timed; ours say by how much their errors exceed those of the eager spelling of the same variant
(`over_eager`, on the same inputs; the bar is 1.5). Inductor takes minutes for the unrolled rounds of 8 sites: the rows
that it compiles alone are measured on two sites, and say so. Nothing in them fuses over a boundary.

The peers come with `pip install -e '.[peers]'` (Python 3.12). The result has every row and is written after each: a
peer that is not installed, a row that would begin after `--seconds` and one that `--only` leaves out are
"not measured", with the reason.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.chain import (
    EPS,
    STREAMS,
    Chain,
    Site,
    errors,
    leaves,
    make_inputs,
    over_eager,
    rms_norm,
    spelled,
    spelled_single_pass,
    spelled_transposed,
)
from benchmarks.device import median_us, unit_us
from benchmarks.peers import liger_chain, tile_kernels_chain
from benchmarks.record import RESULTS, record
from benchmarks.table import attempt, blank, chosen
from mhc_compile.config import Options
from mhc_compile.lowering import kernels
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

__all__ = ["Site", "make_inputs", "ours", "rms_norm", "single_pass", "spelled", "spelled_single_pass"]

WIDTHS = (4096, 2560)
SPEC = CoefficientSpec(
    streams=STREAMS, norm_eps=EPS, pre_eps=EPS, sinkhorn=SinkhornSpec("softmax", EPS, "column", 39, EPS, "add")
)


def ours(x: Tensor, sites: list[Site]) -> Tensor:
    for phi, bias, a, b, c, weight in sites:
        pre, post, res, _ = torch.ops.mhc.coefficients.default(x, phi, bias, a, b, c, **SPEC.op_arguments())
        y, *_ = torch.ops.mhc.pre_norm.default(x, pre, weight, None, "rms", EPS, 0.0, True)
        x = torch.ops.mhc.post.default(x, y, post, res, False)
    return x


def single_pass(x: Tensor, sites: list[Site]) -> Tensor:
    """V4.1: the pre-mix of a site comes from the coefficients of the site before it; one-hot at first. The op is told
    what `passes.fold_norms` tells it in a model: u is kept where the gate is known before the streams."""
    pre = torch.nn.functional.one_hot(torch.zeros(x.shape[:-2], dtype=torch.long, device=x.device), STREAMS).float()
    for index, (phi, bias, a, b, c, weight) in enumerate(sites):
        following, post, res, _ = torch.ops.mhc.coefficients.default(x, phi, bias, a, b, c, **SPEC.op_arguments())
        y, *_ = torch.ops.mhc.pre_norm.default(x, pre, weight, None, "rms", EPS, 0.0, True, index > 0)
        x = torch.ops.mhc.post.default(x, y, post, res, False)
        pre = following
    return x


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    build: Callable[[LoweringLog], Chain | str]
    """Gives the chain, or why there is none."""
    reference: Chain = spelled
    """What the chain computes, in float64."""
    eager: Chain | None = None
    """Of a row of ours, the eager spelling of its variant: their errors are compared."""
    sites: int | None = None
    """Measured on so many sites, whatever is asked for."""


def _compiled(function: Chain, lowering: str = "auto", traced_launches: bool = True) -> Callable[[LoweringLog], Chain]:
    """``function`` through inductor with our passes."""

    def build(log: LoweringLog) -> Chain:
        kernels.register_kernels(torch.device("cuda"))  # a graph from the cache names them, and runs no pass of ours
        # Fixed settings: two runs compare.
        options: Any = config_patches(Options(lowering=lowering, autotune=False), log, traced_launches=traced_launches)
        return torch.compile(function, fullgraph=True, options=options)

    return build


ROWS: dict[str, Row] = {
    "mhc": Row(_compiled(ours), eager=spelled),
    "mhc, single_pass": Row(_compiled(single_pass), spelled_single_pass, eager=spelled_single_pass),
    "eager, spelled": Row(lambda log: spelled),
    "eager, spelled single_pass": Row(lambda log: spelled_single_pass, spelled_single_pass),
    "TileKernels": Row(lambda log: tile_kernels_chain(), spelled_transposed),
    "torch.compile, spelled": Row(lambda log: torch.compile(spelled, fullgraph=True), sites=2),
    "Liger": Row(lambda log: liger_chain()),
    "mhc, native bodies through inductor": Row(_compiled(ours, lowering="native"), eager=spelled, sites=2),
    "mhc, opaque launches": Row(_compiled(ours, traced_launches=False), eager=spelled),
}
"""In the order in which they are measured: what matters most comes first."""


def measure(row: Row, function: Chain, tokens: int, width: int, count: int, u: float) -> dict[str, Any]:
    """Errors, then forward and forward + backward of a chain, a site."""
    x, sites = make_inputs(tokens, width, count)
    start = time.perf_counter()
    error = errors(function, row.reference, x, sites)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"sites": count, "first_s": round(time.perf_counter() - start, 1), "errors": error}
    if row.eager is not None:
        found["over_eager"] = over_eager(error, errors(row.eager, row.reference, x, sites))
    parameters = leaves(x, sites)
    seed = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(function(x, sites), parameters, seed, allow_unused=True)

    ahead = 2_000_000 * count  # a chain of so many launches from Python needs more lead than one kernel does
    forward = median_us(lambda: function(x, sites), ahead=ahead) / count
    both = median_us(step, ahead=ahead) / count
    return {"forward_us": forward, "both_us": both, "forward_u": forward / u, "both_u": both / u, **found}


def told(name: str, result: dict[str, Any], asked: int) -> str:
    """The line that is printed for a row."""
    if "status" in result:
        return f"  {name:45s} {result['status']}"
    over = result.get("over_eager", {})
    return (
        f"  {name:45s} fwd {result['forward_u']:6.1f} u  fwd+bwd {result['both_u']:6.1f} u  "
        f"({result['forward_us']:.0f}, {result['both_us']:.0f} us)  first {result['first_s']:.0f} s  "
        f"errors {', '.join(f'{key} {value:.1e}' for key, value in result['errors'].items())}"
        + (f"  over eager {', '.join(f'{key} {value:.2f}' for key, value in over.items())}" if over else "")
        + (f"  on {result['sites']} sites" if result["sites"] != asked else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=None, help="names of rows; * stands for anything")
    parser.add_argument("--seconds", type=float, default=540, help="rows that would begin later are left out and named")
    parser.add_argument("--name", default="site", help="file under benchmarks/results")
    arguments = parser.parse_args()
    only = chosen(ROWS, arguments.only, parser)
    widths = dict.fromkeys([*arguments.width, *WIDTHS])
    start = time.perf_counter()
    log = LoweringLog()
    results = blank(
        [f"{name}/{width}" for name in ROWS for width in widths],
        [f"{name}/{width}" for name in only for width in arguments.width],
    )
    units = {width: unit_us(arguments.tokens, width) for width in arguments.width}
    path = RESULTS / f"{arguments.name}.json"
    facts = {"tokens": arguments.tokens, "sites": arguments.sites, "unit_us": units}
    for width, u in units.items():
        print(f"T {arguments.tokens}  C {width}  n {STREAMS}  u = {u:.2f} us", flush=True)

    def one(row: Row, width: int) -> dict[str, Any] | str:
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()  # or a second width would be compiled for any width, which no kernel takes
        function = row.build(log)
        if isinstance(function, str):
            return function
        return measure(row, function, arguments.tokens, width, row.sites or arguments.sites, units[width])

    for name, row in ROWS.items():
        for width in widths:
            key = f"{name}/{width}"
            if name in only and width in units:
                results[key] = attempt(functools.partial(one, row, width), start, arguments.seconds)
                record("site", results, path, quiet=True, **facts)
            print(told(f"{name}, C {width}", results[key], arguments.sites), flush=True)
    print({f"{op}:{provider}": count for (op, provider), count in log.counts().items()})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
