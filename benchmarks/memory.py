"""Peak memory and step time with and without recompute, and how near the predictions come.

    python -m benchmarks.memory                          # H200: 36 layers of the Qwen3 shape, bf16, 1 x 4096, trunk
    python -m benchmarks.memory --only plain memory      # two rows (each compiles 36 layers: minutes)
    python -m benchmarks.memory --tiny                   # a CPU run of the same code: no peaks

Rows: ``plain`` (inductor), then the converted model with recompute ``off``, ``memory``, ``speed`` (its budget is 1.15
times the plain model's peak where that has been measured in the same run) and ``checkpoint`` (off, with Hugging Face's
gradient checkpointing). For each: peak (everything allocated: weights, gradients, activations), the peak that the
report predicts, median step, and a checksum of the gradients' bits, which must not depend on recompute.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks.record import record
from mhc_compile.backend import mhc, reports
from mhc_compile.passes.recompute import RecomputeResult

ROWS = ("plain", "off", "memory", "speed", "checkpoint")
ALLOWED = 1.15
"""The bar of the peak over the plain model's."""


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


def checksum(model: nn.Module) -> int:
    """The bits of the model's own gradients, summed as integers: equal gradients have equal sums."""
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and ".mhc" not in name:
            kind = torch.int16 if parameter.dtype == torch.bfloat16 else torch.int32
            total += int(parameter.grad.contiguous().view(kind).sum(dtype=torch.int64))
    return total


def run(row: str, arguments: argparse.Namespace, device: str, limit: int | None) -> dict[str, Any]:
    torch._dynamo.reset()
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    layers = arguments.layers or (2 if arguments.tiny else 36)
    length = 16 if arguments.tiny else arguments.length
    model = build(layers, arguments.tiny, device)
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
    ids = torch.randint(0, 1024, (arguments.batch, length), device=device)
    gradient = torch.randn(arguments.batch, length, model.config.hidden_size, device=device).to(model.dtype) / length

    def step() -> None:
        compiled(input_ids=ids, use_cache=False).last_hidden_state.backward(gradient)

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    bits = checksum(model)
    model.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.synchronize()
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
    result: dict[str, Any] = {
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "step_ms": round(statistics.median(times) * 1e3, 3),
        "first_step_s": round(first, 1),
        "gradient_bits": bits,
    }
    if row != "plain":
        result |= predicted(next(p for p in reports[-1].passes if p.name == "recompute"))
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


def compare(results: dict[str, dict[str, Any]]) -> None:
    """Ratios to the plain model and to recompute off, where both rows are there."""
    for row in results.values():
        plain, off = results.get("plain"), results.get("off")
        if plain and row["peak_bytes"]:
            row["peak_over_plain"] = round(row["peak_bytes"] / plain["peak_bytes"], 4)
        if off:
            row["step_over_off"] = round(row["step_ms"] / off["step_ms"], 4)
            row["same_bits_as_off"] = row["gradient_bits"] == off["gradient_bits"]
        if row["peak_bytes"] and row.get("predicted_peak_bytes"):
            row["predicted_over_measured"] = round(row["predicted_peak_bytes"] / row["peak_bytes"], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layers", type=int, default=0, help="36, or 2 with --tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, dict[str, Any]] = {}
    for row in arguments.only:
        measured = results.get("plain", {}).get("peak_bytes")
        results[row] = run(row, arguments, device, int(ALLOWED * measured) if measured else None)
        compare(results)
        print(f"{row}: {results[row]}", flush=True)
    record("memory", results, arguments.out, tiny=arguments.tiny, layers=arguments.layers, batch=arguments.batch)


if __name__ == "__main__":
    main()
