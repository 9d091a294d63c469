"""Two compiled stages under a schedule of torch.distributed.pipelining: ``python -m tests.distributed.stages <compiler>
<rendezvous file>``, two processes over gloo."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import mhc_compile
from mhc_compile.backend import reports
from mhc_compile.pipeline import split_stages
from mhc_compile.standalone import StandaloneGraph
from tests.passes.models import WIDTH, Block, Stack, tokens

STATE = 2 * 5 * 4 * WIDTH * 4
"""Bytes of a stream state of one microbatch."""
CHUNKS = 4
CASES: dict[str, list[tuple[str, Any]]] = {
    "aot_eager": [("mhc", ScheduleGPipe), ("mhc", Schedule1F1B), ("single_pass", Schedule1F1B)],
    "inductor": [("mhc", Schedule1F1B)],
}


def whole(variant: str) -> StandaloneGraph:
    torch.manual_seed(3)
    return mhc_compile.standalone(Stack([Block() for _ in range(4)]), tokens(), init="paper", variant=variant)


def loss_of(output: Any, target: Tensor) -> Tensor:
    """Of the tuple that a graph gives."""
    return (output[0] - target).square().sum()


def case(rank: int, compiler: str, variant: str, schedule: Any) -> None:
    """Losses, and the gradients of a stage's parameters, are those of the whole, microbatch after microbatch."""
    inputs, targets = tokens(2 * CHUNKS, 5, 3), tokens(2 * CHUNKS, 5, 3, seed=8)
    graph = whole(variant)
    losses: list[Tensor] = []
    for x, target in zip(inputs.chunk(CHUNKS), targets.chunk(CHUNKS), strict=True):
        losses.append(loss_of(graph(x), target))
        losses[-1].backward()
    mine = split_stages(whole(variant), [4])[rank]
    options = {"rewrite": False, "recompute": 2 * STATE, "compiler": compiler}
    stage = PipelineStage(torch.compile(mine, backend="mhc", options=options), rank, 2, torch.device("cpu"))
    steps = schedule(stage, CHUNKS, loss_fn=loss_of, scale_grads=False)
    if rank == 0:
        steps.step(inputs)
    else:
        found: list[Tensor] = []
        steps.step(target=targets, losses=found)
        check(compiler, found, losses)
    wanted = {name: parameter.grad for name, parameter in graph.named_parameters()}
    parameters = dict(mine.named_parameters())
    assert parameters
    check(compiler, [one.grad for one in parameters.values()], [wanted[name] for name in parameters])
    plan = next(one for one in reports[-1].passes if one.name == "recompute")
    assert plan.changed > 0, plan.notes


def check(compiler: str, got: list[Any], wanted: list[Any]) -> None:
    """The same bits; of what inductor has fused the same numbers (some gradients of alpha are nothing but rounding)."""
    largest = max(float(one.abs().max()) for one in wanted)
    rtol, atol = (0.0, 0.0) if compiler == "aot_eager" else (1e-3, 1e-6 * largest)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def worker(rank: int, compiler: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for variant, schedule in CASES[compiler]:
            torch._dynamo.reset()
            case(rank, compiler, variant, schedule)
            print(f"{variant} {schedule.__name__}: passed", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(worker, args=(sys.argv[1], sys.argv[2]), nprocs=2)
