"""Time of our own passes over the depth of a model, and their share of a whole compilation.

    python -m benchmarks.scaling                      # tiny Llama of 12, 36 and 96 layers: passes only
    python -m benchmarks.scaling --whole 36           # and a cold compilation by inductor of 36 layers

For each depth: nodes of the graph, seconds of each pass, of everything that this package does in front of the compiler
(``convert``: copy, passes, report), and of the first call. Least of ``--repeat`` runs, for what comes on top is the
neighbours' and the garbage collector's; a row says how the passes grow between the depths (1 = linear in nodes).
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import tempfile
import time
from typing import Any

import torch

from benchmarks.record import record
from mhc_compile import backend
from mhc_compile.backend import mhc, reports

SHARE = 0.05
"""The bar: our part of a whole compilation."""


def build(layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=128, use_cache=False)  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def first_step(layers: int, compiler: str) -> dict[str, Any]:
    """Seconds of the first forward and backward, of ``convert``, and of each pass; nodes in Dynamo's graph."""
    torch._dynamo.reset()
    gc.collect()
    model, ids = build(layers), torch.randint(0, 128, (2, 16))
    spent, nodes = [], []
    convert = backend.convert

    def timed(gm: torch.fx.GraphModule, *rest: Any) -> Any:
        nodes.append(len(gm.graph.nodes))
        start = time.perf_counter()
        conversion = convert(gm, *rest)
        spent.append(time.perf_counter() - start)
        return conversion

    backend.convert = timed
    try:
        start = time.perf_counter()
        compiled: Any = torch.compile(model, backend=mhc, options={"compiler": compiler})
        compiled(input_ids=ids, labels=ids).loss.backward()
        whole = time.perf_counter() - start
    finally:
        backend.convert = convert
    passes = {result.name: result.seconds for result in reports[-1].passes}
    return {"nodes": nodes[0], "first_step_s": whole, "convert_s": spent[0], **{f"{k}_s": v for k, v in passes.items()}}


def least(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each number."""
    return {key: round(min(run[key] for run in runs), 4) for key in runs[0]}


def growth(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float]:
    """Exponent of each time over the number of nodes, for what takes more than a few milliseconds."""
    nodes = math.log(large["nodes"] / small["nodes"])
    keys = [key for key in small if key.endswith("_s") and small[key] > 0.005]
    return {key.removesuffix("_s"): round(math.log(large[key] / small[key]) / nodes, 2) for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[12, 36, 96])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--whole", type=int, default=0, help="layers of one cold compilation by inductor")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    first_step(1, "eager")  # imports
    results: dict[str, Any] = {}
    for layers in arguments.layers:
        results[f"{layers} layers"] = least([first_step(layers, "eager") for _ in range(arguments.repeat)])
        print(f"{layers} layers: {results[f'{layers} layers']}", flush=True)
    if len(arguments.layers) > 1:
        first, last = (results[f"{layers} layers"] for layers in (arguments.layers[0], arguments.layers[-1]))
        results["growth"] = growth(first, last)
        print(f"growth: {results['growth']}", flush=True)
    if arguments.whole:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            row = least([first_step(arguments.whole, "inductor")])
        row["share"] = round(row["convert_s"] / row["first_step_s"], 4)
        row["bar"] = SHARE
        results[f"{arguments.whole} layers, inductor, cold"] = row
        print(f"whole: {row}", flush=True)
    record("scaling", results, arguments.out, model="tiny Llama, hidden 64, training step", repeat=arguments.repeat)


if __name__ == "__main__":
    main()
