"""The lowered forward and backward graphs with kernels, under the interpreter: see test_interpreter.py."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.config import Options
from mhc_compile.lowering.base import TARGETS, LoweringLog
from tests.lowering.graphs import chain, close, gradients, inputs, lowered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chain_with_kernels(dtype: torch.dtype) -> None:
    log, seen = LoweringLog(), []
    compiled = lowered(chain, Options(), log, seen)
    for tokens in (5, 9):
        tensors = inputs(tokens, dtype=dtype)
        torch._dynamo.mark_dynamic(tensors[0], 1)
        exact = gradients(chain, [t.detach().double().requires_grad_() for t in inputs(tokens, dtype=dtype)])
        close(gradients(compiled, tensors), exact, 1e-5 if dtype == torch.float32 else 0.05)
    assert len(seen) == 2, "one compile serves every length"
    counts = log.counts()
    assert counts["coefficients", "triton"] == counts["pre", "triton"] == counts["post", "triton"] == 2
    assert counts["coefficients_backward", "triton"] == counts["post_backward", "triton"] == 2
    assert counts["streams gradient", "fused"] == 2
    assert not any(node.target in TARGETS for gm in seen for node in gm.graph.nodes)


def test_fusion_off_gives_the_same_numbers() -> None:
    on, off = LoweringLog(), LoweringLog()
    a = gradients(lowered(chain, Options(), on, []), inputs(6))
    torch._dynamo.reset()
    b = gradients(lowered(chain, Options(fuse=False), off, []), inputs(6))
    assert off.counts()["streams gradient", "fused"] == 0
    close(a, b, 1e-5)


def test_too_many_steps_run_the_native_backward() -> None:
    from mhc_compile.lowering import sinkhorn
    from mhc_compile.ops import SinkhornSpec

    assert "at most" in sinkhorn.spec_refusal(SinkhornSpec(steps=200), backward=True)
    assert sinkhorn.spec_refusal(SinkhornSpec(steps=200), backward=False) == ""


def test_a_plan_is_replayed_by_one_call() -> None:
    """The same bits with recompute on and off, and the block's sites are rebuilt by the kernel for them."""
    from mhc_compile.backend import mhc, reports
    from tests.tiny import ids, tiny

    results = []
    for recompute in ("off", 2000):
        torch._dynamo.reset()
        model = tiny(layers=2)
        options = {"recompute": recompute, "init": "paper", "sinkhorn_iters": 1}
        output = torch.compile(model, backend=mhc, options=options, fullgraph=True)(ids())
        output.float().square().mean().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters())])
        replays = reports[-1].log.counts()["replay", "fused"]
        assert (replays > 0) == (recompute != "off")
    for off, on in zip(*results, strict=True):
        assert torch.equal(off, on)
