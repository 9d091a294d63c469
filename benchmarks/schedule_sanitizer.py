"""PyTorch's CUDA sanitizer over a planned forward and backward: does every kernel wait for what it reads?

    TORCH_CUDA_SANITIZER=1 python -m benchmarks.schedule_sanitizer

Two hyper-connected sites of small size, every movable call on the side stream. The two graphs run as they are planned,
a call of an operator a node (no code of inductor's, whose launches the sanitizer does not see), and what runs inside of
a fork is shown to the sanitizer as well. First as it is, which has to be clean; then with the joins' waits left out,
which has to be found, or the first answer would mean nothing. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.cuda._sanitizer as sanitizer
from torch import Tensor, fx

from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from mhc_compile.lowering.side import split_coefficients
from mhc_compile.ops import CoefficientSpec
from mhc_compile.scheduler import emit
from mhc_compile.scheduler.assign import MAIN_KINDS
from mhc_compile.scheduler.contention import Contention, Pair
from mhc_compile.scheduler.main_stream import Raised
from mhc_compile.scheduler.schedule import forks, plan_graph

SIDES = ("mhc_kernel.activate", "mhc_kernel.logits_backward_early", "aten.mm.dtype")
SPEC = CoefficientSpec()


def table() -> Contention:
    """Every side call free beside everything, whatever its size."""
    sizes = [10 * 4**power for power in range(12)]
    pairs = [
        Pair(m, s, size, False, 1e-5, 1e-3, 1.0, 1.0, 1.0, 1.0) for m in MAIN_KINDS for s in SIDES for size in sizes
    ]
    return Contention("every call is free", tuple(pairs))


def model(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
    """Two sites around a branch of three matmuls."""
    state = torch.ops.mhc.expand.default(x, 4)
    for index in range(2):
        own = parameters[5 * index : 5 * index + 5]
        pre, post, res, _ = torch.ops.mhc.coefficients.default(state, *own, **SPEC.op_arguments())
        y = torch.ops.mhc.pre.default(state, pre)
        for _ in range(3):
            y = torch.nn.functional.silu(y @ w)
        state = torch.ops.mhc.post.default(state, y, post, res, False)
    return torch.ops.mhc.collapse.default(state, "mean")


def inputs(device: str, tokens: int = 128, width: int = 256, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x, w, and phi, bias and three alphas of each site."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype).requires_grad_()

    tensors = [random(1, tokens, width, dtype=dtype), random(width, width, scale=0.06, dtype=dtype)]
    for _ in range(2):
        tensors += [random(SPEC.rows, 4 * width, scale=0.1), random(SPEC.rows), *(random(1) for _ in range(3))]
    return tensors


def planned(tensors: list[Tensor]) -> tuple[fx.GraphModule, fx.GraphModule, list[str]]:
    """(forward graph, backward graph, the calls that each moves), lowered and planned; nothing runs."""
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    seen: list[fx.GraphModule] = []
    moved: list[str] = []

    def compiler(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        LowerPass(Options(autotune=False), LoweringLog())(gm.graph)
        plan_graph(gm.graph, table(), split=split_coefficients, least_gain=0.0, forced=True)
        moved.extend(forks(gm.graph))
        gm.graph.eliminate_dead_code()
        gm.recompile()
        seen.append(gm)
        return make_boxed_func(gm.forward)

    call = aot_function(
        model, fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    out = call(*tensors)
    torch.autograd.grad(out.float().sum(), tensors)
    forward, backward = seen
    return forward, backward, moved


def run(forward: fx.GraphModule, backward: fx.GraphModule, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients, the graphs called by hand, on the main stream of this one."""
    with torch.no_grad():
        out, *saved = Raised(lambda given: forward(*given))([tensor.detach() for tensor in tensors])
        return [out, *Raised(lambda given: backward(*given))([*saved, torch.ones_like(out)])]


def checked(forward: fx.GraphModule, backward: fx.GraphModule, tensors: list[Tensor], runs: int) -> str:
    """``clean``, or what the sanitizer found first."""
    try:
        for _ in range(runs):
            run(forward, backward, tensors)
            torch.cuda.synchronize()
    except sanitizer.CUDASanitizerErrors as found:
        return f"{found}: {found.errors[0]}".split("With stack trace")[0].strip()[:800]
    finally:
        torch.cuda.synchronize()
    return "clean"


def main() -> None:
    """Compile without the sanitizer, whose mode tracing does not know; run with it."""
    watcher = sanitizer.cuda_sanitizer
    if watcher.enabled:
        watcher.disable()
    tensors = inputs("cuda")
    forward, backward, moved = planned(tensors)
    run(forward, backward, tensors)  # compiles the kernels
    torch.cuda.synchronize()
    alone, pending = emit.run_call, emit._Pending

    def watched(call: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        with watcher.dispatch:
            return alone(call, inputs)

    def forgotten(call: str, given: list[Tensor], results: list[Tensor] | None, done: Any = None) -> Any:
        return pending(call, given, results, None)

    emit.run_call = watched
    watcher.enable()
    found: dict[str, Any] = {"moved": moved, "as_planned": checked(forward, backward, tensors, 10)}
    emit._Pending = forgotten  # type: ignore[assignment,misc]  # the planted fault: no event for the join
    found["without_the_waits"] = checked(forward, backward, tensors, 1)
    watcher.disable()
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
