"""Sinkhorn: every positivity, order and eps mode against autograd; the laws a doubly stochastic matrix obeys."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.ops import SinkhornSpec, sinkhorn

POSITIVITIES = ("softmax", "exp", "exp_rowmax", "log", "abs")


def reference(logits: Tensor, spec: SinkhornSpec) -> Tensor:
    """The same mathematics spelled for autograd, step by step."""
    matrix = {
        "softmax": lambda x: x.softmax(-1),
        "exp": torch.exp,
        "exp_rowmax": lambda x: torch.exp(x - x.amax(-1, keepdim=True)),
        "log": lambda x: x,
        "abs": torch.abs,
    }[spec.positivity](logits)
    if spec.positivity != "log":
        matrix = matrix + spec.positive_eps
    axis = -1 if spec.first == "row" else -2
    for _ in range(spec.steps):
        if spec.positivity == "log":
            matrix = matrix - matrix.logsumexp(axis, keepdim=True)
        else:
            total = matrix.sum(axis, keepdim=True)
            matrix = matrix / (total.clamp(min=spec.eps) if spec.eps_mode == "clamp" else total + spec.eps)
        axis = -3 - axis
    return matrix.exp() if spec.positivity == "log" else matrix


def specs() -> list[SinkhornSpec]:
    out = []
    for positivity, first, mode, steps in itertools.product(
        POSITIVITIES, ("row", "column"), ("add", "clamp"), (0, 1, 6)
    ):
        eps = 0.0 if positivity == "log" else 0.3 if mode == "clamp" else 1e-3
        positive_eps = 0.0 if positivity == "log" else 1e-3
        out.append(SinkhornSpec(positivity, positive_eps, first, steps, eps, mode))
    return out


@pytest.mark.parametrize("spec", specs(), ids=str)
def test_native_backward_is_autograds(spec: SinkhornSpec) -> None:
    logits = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 0] = logits[0, 0, 0]  # ties of the row maximum
    logits.requires_grad_()
    weight = torch.randn_like(logits)
    expected = reference(logits, spec)
    actual = sinkhorn(logits, **spec.op_arguments())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (want,) = torch.autograd.grad((expected * weight).sum(), logits)
    (got,) = torch.autograd.grad((actual * weight).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.0, 80.0),
    n=st.sampled_from([2, 3, 4, 8]),
    positivity=st.sampled_from(["softmax", "log"]),
)
def test_laws(seed: int, scale: float, n: int, positivity: str) -> None:
    """The last axis sums to 1 within 1e-5, the other as in float64, entries are positive, order does not matter."""
    eps = 1e-6 if positivity == "softmax" else 0.0
    arguments = SinkhornSpec(positivity, eps, "column", 40, 0.0, "add").op_arguments()
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.rand(16, n, n, generator=generator, dtype=torch.float64) * 2 - 1) * scale
    exact = sinkhorn.native(logits, **arguments)
    assert isinstance(exact, Tensor)
    got = sinkhorn(logits.float(), **arguments)
    assert isinstance(got, Tensor)
    assert (got.sum(-1) - 1).abs().max() <= 1e-5
    assert (got.double().sum(-2) - 1).abs().max() <= (exact.sum(-2) - 1).abs().max() + 1e-4
    assert (got >= 0).all()
    if positivity == "softmax":
        assert (got > 0).all()
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(n, generator=generator)
    permuted = sinkhorn(logits.float()[:, rows][:, :, columns], **arguments)
    torch.testing.assert_close(permuted, got[:, rows][:, :, columns], rtol=1e-3, atol=1e-5)
