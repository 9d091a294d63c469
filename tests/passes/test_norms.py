from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, fx, nn

from mhc_compile.cost import target_name
from mhc_compile.passes.norms import Norm, find_norm
from tests.passes.models import WIDTH, tokens


class Branch(nn.Module):
    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.weight, self.linear = norm, nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(torch.relu(x), self.weight))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * y.to(x.dtype)


def layer(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * weight


def found(norm: Callable[[Tensor, Tensor], Tensor]) -> Norm | None:
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(Branch(norm), backend=lambda gm, _: graphs.append(gm) or gm.forward)(tokens(2, 5, WIDTH))
    source = next(node for node in graphs[0].graph.nodes if target_name(node) == "relu")
    return find_norm(source, lambda node: node.op == "placeholder" and "parameters" in node.name)


@pytest.mark.parametrize(("norm", "reductions"), [(rms, 1), (layer, 2)])
def test_spelled_norms(norm: Callable[[Tensor, Tensor], Tensor], reductions: int) -> None:
    result = found(norm)
    assert result is not None
    assert [target_name(node) for node in result.reductions] == ["mean"] * reductions
    assert len(result.results) == 1
    assert [target_name(user) for user in result.results[0].users] == ["linear"]
    assert result.result_bytes == 2 * 5 * WIDTH * 4


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, weight: functional.layer_norm(x, (WIDTH,), weight),
        lambda x, weight: functional.rms_norm(x, (WIDTH,), weight),
        lambda x, weight: x * weight,
        lambda x, weight: torch.softmax(x, -1),
    ],
    ids=["layer_norm", "rms_norm", "scale", "softmax"],
)
def test_others_are_left_to_the_partitioner(norm: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert found(norm) is None
