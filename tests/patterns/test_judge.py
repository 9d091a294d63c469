"""The judge tells apart what differs in an eps, a count or a gradient, and runs in milliseconds at any size."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from mhc_compile.patterns.judge import Judge
from tests.spellings.harness import capture


def verdict(
    old: Callable[..., Tensor], new: Callable[..., Tensor], *args: Tensor, judge: Judge | None = None
) -> str | None:
    """Put two functions into one graph and have them judged."""
    graph, _ = capture(lambda *xs: (old(*xs), new(*xs)), *args)
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    first, second = nodes[-1].args[0]

    def needed(node: fx.Node) -> list[fx.Node]:
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current.op != "placeholder" and current not in seen:
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return sorted(seen)

    return (judge or Judge()).disagreement([first], [second], inputs, needed(first), needed(second))


def rms(eps: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def columns(steps: int) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        m = x.exp()
        for step in range(steps):
            m = m / m.sum(-1 - step % 2, keepdim=True)
        return m

    return function


X = torch.randn(5, 4, 4)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (lambda x: x.softmax(-1), lambda x: x.exp() / x.exp().sum(-1, keepdim=True), None),
        (rms(1e-6), rms(2e-6), "the values differ by"),
        (columns(10), columns(11), "the values differ by"),
        (lambda x: x * x.abs(), lambda x: x * x.abs().detach(), "the gradients differ"),
        (lambda x: x.sum(-1), lambda x: x.sum(-1, keepdim=True), "the shapes differ"),
        (lambda x: x.view(5, 16).sum(-1), lambda x: x.flatten(1).sum(-1), None),
        (lambda x: x.to(torch.bfloat16).float() * 2, lambda x: x * 2, None),
        (lambda x: (x + 1).div_(3), lambda x: (x + 1) / 3, None),
    ],
)
def test_verdicts(old: Callable[[Tensor], Tensor], new: Callable[[Tensor], Tensor], reason: str | None) -> None:
    found = verdict(old, new, X)
    assert found is None if reason is None else (found or "").startswith(reason)


def test_equal_regions_are_judged_once() -> None:
    judge = Judge()
    for eps in (1e-6, 1e-6, 1e-5):
        assert verdict(rms(eps), rms(eps), X, judge=judge) is None
    assert judge.runs == 2


def test_tokens_of_a_large_model_are_few() -> None:
    start = time.perf_counter()
    old = lambda x: x.view(64, 512, 4 * 64).square().sum(-1).reshape(64, 512, 1)  # noqa: E731
    new = lambda x: x.square().sum((-1, -2)).unsqueeze(-1)  # noqa: E731
    assert verdict(old, new, torch.randn(64, 512, 4, 64)) is None
    assert time.perf_counter() - start < 20.0


def test_random_numbers_of_the_user_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    verdict(rms(1e-6), rms(1e-6), X)
    assert torch.equal(torch.rand(3), expected)
