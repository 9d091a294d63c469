"""A training step of a model that has hyper-connections of its own: python -m benchmarks.raised [--tokens 4096].

Hugging Face's DeepSeek-V4 in a small configuration widened to a hidden size of 2560, bf16, forward and backward,
through `backend="inductor"` and through `backend="mhc"`, which raises its hyper-connections and runs them as our
kernels. One layer (two sites, and the head that collapses the streams): inductor needs some 15 seconds for the 20
spelled-out rounds of every site, besides what attention and experts need.

The result has every row and is written after each: a row that would begin after `--seconds`, one that fails and one
that `--only` leaves out are "not measured", with the reason.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.device import median_us
from benchmarks.record import RESULTS, record
from benchmarks.table import Row, attempt, blank
from mhc_compile.backend import mhc, reports


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


ROWS = {"eager": None, "mhc": "mhc", "torch.compile": "inductor"}
"""Name -> backend, in the order in which they are measured: what compiles longest comes last."""


def training_step(backend: str | None, layers: int, width: int, tokens: int, device: str) -> Callable[[], None]:
    """Forward and backward of a fresh model on one row of ``tokens`` tokens; None is eager."""
    model = build(layers, width, device)
    ids = torch.randint(0, 1024, (1, tokens), device=device, generator=torch.Generator(device=device).manual_seed(1))
    own: Any = mhc if backend == "mhc" else backend  # its name is known only where the package is installed
    compiled: Any = model if backend is None else torch.compile(model, backend=own)

    def step() -> None:
        out = compiled(input_ids=ids, use_cache=False).last_hidden_state
        out.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def measure(name: str, arguments: argparse.Namespace) -> Row:
    backend = ROWS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    torch.cuda.empty_cache()
    step = training_step(backend, arguments.layers, arguments.width, arguments.tokens, "cuda")
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_us(step, repeat=10, warmup=3, flush=False) / 1000
    passes = reports[-1].passes if backend == "mhc" else ()
    return {
        "step_ms": milliseconds,
        "compile_s": compile_s,
        "our_passes_s": {one.name: round(one.seconds, 2) for one in passes if one.seconds >= 0.01},
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def compare(results: dict[str, Row]) -> None:
    """How much faster each row that was measured is than eager and than torch.compile, beside its time."""
    for other in ("eager", "torch.compile"):
        base = results.get(other, {}).get("step_ms")
        for name, row in results.items():
            if base and "step_ms" in row and name != other:
                row[f"faster_than_{other}"] = base / row["step_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="two sites each")
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=200, help="rows that would begin later are left out and named")
    parser.add_argument("--name", default="raised", help="file under benchmarks/results")
    arguments = parser.parse_args()
    start = time.perf_counter()
    results = blank(ROWS, arguments.only)
    path = RESULTS / f"{arguments.name}.json"
    facts = {
        "model": "DeepSeek-V4, Hugging Face, tiny configuration with a wider hidden size",
        "layers": arguments.layers, "sites": 2 * arguments.layers, "tokens": arguments.tokens, "width": arguments.width,
    }  # fmt: skip
    for name in ROWS:
        if name in arguments.only:
            results[name] = attempt(functools.partial(measure, name, arguments), start, arguments.seconds)
            compare(results)
            record("raised", results, path, quiet=True, **facts)
        print(f"{name:16s} {results[name]}", flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
