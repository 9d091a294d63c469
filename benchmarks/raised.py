"""A training step of a model that has hyper-connections of its own: python -m benchmarks.raised [--tokens 4096].

Hugging Face's DeepSeek-V4 in a small configuration widened to a hidden size of 2560, bf16, forward and backward,
through `backend="inductor"` and through `backend="mhc"`, which raises its hyper-connections and runs them as our
kernels.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from torch import nn

from benchmarks.device import median_us
from benchmarks.record import RESULTS, record


def build(layers: int, hidden: int, device: str) -> nn.Module:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as module

    config = module.DeepseekV4Config(
        vocab_size=1024, hidden_size=hidden, moe_intermediate_size=hidden // 4, num_attention_heads=16,
        num_experts_per_tok=2, max_position_embeddings=8192, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, num_hidden_layers=layers, head_dim=128, q_lora_rank=512, partial_rotary_factor=0.5,
        n_routed_experts=8, sliding_window=128, o_groups=4, o_lora_rank=256, index_n_heads=4, index_head_dim=64,
        index_topk=64, layer_types=["sliding_attention"] * layers, mlp_layer_types=["moe"] * layers,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(device):
        return module.DeepseekV4Model(config).to(torch.bfloat16).train()


def measure(backend: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model = build(arguments.layers, arguments.width, "cuda")
    tokens = torch.randint(0, 1024, (1, arguments.tokens), device="cuda")
    compiled: Any = model if backend is None else torch.compile(model, backend=backend)

    def step() -> None:
        out = compiled(input_ids=tokens, use_cache=False).last_hidden_state
        out.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_us(step, repeat=10, warmup=3, flush=False) / 1000
    return {
        "step_ms": milliseconds,
        "compile_s": compile_s,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--name", default="raised", help="file under benchmarks/results")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name, backend in (("eager", None), ("mhc", "mhc"), ("torch.compile", "inductor")):
        torch._dynamo.utils.counters.clear()
        try:
            results[name] = measure(backend, arguments)
        except Exception as error:  # a failing row is a row of the table
            results[name] = {"status": f"failed: {type(error).__name__}: {str(error)[:600]}"}
        print(f"{name:16s} {results[name]}", flush=True)
    shape = {"layers": arguments.layers, "tokens": arguments.tokens, "width": arguments.width}
    record("raised", results, RESULTS / f"{arguments.name}.json", **shape)


if __name__ == "__main__":
    main()
