"""Tensor-parallel sublayers on two processes: side work beside collectives gives the bits of one stream, and both give
what one process computes with whole matrices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed._functional_collectives  # registers the ops
from torch import fx

from mhc_compile.compat import triton_version
from mhc_compile.scheduler.dag import Task, kind_of
from mhc_compile.scheduler.schedule import movable

RANKS = """
import torch, torch.distributed as dist
from torch.nn.functional import silu
from benchmarks import schedule, schedule_sanitizer, schedule_two as two
from mhc_compile.scheduler import emit

schedule.prepare()
dist.init_process_group("gloo")
two.SITES = 2
tensors = two.inputs(72, torch.device("cpu"), 32, 64)
off = two.Run(tensors, None)()
on = two.Run(tensors, schedule_sanitizer.table(), 0.0)
assert [len(plan.moves) for plan in on.log.plans] == [2, 2], on.log.lines()
assert schedule.equal(on(), off)
with emit.deferred():
    assert schedule.equal(on(), off)

def whole(part, dim):
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part.detach().contiguous())
    return torch.cat(parts, dim)

leaves = [tensors[0].detach()]
for site in range(two.SITES):
    gate, up, down, *rest = (one.detach() for one in tensors[1 + 6 * site : 7 + 6 * site])
    leaves += [whole(gate, 1), whole(up, 1), whole(down, 0), *rest]
leaves = [leaf.requires_grad_() for leaf in leaves]
state = torch.ops.mhc.expand(leaves[0], 4)
for site in range(two.SITES):
    gate, up, down, phi, bias, alpha = leaves[1 + 6 * site : 7 + 6 * site]
    pre, post, res, _ = torch.ops.mhc.coefficients(state, phi, bias, alpha, alpha, alpha, **two.ATTRIBUTES)
    u = torch.ops.mhc.pre(state, pre)
    state = torch.ops.mhc.post(state, (silu(u @ gate) * (u @ up)) @ down, post, res, False)
out = torch.ops.mhc.collapse(state, "mean")
grads = torch.autograd.grad(out.square().mean(), leaves)
torch.testing.assert_close(on()[0], out.detach())
for index in (0, 4, 5, 10, 11):  # x, phi and bias of both sites: what every rank holds whole
    torch.testing.assert_close(on()[1 + index], grads[index], rtol=1e-4, atol=1e-7)
print(f"rank {dist.get_rank()} as one process\\n", end="")  # one write: ranks share the pipe
dist.destroy_process_group()
"""

SHARDS = """
import sys
import torch, torch.distributed as dist, torch._inductor.config
from benchmarks import schedule, schedule_sanitizer, schedule_two as two
from mhc_compile.scheduler import emit

schedule.prepare()
torch._inductor.config.reorder_for_compute_comm_overlap = sys.argv[1] == "overlap"
dist.init_process_group("gloo")
ops, world = torch.ops._c10d_functional, dist.distributed_c10d._get_default_group().group_name

class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard):
        return ops.wait_tensor(ops.all_gather_into_tensor(shard.contiguous(), 2, world))

    @staticmethod
    def backward(ctx, grad):
        return ops.wait_tensor(ops.reduce_scatter_tensor(grad.contiguous(), "sum", 2, world))

def sharded(_):
    def function(x, *parameters):
        state = torch.ops.mhc.expand(x, 4)
        for site in range(2):
            up, down, phi, bias, alpha = parameters[5 * site : 5 * site + 5]
            up, down, phi = Gather.apply(up), Gather.apply(down), Gather.apply(phi)
            pre, post, res, _ = torch.ops.mhc.coefficients(state, phi, bias, alpha, alpha, alpha, **two.ATTRIBUTES)
            y = torch.nn.functional.silu(torch.ops.mhc.pre(state, pre) @ up) @ down
            state = torch.ops.mhc.post(state, y, post, res, False)
        return torch.ops.mhc.collapse(state, "mean")
    return function

two.sublayers = sharded
make = torch.Generator().manual_seed(dist.get_rank())
def random(*shape):
    return torch.randn(*shape, generator=make).mul(0.1).requires_grad_()
tensors = [random(1, 72, 32)]
for site in range(2):
    tensors += [random(16, 64), random(32, 32), random(two.SPEC.rows // 2, 128), random(two.SPEC.rows), random(1)]
off = two.Run(tensors, None)()
on = two.Run(tensors, schedule_sanitizer.table(), 0.0)
assert all(plan.moves for plan in on.log.plans), on.log.lines()
kinds = {task.kind for plan in on.log.plans for task in plan.dag.tasks.values()}
assert {"communication", "wait"} <= kinds, kinds
assert schedule.equal(on(), off)
with emit.deferred():
    assert schedule.equal(on(), off)
print(f"rank {dist.get_rank()} as one stream\\n", end="")  # one write: ranks share the pipe
dist.destroy_process_group()
"""


def ranks(tmp_path: Path, program: str, argument: str, said: str) -> None:
    """Two processes with gloo, Triton's interpreter and inductor's own code; what each has to say at its end."""
    if not triton_version():
        pytest.skip("Triton is not installed")
    script = tmp_path / "ranks.py"
    script.write_text(program)
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    run = subprocess.run(
        [*command, argument], env=environment, cwd=root, capture_output=True, text=True, timeout=580, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert all(f"rank {rank} {said}" in run.stdout for rank in range(2))


@pytest.mark.parametrize("name", [
    "all_reduce", "all_reduce_coalesced", "all_gather_into_tensor", "all_gather_into_tensor_coalesced", "broadcast",
    "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced", "all_to_all_single",
])  # fmt: skip
def test_every_functional_collective_is_communication(name: str) -> None:
    """And stays on the main stream, as the wait for it does."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    started = graph.call_function(getattr(torch.ops._c10d_functional, name).default, (x,))
    waited = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (started,))
    assert (kind_of(started), kind_of(waited)) == ("communication", "wait")
    assert not any(movable(Task(str(node), 1.0, kind_of(node), 1, [node])) for node in (started, waited))


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["overlap", "in order"])
def test_side_work_beside_sharded_parameters(tmp_path: Path, overlap: str) -> None:
    """What FSDP does with parameters: gathered forward, their gradients scattered backward; with inductor's own
    reordering for overlap and without."""
    ranks(tmp_path, SHARDS, overlap, "as one stream")


@pytest.mark.slow
def test_side_work_beside_collectives(tmp_path: Path) -> None:
    """Sums of what each rank gives, as tensor-parallel layers have."""
    ranks(tmp_path, RANKS, "", "as one process")
