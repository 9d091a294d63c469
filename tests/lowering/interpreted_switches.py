"""Each fusion on its own off: the same numbers, and its line is not in the report. See test_interpreter.py."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from mhc_compile.config import FUSIONS, Options
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.graphs import SPEC, close, gradients, inputs, lowered

LINES = {
    "stream_gradient": "streams gradient",
    "site_boundary": "site boundary",
    "post_pre_norm": "post + pre_norm",
    "few_tokens": "few tokens",
    "addends": "gradient sum",
}
"""What the log calls them. `norm` is a pass in front of autograd, `replay` needs a plan."""

MANY = (33, True)
"""Twice 33 tokens, more than the few; with gradients."""


def sites(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
    """Two sites whose gates are known before the streams, their branches read by two products each."""
    state = torch.ops.mhc.expand.default(x, 4)
    gate = torch.full((*x.shape[:-1], 4), 0.25, device=x.device)
    weight = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
    for index in range(2):
        own = parameters[5 * index : 5 * index + 5]
        _, post, res, _ = torch.ops.mhc.coefficients.default(state, *own, **SPEC.op_arguments())
        u, *_ = torch.ops.mhc.pre_norm.default(state, gate, weight, None, "rms", 1e-6, 0.0, True)
        y = torch.nn.functional.silu(u @ w) * (u @ w.t())
        state = torch.ops.mhc.post.default(state, y, post, res, False)
    return torch.ops.mhc.collapse.default(state, "mean")


@functools.cache
def run(fuse: bool | tuple[str, ...], tokens: int, grad: bool) -> tuple[list[Tensor], set[str]]:
    torch._dynamo.reset()
    log = LoweringLog()
    compiled = lowered(sites, Options(fuse=fuse), log, [])
    tensors = inputs(tokens, dtype=torch.bfloat16)
    if grad:
        found = gradients(compiled, tensors)
    else:
        with torch.no_grad():
            found = [compiled(*tensors)]
    return found, {entry.op for entry in log.entries if entry.provider == "fused"}


@pytest.mark.parametrize("name", sorted(LINES))
def test_one_fusion_off(name: str) -> None:
    tokens, grad = (5, False) if name == "few_tokens" else MANY
    want, on = run(True, tokens, grad)
    without = {name, "site_boundary"} if name == "stream_gradient" else {name}
    got, off = run(tuple(other for other in FUSIONS if other not in without), tokens, grad)
    assert LINES[name] in on
    assert on - off >= {LINES[name]}
    close(got, want, 0.02)


def test_only_one_fusion_on() -> None:
    _, on = run(("post_pre_norm",), *MANY)
    assert on == {"post + pre_norm"}


def test_why_a_boundary_stays_two_kernels() -> None:
    log = LoweringLog()
    tensors = inputs(MANY[0])
    gradients(lowered(sites, Options(), log, []), tensors)
    apart = [entry for entry in log.entries if entry.provider == "two kernels" and entry.op == "site boundary"]
    assert {entry.reason for entry in apart} == {"dtype torch.float32"}
