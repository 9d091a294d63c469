"""Side streams beside communication, on two GPUs: tensor-parallel feed-forward sublayers, forward and backward.

    python -m benchmarks.schedule --two-gpus     # starts two processes of this module with torchrun; about a minute

Four hyper-connected feed-forward sublayers of the Qwen3 shape whose matrices are split over the ranks: an all-reduce of
what each gives to its site forward, and of the gradient of what it reads backward. While the main stream waits for the
network, post, res and Sinkhorn, their backward and the gradient of phi have the GPU for themselves.

In this order: pairs on each GPU; the kernels beside an all-reduce; for each number of tokens the sublayers compiled on
one stream and with the plan that the pairs of rank 0 give, both captured as CUDA graphs and timed in turns, also with
plain launches; the bits of both; a trace of rank 0 with the predicted timeline beside it.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.record import RESULTS, record
from benchmarks.schedule import WIDTH, cases, equal, others, prepare, timed
from benchmarks.traces import beside, changed, overlap, traced
from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches
from mhc_compile.lowering.side import split_coefficients
from mhc_compile.ops import CoefficientSpec
from mhc_compile.scheduler import communication
from mhc_compile.scheduler import contention as contention_of
from mhc_compile.scheduler.assign import LEAST_GAIN
from mhc_compile.scheduler.contention import Contention
from mhc_compile.scheduler.schedule import ScheduleLog, schedule_patches, using
from mhc_compile.scheduler.timeline import text

SITES = 4
INNER = 9728
TOKENS = (1024, 8192)
ROUNDS = 41
"""Of timed steps: a number, for the ranks would part by a clock."""
SPEC = CoefficientSpec()
ATTRIBUTES = SPEC.op_arguments()


def reduced(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks, as the functional collectives that compiled graphs hold."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


class Reduce(torch.autograd.Function):
    """All-reduce forward, nothing backward: behind a matrix that is split by rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        """The sum over the ranks."""
        return reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # one gradient
        """The gradient is the same on all ranks."""
        return grad, None


class Copy(torch.autograd.Function):
    """Nothing forward, all-reduce backward: before matrices that are split by columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        """x itself."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # one gradient
        """The sum over the ranks."""
        return reduced(grad, ctx.group), None


def sublayers(group: str) -> Callable[..., Tensor]:
    """(x, then per site gate, up, down, phi, bias, alpha) -> the collapsed streams."""

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        state = torch.ops.mhc.expand(x, 4)
        for site in range(SITES):
            gate, up, down, phi, bias, alpha = parameters[6 * site : 6 * site + 6]
            pre, post, res, _ = torch.ops.mhc.coefficients(state, phi, bias, alpha, alpha, alpha, **ATTRIBUTES)
            u = Copy.apply(torch.ops.mhc.pre(state, pre), group)
            y = Reduce.apply((nn.functional.silu(u @ gate) * (u @ up)) @ down, group)
            state = torch.ops.mhc.post(state, y, post, res, False)
        return torch.ops.mhc.collapse(state, "mean")

    return function


def inputs(tokens: int, device: torch.device, width: int = WIDTH, inner: int = INNER) -> list[Tensor]:
    """x and what is shared by the ranks (the same on all of them), and this rank's part of the matrices."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shared, own = (torch.Generator(device=device).manual_seed(seed) for seed in (0, 1 + dist.get_rank()))
    part = inner // dist.get_world_size()

    def random(generator: torch.Generator, *shape: int, scale: float = 0.02, dtype: torch.dtype = dtype) -> Tensor:
        tensor = torch.randn(*shape, device=device, generator=generator) * scale
        return tensor.to(dtype).requires_grad_()

    tensors = [random(shared, 1, tokens, width, scale=1.0)]
    for _ in range(SITES):
        tensors += [random(own, width, part), random(own, width, part), random(own, part, width)]
        tensors += [random(shared, SPEC.rows, 4 * width, dtype=torch.float32)]
        tensors += [random(shared, SPEC.rows, dtype=torch.float32), random(shared, 1, scale=0.3, dtype=torch.float32)]
    return tensors


class Run:
    """The sublayers compiled on one stream, or planned with a table; called for one forward and backward."""

    def __init__(self, tensors: list[Tensor], table: Contention | None, least_gain: float = LEAST_GAIN) -> None:
        torch._dynamo.reset()
        self.tensors, self.log = tensors, ScheduleLog()
        patches: Any = config_patches(Options(autotune=False), LoweringLog())
        if table is not None:
            with using(table, least_gain):
                patches = schedule_patches(patches, self.log, split_coefficients, "benchmark")
        world = dist.distributed_c10d._get_default_group().group_name
        self.call: Callable[..., Tensor] = torch.compile(sublayers(world), fullgraph=True, options=patches)
        start = time.perf_counter()
        self()
        self.compile_s = time.perf_counter() - start

    def __call__(self) -> list[Tensor]:
        """Output and gradients."""
        out = self.call(*self.tensors)
        loss = out.float().square().mean()
        return [out.detach(), *torch.autograd.grad(loss, self.tensors)]

    @property
    def moves(self) -> int:
        """Calls on the side stream, both graphs together."""
        return sum(len(plan.moves) for plan in self.log.plans)


def measured(rounds: int = 15) -> Contention:
    """The pairs of this GPU and those beside the network: what rank 0 has measured, on every rank."""
    sizes = [(tokens, WIDTH) for tokens in TOKENS]
    found = contention_of.calibrate(cases, others, sizes, (True,), rounds)
    return communication.together(found, cases, sizes, (True,), rounds)


def graphed(run: Run) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """One forward and backward as a CUDA graph, and the tensors that it writes."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        results = run()
    return graph, results


def compared(off: Run, on: Run, trace: Path) -> dict[str, Any]:
    """Times and bits of a run on one stream and one with a plan; rank 0 writes the trace of a replay."""
    row: dict[str, Any] = {"plan": on.log.lines(), "moves": on.moves, "compile_s": round(on.compile_s, 1)}
    reference = [one.clone() for one in off()]
    repeats = sum(equal(off(), reference) for _ in range(25))
    fine = sum(equal(on(), reference) for _ in range(100))
    row["equal"] = {"one_stream_repeats": f"{repeats} of 25", "runs": 100, "equal": fine}
    row["launches"] = timed({"off": off, "on": on}, rounds=ROUNDS)
    try:
        graphs = {"off": graphed(off), "on": graphed(on)}
        row["graphs"] = timed({name: graph.replay for name, (graph, _) in graphs.items()}, rounds=2 * ROUNDS)
        row["graphs"]["equal"] = equal(graphs["on"][1], graphs["off"][1])
        kernels = {name: traced(graph.replay) for name, (graph, _) in graphs.items()}
        facts = {**overlap(kernels["on"]), "changed_us": changed(kernels["off"], kernels["on"])}
        row["graphs"]["trace"] = {"file": trace.name, **facts}
        if dist.get_rank() == 0:
            beside(trace, on.log.plans, kernels["on"])
    except RuntimeError as error:  # a capture that fails is a row of the table
        row["graphs"] = {"status": f"failed: {str(error)[:400]}"}
    return row


def main() -> None:
    """One of two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="the JSON; the trace goes beside it")
    arguments = parser.parse_args()
    start = time.perf_counter()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    prepare()
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    folder = Path(arguments.out).parent if arguments.out else RESULTS
    results: dict[str, Any] = {}

    def say(*lines: object) -> None:
        if rank == 0:
            print(*lines, sep="\n", flush=True)

    with torch.cuda.stream(torch.cuda.Stream(priority=-1)):  # graphs of inductor's own seam: nothing raises them
        table = measured()
        results |= {"pairs": [asdict(pair) for pair in table.pairs], "alone": [asdict(one) for one in table.alone]}
        say(contention_of.table(table), f"{time.perf_counter() - start:.1f} s")
        for tokens in TOKENS:
            tensors = inputs(tokens, device)
            off, on = Run(tensors, None), Run(tensors, table)
            say(f"{tokens} tokens: {on.moves} moves", *(text(plan) for plan in on.log.plans))
            least = torch.tensor(on.moves, device=device)
            dist.all_reduce(least, dist.ReduceOp.MIN)  # the ranks go on alike, or wait for each other for ever
            row = {"plan": on.log.lines(), "moves": on.moves}
            if int(least):
                row = compared(off, on, folder / f"schedule-two-gpus-trace-{tokens}.json")
            results[f"{tokens} tokens"] = row
            say(f"{tokens} tokens: {row}")
            if rank == 0:  # a run that is cut off keeps what it has
                record("schedule-two-gpus", results, arguments.out, quiet=True)
    results["seconds"] = round(time.perf_counter() - start, 1)
    if rank == 0:
        record("schedule-two-gpus", results, arguments.out)
    gc.collect()  # captured collectives go before what they run on
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
