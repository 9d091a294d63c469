"""Mistakes that whole architectures have shown, each on the smallest model that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_compile.errors import FragmentError
from tests.passes.models import WIDTH, Block, Lambda, Mlp, Stack, report, tokens
from tests.zoo.base import Example, projection_loss
from tests.zoo.convert import check


def masked_in_place() -> nn.Module:
    """A router's mask is written by a method whose result nobody reads (DeepSeek-V3)."""

    def route(m: Lambda, x: Tensor) -> Tensor:
        mask = torch.zeros_like(x)
        mask.scatter_(-1, x.topk(3, dim=-1).indices, 1.0)
        return x + m.mlp(x) * mask

    return Stack([Lambda(route, mlp=Mlp()), Block()])


def scaled_in_place() -> nn.Module:
    """A layer scales the stream in place before it hands it on (Gemma 4)."""

    def scale(m: Lambda, x: Tensor) -> Tensor:
        x = x + m.mlp(x)
        x *= 0.5
        return x

    return Stack([Block(), Lambda(scale, mlp=Mlp()), Block()])


def weight_of_weights() -> nn.Module:
    """The convolution's weight is standardised in the forward pass (BiT)."""

    def product(m: Lambda, x: Tensor) -> Tensor:
        weight = m.mix.weight
        return x + torch.tanh(x) @ ((weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)).t()

    return Stack([Lambda(product, mix=nn.Linear(WIDTH, WIDTH)) for _ in range(2)])


class Written(torch.autograd.Function):
    """The identity, whose backward writes into its gradient with a method nobody reads the result of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = torch.zeros_like(gradients[0])
        total.add_(gradients[0])
        return total


def own_backward() -> nn.Module:
    """A branch with a custom autograd function (Phi-MoE)."""
    return Stack([Lambda(lambda m, x: x + Written.apply(m.mlp(x)), mlp=Mlp()), Block()])


MODELS: list[tuple[Callable[[], nn.Module], int]] = [
    (masked_in_place, 3),
    (scaled_in_place, 5),
    (weight_of_weights, 2),
    (own_backward, 3),
]


@pytest.mark.parametrize(("build", "sites"), MODELS, ids=lambda value: getattr(value, "__name__", None))
def test_model(build: Callable[[], nn.Module], sites: int) -> None:
    outcome = check(Example(build(), {"x": tokens()}, projection_loss), {"compiler": "eager"})
    assert outcome.sites == sites
    assert outcome.problems == []


def straight_through(m: Lambda, x: Tensor) -> Tensor:
    """A quantizer: the value of the code, the gradient of the input (DAC)."""
    code = m.codes(x) * 0.5
    return x + (code - x).detach()


def test_a_detached_branch_is_no_site() -> None:
    blocks = [Block(), Lambda(straight_through, codes=nn.Linear(WIDTH, WIDTH)), Block()]
    result = report(Stack(blocks), tokens())
    assert [row.module for row in result.sites] == ["layers.0", "layers.0", "layers.2", "layers.2"]
    assert [refusal.reason for refusal in result.left_alone if "detached" in refusal.reason]


class BreakInBranch(nn.Module):
    """The graph breaks between the projection of a branch and its add, as where lengths become Python numbers."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.mlp, self.breaks = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), Mlp(), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = torch.tanh(x)
        if self.breaks:
            torch._dynamo.graph_break()
        x = x + self.mix(y)
        return (x + self.mlp(x)).square()


def test_a_break_inside_the_first_branch_cuts_the_chain_behind_it() -> None:
    compiled = torch.compile(BreakInBranch(breaks=True), backend="mhc", options={"compiler": "eager"})
    with pytest.raises(FragmentError, match=r"residual add is cut: .* in front of a graph break"):
        compiled(tokens())


def test_a_site_that_nothing_reads_is_left_alone() -> None:
    def unread(m: Lambda, x: Tensor) -> Tensor:
        m.mlp(x).add(x)
        return x

    result = report(Stack([Block(), Lambda(unread, mlp=Mlp())]), tokens())
    assert [row.module for row in result.sites] == ["layers.0", "layers.0"]
