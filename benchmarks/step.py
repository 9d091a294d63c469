"""A training step of decoder layers: python -m benchmarks.step [--layers 4] [--only mhc].

Qwen3 layers (hidden 2560, FFN 9728, 32/8 heads of 128), bf16, trunk without LM head, forward and backward of a batch of
2 x 4096 tokens. Every row is a fresh model with the same seed; the plain model through `backend="inductor"` is the
base. Each is compiled and measured alone; then each of them and the plain model step in turns, two at a time (how warm
the device is depends on who else is in the round), which is what counts: `step_ms` is the median of that and
`over_plain` the median of the ratios of a round, with its least and its greatest; `alone_ms` is the first.

The peers' rows are the same model with hyper-connections written around its sublayers (`benchmarks.wrapped`):
DeepSeek-V4's spelling through `torch.compile`, and the kernels of TileKernels and Liger with inductor for all that lies
between them (`pip install -e '.[peers]'`, Python 3.12).

The result has every row and is written after each: a peer that is not installed, a row that would begin after
`--seconds` and one that `--only` leaves out are "not measured", with the reason.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.chain import SiteFunction, spelled_site
from benchmarks.device import in_turns, median_us, ratios
from benchmarks.peers import liger_site, tile_kernels_site
from benchmarks.record import RESULTS, record
from benchmarks.table import Row, attempt, blank, chosen
from benchmarks.wrapped import compile_parts, wrap
from mhc_compile.backend import mhc


def converted(**options: Any) -> Callable[[nn.Module], Any]:
    """Through our backend."""
    return lambda model: torch.compile(model, backend=mhc, options=options)


def by_peer(site: Callable[[], SiteFunction | str]) -> Callable[[nn.Module], Any]:
    """Around a peer's kernels, or why there are none."""

    def build(model: nn.Module) -> Any:
        function = site()
        return function if isinstance(function, str) else compile_parts(wrap(model, function))

    return build


BASE = "plain, inductor"
ROWS: dict[str, Callable[[nn.Module], Any]] = {
    BASE: torch.compile,
    "mhc": converted(),
    "mhc, single_pass": converted(variant="single_pass"),
    "TileKernels": by_peer(tile_kernels_site),
    "torch.compile, spelled": lambda model: torch.compile(wrap(model, spelled_site)),
    "Liger": by_peer(liger_site),
    "mhc, identity": converted(variant="identity"),
    "mhc, native bodies": converted(lowering="native"),
}
"""Name -> (plain model -> what steps, or why there is nothing), in the order in which they are measured."""


ROUNDS = 30
"""Of steps in turns. Clocks follow the power that both draw: single ratios spread by some percent."""


def build(layers: int) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        num_hidden_layers=layers, vocab_size=1024, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3Model(config).to(device="cuda", dtype=torch.bfloat16).train()


def measure(name: str, layers: int, tokens: Tensor, profile: bool) -> Row | str:
    """A row of its own, and under `step` its training step, to be taken out."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated()
    model = build(layers)
    compiled = ROWS[name](model)
    if isinstance(compiled, str):
        return compiled

    def step() -> None:
        # A mask of None a layer kind is the causal flash path; left out, the mask is built and every kernel is slower.
        out = compiled(input_ids=tokens, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
        out.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_us(step, repeat=20, warmup=4, flush=False) / 1000
    if profile:
        show_kernels(step)
    return {
        "step_ms": milliseconds, "alone_ms": milliseconds, "compile_s": compile_s,
        "peak_GiB": (torch.cuda.max_memory_allocated() - others) / 2**30, "step": step,
    }  # fmt: skip


def compare(results: dict[str, Any], steps: dict[str, Callable[[], object]]) -> None:
    """Each step in turns with the plain model's: its time, and how much longer it is."""
    plain: list[float] = []
    for name, step in steps.items():
        if name != BASE:
            times = in_turns({BASE: steps[BASE], name: step}, rounds=ROUNDS)
            over = [ratio - 1 for ratio in ratios(times[name], times[BASE])]
            results[name] |= {
                "step_ms": statistics.median(times[name]), "over_plain": statistics.median(over),
                "least_and_greatest": [over[0], over[-1]],
            }  # fmt: skip
            plain += times[BASE]
    results[BASE]["step_ms"] = statistics.median(plain)


def show_kernels(step: Any) -> None:
    """The kernels of a step by device time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = sorted(run.key_averages(), key=lambda row: -row.self_device_time_total)
    print(f"    device total {sum(row.self_device_time_total for row in rows) / 3000:.2f} ms a step")
    for row in rows[:28]:
        print(f"    {row.self_device_time_total / 3000:8.3f} ms  {row.count // 3:4d} x  {row.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", nargs="*", default=None, help="names of rows; * stands for anything")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--seconds", type=float, default=540, help="rows that would begin later are left out and named")
    parser.add_argument("--name", default="step", help="file under benchmarks/results")
    arguments = parser.parse_args()
    only = chosen(ROWS, arguments.only, parser)
    start = time.perf_counter()
    tokens = torch.randint(0, 1024, (arguments.batch, arguments.length), device="cuda")
    results = blank(ROWS, only)
    steps: dict[str, Callable[[], object]] = {}
    path = RESULTS / f"{arguments.name}.json"
    shape = {"layers": arguments.layers, "tokens": [arguments.batch, arguments.length]}
    for name in ROWS:
        if name in only:
            row = functools.partial(measure, name, arguments.layers, tokens, arguments.profile)
            results[name] = attempt(row, start, arguments.seconds)
            if "step" in results[name]:
                steps[name] = results[name].pop("step")
            base = results[BASE].get("step_ms")
            if base and "step_ms" in results[name]:
                results[name]["over_plain"] = results[name]["step_ms"] / base - 1
            record("step", results, path, quiet=True, **shape)
        print(told(name, results[name]), flush=True)
    if BASE in steps and len(steps) > 1:
        compare(results, steps)
        print("in turns:", *(told(name, results[name]) for name in steps), sep="\n", flush=True)
        record("step", results, path, quiet=True, **shape)
    print(f"written: {path}")


def told(name: str, row: Row) -> str:
    """The line that is printed for a row."""
    if "status" in row:
        return f"{name:24s} {row['status']}"
    over = f"{row['over_plain']:+.1%}" if "over_plain" in row else ""
    return (
        f"{name:24s} step {row['step_ms']:7.2f} ms {over:8s} compile {row['compile_s']:6.1f} s  "
        f"peak {row['peak_GiB']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
