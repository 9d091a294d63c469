"""Peak memory and step time with and without recompute, and how near the predictions come.

    python -m benchmarks.memory                          # H200: 36 layers of the Qwen3 shape, bf16, 1 x 4096, trunk
    python -m benchmarks.memory --layers 4 --only plain off memory        # under two minutes
    python -m benchmarks.memory --only plain off memory --snapshot        # and what is live at the peak
    python -m benchmarks.memory --tiny                   # a CPU run of the same code: no peaks

Rows: ``plain`` (inductor), then the converted model with recompute ``off``, ``memory``, ``speed`` (its budget is
``--memory-budget`` bytes, else 1.15 times the plain model's peak where that has been measured in the same run) and
``checkpoint`` (off, with Hugging Face's gradient checkpointing). For each:

- the bits of the output and of every gradient, which must not depend on recompute (`sums_of`: two integer sums of all
  bits a tensor, in place of the tensors themselves);
- peak (everything allocated: weights, gradients, activations, libraries' workspaces), the one that the report predicts,
  and the median step;
- ``replay_ms``: device time of one step's kernels that the off row does not have, less that of those which only the off
  row has, by name and count in the profiler; and its share of the step.

Attention's backward is made deterministic for the step whose bits are compared, and for that step only: its partial
sums take 0.3 GB more and some time. Forward and compilation are under deterministic algorithms in all steps of all rows
(the same kernels, but for the gradient of the embedding, which is summed in order). Attention is causal flash attention
without a mask in all rows.
"""

from __future__ import annotations

import argparse
import collections
import gc
import linecache
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.device import repeatable
from benchmarks.record import record
from mhc_compile.backend import mhc, reports
from mhc_compile.passes.recompute import RecomputeResult

ROWS = ("plain", "off", "memory", "speed", "checkpoint")
ALLOWED = 1.15
"""The bar of the peak over the plain model's."""
Kernels = dict[str, tuple[int, float]]
"""Name of a kernel -> how often it ran in one step, and microseconds on the device, all of them together."""
Sums = dict[str, tuple[int, int]]


def build(layers: int, tiny: bool, device: str) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    else:
        shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = Qwen3Config(
        **shape, head_dim=16 if tiny else 128, num_hidden_layers=layers, vocab_size=1024, use_cache=False
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3Model(config)
    return model.to(torch.float32 if tiny else torch.bfloat16).train()


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Hyper-connections that do something: at their start all streams are equal."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".mhc" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.add_(noise.to(device=parameter.device, dtype=parameter.dtype))


# ------------------------------------------------------------------------------------------------ bits
@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it kernels that look at the switch when they run (attention's backward) do as `on` says."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def sums_of(value: Tensor) -> tuple[int, int]:
    """The bits of a tensor as integers, modulo 2^64: their sum, and their sum with a pseudo-random odd weight for each
    place. One element that differs changes the second for sure, several but for one case in some 2^63."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    bits = value.detach().contiguous().view(kind).flatten().to(torch.int64)
    weights = torch.arange(bits.numel(), device=bits.device, dtype=torch.int64)
    weights = (weights * 0x9E3779B97F4A7C1 ^ weights << 17) * 2 + 1
    return int(bits.sum()), int((bits * weights).sum())


def bits_of(output: Tensor, model: nn.Module) -> Sums:
    """The sums of the output and of all gradients."""
    sums = {"output": sums_of(output)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            sums[name] = sums_of(parameter.grad)
    return sums


def differences(one: Sums, other: Sums) -> list[str]:
    """Names of what is not the same bits in both, or in one only, in the order of the model."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


# ------------------------------------------------------------------------------------------------ kernels
def kernels_of(step: Callable[[], object]) -> Kernels:
    """The kernels of one step. Inductor numbers its kernels in the order of a graph: the number is left out."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    found: Kernels = {}
    for row in run.key_averages():
        if row.self_device_time_total > 0:
            name = re.sub(r"_\d+$", "", row.key) if row.key.startswith("triton_") else row.key
            count, total = found.get(name, (0, 0.0))
            found[name] = (count + row.count, total + row.self_device_time_total)
    return found


def more_in(one: Kernels, other: Kernels) -> dict[str, float]:
    """Microseconds of the kernels that `one` has more often than `other`, at their mean time there, longest first."""
    more = {}
    for name, (count, total) in one.items():
        times = count - other.get(name, (0, 0.0))[0]
        if times > 0:
            more[f"{times} x {name[:90]}"] = total / count * times
    return dict(sorted(more.items(), key=lambda item: -item[1]))


# ------------------------------------------------------------------------------------------------ the peak
def snapshot(step: Callable[[], object], top: int = 20) -> list[str]:
    """What is live when one step is at its peak: lines of bytes, number, and the line of code that allocated them."""
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=1_000_000)
    step()
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    live: dict[int, tuple[int, str]] = {}
    total, most, at_peak = before, 0, {}
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = (event["size"], _line_of(event.get("frames", ())))
            total += event["size"]
            if total > most:
                most, at_peak = total, dict(live)
        elif event["action"] == "free_requested":
            total -= live.pop(event["addr"], (event["size"], ""))[0]
    bytes_by, count_by = collections.Counter[str](), collections.Counter[str]()
    for size, line in at_peak.values():
        bytes_by[line] += size
        count_by[line] += 1
    lines = [f"{most:,} bytes at the peak of this step, {before:,} of them before it began"]
    lines += [f"{size / 1e6:9.1f} MB {count_by[line]:4d} x {line}" for line, size in bytes_by.most_common(top)]
    rest = sum(size for _, size in bytes_by.most_common()[top:])
    return [*lines, f"{rest / 1e6:9.1f} MB in {max(len(bytes_by) - top, 0)} more lines"]


def _line_of(frames: Any) -> str:
    """The innermost line of Python of an allocation; buffers of generated code without their numbers."""
    for frame in frames:
        text = linecache.getline(frame["filename"], frame["line"]).strip()
        if text:
            return re.sub(r"\b(buf|primals_|arg|mm_|view_|getitem_)\d+", r"\1", text)[:150]
    return "(no Python frame)"


# ------------------------------------------------------------------------------------------------ a row
def run(row: str, arguments: argparse.Namespace, device: str, limit: int | None) -> dict[str, Any]:
    torch._dynamo.reset()
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    length = 16 if arguments.tiny else arguments.length
    model = build(arguments.layers, arguments.tiny, device)
    if row == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {"recompute": "off" if row == "checkpoint" else row}
    if row == "speed" and limit is not None:
        options["memory_budget"] = limit
    if arguments.tiny:
        options["compiler"] = "aot_eager"
    compiled: Any
    if row == "plain":
        compiled = torch.compile(model, backend="aot_eager" if arguments.tiny else "inductor")
    else:
        compiled = torch.compile(model, backend=mhc, options=options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1024, (arguments.batch, length), generator=generator).to(device)
    gradient = torch.randn(arguments.batch, length, model.config.hidden_size, generator=generator) / length
    gradient = gradient.to(device=device, dtype=next(model.parameters()).dtype)

    def step(ordered: bool = False) -> Tensor:
        # A mask of None a layer kind is the causal flash path.
        out: Tensor = compiled(
            input_ids=ids, attention_mask={"full_attention": None}, use_cache=False
        ).last_hidden_state
        with deterministic(ordered):
            out.backward(gradient)
        return out.detach()

    start = time.perf_counter()
    step(ordered=True)
    first = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    disturb(model)
    result: dict[str, Any] = {"bits": bits_of(step(ordered=True), model), "first_step_s": round(first, 1)}
    model.zero_grad(set_to_none=True)
    if on_gpu:
        step()  # the step before left the libraries' workspaces of the other algorithms
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(arguments.steps):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    result["step_ms"] = round(statistics.median(times) * 1e3, 3)
    if row != "plain":
        result |= predicted(next(p for p in reports[-1].passes if p.name == "recompute"))
    if on_gpu:
        result["kernels"] = kernels_of(step)
        model.zero_grad(set_to_none=True)
    if on_gpu and arguments.snapshot:
        result["at_the_peak"] = snapshot(step)
    return result


def predicted(plan: Any) -> dict[str, Any]:
    """What the report says, empty without a plan."""
    if not isinstance(plan, RecomputeResult) or not plan.rows:
        return {}
    return {
        "predicted_peak_bytes": plan.peak,
        "predicted_peak_without_bytes": plan.peak_without,
        "predicted_replay_ms": round(plan.replay_seconds * 1e3, 3),
        "kept_bytes": plan.kept_bytes,
        "kept_without_bytes": plan.kept_without,
        "states_kept": sum(line.state == "kept" for line in plan.rows),
        "inputs_kept": sum(line.branch_input == "kept" for line in plan.rows),
        "sites": len(plan.rows),
    }


def compare(name: str, results: dict[str, dict[str, Any]]) -> None:
    """Ratios of a row to the plain model and to recompute off, where both rows are there."""
    row, plain, off = results[name], results.get("plain"), results.get("off")
    if plain and row["peak_bytes"]:
        row["peak_over_plain"] = round(row["peak_bytes"] / plain["peak_bytes"], 4)
    if row["peak_bytes"] and row.get("predicted_peak_bytes"):
        row["predicted_over_measured"] = round(row["predicted_peak_bytes"] / row["peak_bytes"], 4)
    if not off or name in ("plain", "off"):
        return
    row["step_over_off"] = round(row["step_ms"] / off["step_ms"], 4)
    different = differences(row["bits"], off["bits"])
    row["same_bits_as_off"] = not different
    row["different"] = {"tensors": len(different), "of": len(off["bits"]), "first": different[:1]}
    if row["peak_bytes"] and row.get("predicted_peak_without_bytes"):
        row["predicted_without_over_measured"] = round(row["predicted_peak_without_bytes"] / off["peak_bytes"], 4)
    if "kernels" in row and "kernels" in off:
        more, less = more_in(row["kernels"], off["kernels"]), more_in(off["kernels"], row["kernels"])
        replay = sum(more.values()) - sum(less.values())
        row["replay_ms"] = round(replay / 1e3, 3)
        row["replay_over_step"] = round(replay / 1e3 / row["step_ms"], 4)
        row["more_us"] = {key: round(value, 1) for key, value in list(more.items())[:12]}
        row["less_us"] = {key: round(value, 1) for key, value in list(less.items())[:12]}


def told(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what only the comparison needs; the device time of all kernels instead of each."""
    shown = {key: value for key, value in row.items() if key not in ("bits", "kernels")}
    if "kernels" in row:
        shown["device_ms"] = round(sum(total for _, total in row["kernels"].values()) / 1e3, 3)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layers", type=int, default=0, help="36, or 2 with --tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--memory-budget", type=int, help="bytes, of the row speed")
    parser.add_argument("--snapshot", action="store_true", help="list what is live at the peak of each row")
    parser.add_argument("--seconds", type=float, default=900, help="rows that would begin later are left out and named")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or (2 if arguments.tiny else 36)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeatable()
    results: dict[str, dict[str, Any]] = {}
    shape = {"tiny": arguments.tiny, "layers": arguments.layers, "batch": arguments.batch, "length": arguments.length}
    path: object = "nothing"
    start = time.perf_counter()
    for row in arguments.only:
        if time.perf_counter() - start > arguments.seconds:
            print(f"left out, no time: {row}", flush=True)
            continue
        measured = results.get("plain", {}).get("peak_bytes")
        limit = arguments.memory_budget or (int(ALLOWED * measured) if measured else None)
        results[row] = run(row, arguments, device, limit)
        compare(row, results)
        lines = "\n".join(f"    {key}: {value}" for key, value in told(results[row]).items() if key != "at_the_peak")
        print(f"{row}:\n{lines}", flush=True)
        for line in results[row].get("at_the_peak", ()):
            print(f"        {line}", flush=True)
        # After every row: a run that is cut off keeps what it has.
        path = record("memory", {name: told(one) for name, one in results.items()}, arguments.out, quiet=True, **shape)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
