"""Tensor-parallel sublayers on two processes: side work beside collectives gives the bits of one stream, and both give
what one process computes with whole matrices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_compile.compat import triton_version

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
print("rank", dist.get_rank(), "as one process")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_side_work_beside_collectives(tmp_path: Path) -> None:
    """gloo, Triton's interpreter, inductor's own code."""
    if not triton_version():
        pytest.skip("Triton is not installed")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert all(f"rank {rank} as one process" in run.stdout for rank in range(2))
