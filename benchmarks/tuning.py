"""What `autotune` costs on a new shape, and what it gains: python -m benchmarks.tuning [--width 4096 2560].

The chain of sites of `benchmarks.site` is compiled twice: with the fixed settings, and with `autotune`, where nothing
is kept of earlier measurements and the caches of inductor and Triton are empty. For every kernel that was measured: the
seconds that it held up the first step (its compilations among them; the bar is 2), the settings tried, and how much
faster than the fixed one the chosen one is, alone. Then both chains in turns, forward + backward: what that is of a
site.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.chain import leaves, make_inputs
from benchmarks.device import in_turns, ratios, unit_us
from benchmarks.record import RESULTS, record
from benchmarks.site import WIDTHS, ours
from benchmarks.table import Row, attempt, blank
from mhc_compile.config import Options
from mhc_compile.lowering import tune
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it our choices and the caches of inductor and Triton are in a folder of their own, empty at first."""
    names = ("MHC_COMPILE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: os.path.join(folder, name) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def kept(device: str) -> dict[str, dict[str, Any]]:
    """Kernel and the hash of its question -> setting, gain, seconds, tried."""
    entries = tune.load(device).entries
    return {f"{key.split()[0]} {key.split()[-1]}": entry for key, entry in sorted(entries.items())}


def measure(tokens: int, width: int, count: int) -> Row:
    x, sites = make_inputs(tokens, width, count)
    parameters, seed = leaves(x, sites), torch.randn_like(x)

    def through(autotune: bool) -> tuple[Callable[[], object], float]:
        options: Any = config_patches(Options(autotune=autotune), LoweringLog())
        chain = torch.compile(ours, fullgraph=True, options=options)

        def step() -> None:
            torch.autograd.grad(chain(x, sites), parameters, seed)

        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return step, time.perf_counter() - start

    torch._dynamo.reset()  # or a second width would be compiled for any width, which no kernel takes
    with nothing_kept():
        fixed, fixed_s = through(False)
        torch._dynamo.reset()
        tuned, tuned_s = through(True)
        kernels = kept(torch.cuda.get_device_name())
        times = in_turns({"fixed": fixed, "tuned": tuned}, flush=True, ahead=2_000_000 * count)
    over = ratios(times["tuned"], times["fixed"])
    return {
        "kernels": kernels,
        "slowest_s": max((entry["seconds"] for entry in kernels.values()), default=0.0),
        "first_step_s": {"fixed": fixed_s, "tuned": tuned_s},
        "site_us": {name: statistics.median(rounds) * 1e3 / count for name, rounds in times.items()},
        "tuned_over_fixed": {"median": statistics.median(over), "least": over[0], "greatest": over[-1]},
    }


def told(width: int, row: Row, tokens: int) -> str:
    """The lines that are printed for a width."""
    if "status" in row:
        return f"C {width}: {row['status']}"
    u = unit_us(tokens, width)
    lines = [
        f"  {name.split()[0]:28s} {entry['seconds']:5.2f} s  {entry['tried']} tried  {entry['gain']:6.1%}  "
        f"{entry['config']}"
        for name, entry in row["kernels"].items()
    ]
    over, first = row["tuned_over_fixed"], row["first_step_s"]
    times = ", ".join(f"{name} {us / u:.1f} u" for name, us in row["site_us"].items())
    return "\n".join([
        f"C {width}: slowest kernel {row['slowest_s']:.2f} s, first step fixed {first['fixed']:.1f} s, tuned "
        f"{first['tuned']:.1f} s",
        *lines,
        f"  a site: {times}; {over['median']:.4f} ({over['least']:.4f} .. {over['greatest']:.4f})",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=240, help="rows that would begin later are left out and named")
    parser.add_argument("--name", default="tuning", help="file under benchmarks/results")
    arguments = parser.parse_args()
    widths = {str(width): width for width in (*arguments.width, *WIDTHS)}
    asked = [str(width) for width in arguments.width]
    results = blank(widths, asked)
    path = RESULTS / f"{arguments.name}.json"
    start = time.perf_counter()
    for name, width in widths.items():
        if name in asked:
            row = functools.partial(measure, arguments.tokens, width, arguments.sites)
            results[name] = attempt(row, start, arguments.seconds)
            record("tuning", results, path, quiet=True, tokens=arguments.tokens, sites=arguments.sites)
        print(told(width, results[name], arguments.tokens), flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
