"""Mistakes that whole architectures have shown, each on the smallest model that shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.passes.models import Block, Lambda, Mlp, Stack, tokens
from tests.zoo.base import Example, projection_loss
from tests.zoo.convert import check


def masked_in_place() -> nn.Module:
    """A router's mask is written by a method whose result nobody reads (DeepSeek-V3)."""

    def route(m: Lambda, x: Tensor) -> Tensor:
        mask = torch.zeros_like(x)
        mask.scatter_(-1, x.topk(3, dim=-1).indices, 1.0)
        return x + m.mlp(x) * mask

    return Stack([Lambda(route, mlp=Mlp()), Block()])


MODELS: list[tuple[Callable[[], nn.Module], int]] = [(masked_in_place, 3)]


@pytest.mark.parametrize(("build", "sites"), MODELS, ids=lambda value: getattr(value, "__name__", None))
def test_model(build: Callable[[], nn.Module], sites: int) -> None:
    outcome = check(Example(build(), {"x": tokens()}, projection_loss), {"compiler": "eager"})
    assert outcome.sites == sites
    assert outcome.problems == []
