"""A training run end to end: does the loss fall, is it one graph, is it compiled once?

    python -m benchmarks.train                     # H200: Qwen3 at hidden 2560, 4 layers, bf16, 2 x 4096, 20 steps
    python -m benchmarks.train --tiny              # a CPU run of the same code

Trains the plain model (inductor) and the converted one (each variant asked for) on the same fixed batch from the same
start with AdamW and reports for each: loss at every step, graphs, compilations after the first step, median step time,
peak memory, seconds to the first step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch

from benchmarks.record import record


def build(tiny: bool, device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    if tiny:
        config = Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16, vocab_size=512)  # fmt: skip
        batch, length, dtype = 2, 32, torch.float32
    else:
        config = Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=4, num_attention_heads=32,
                             num_key_value_heads=8, head_dim=128, vocab_size=32768)  # fmt: skip
        batch, length, dtype = 2, 4096, torch.bfloat16
    config.use_cache = False
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype)
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
    return model.train(), {"input_ids": ids, "labels": ids}


def run(name: str, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    model, batch = build(arguments.tiny, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    if name == "plain":
        compiled = torch.compile(model)
    else:
        compiled = torch.compile(model, backend="mhc", options={"variant": name})
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, times, graphs_after_first = [], [], 0
    for step in range(arguments.steps):
        start = time.perf_counter()
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        if step == 0:
            graphs_after_first = counters["stats"]["unique_graphs"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    result = {
        "losses": [round(value, 4) for value in losses],
        "falls": losses[-1] < losses[0],
        "graphs": graphs_after_first,
        "graph_breaks": sum(counters["graph_break"].values()),
        "compilations_after_first_step": counters["stats"]["unique_graphs"] - graphs_after_first,
        "all_parameters_in_the_optimizer": all(id(p) in held for p in model.parameters()),
        "first_step_s": round(times[0], 2),
        "step_ms": round(statistics.median(times[min(5, len(times) - 1) :]) * 1e3, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {result['step_ms']} ms a step", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variants", nargs="*", default=["mhc"])
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {name: run(name, arguments, device) for name in ["plain", *arguments.variants]}
    record("train", results, arguments.out, tiny=arguments.tiny)


if __name__ == "__main__":
    main()
