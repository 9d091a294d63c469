from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mhc_compile.passes.roles import LINEAR, NONLINEAR, NORM, RANDOM, WEIGHTED, Roles, channel_axis, summands
from tests.passes.graphs import by_name, is_parameter, traced

X = torch.randn(2, 3, 4)
W = torch.randn(4, 4)


def last(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in reversed(gm.graph.nodes) if node.op != "output")


@pytest.mark.parametrize(
    ("function", "role"),
    [
        (lambda x, w: F.linear(x, w), WEIGHTED),
        (lambda x, w: x @ w.t(), WEIGHTED),
        (lambda x, w: torch.einsum("btc,dc->btd", x, w), WEIGHTED),
        (lambda x, w: x.to(torch.bfloat16), LINEAR),
        (lambda x, w: x.view(2, 12).unsqueeze(0).transpose(0, 1), LINEAR),
        (lambda x, w: x * 0.5, LINEAR),
        (lambda x, w: x / 2, LINEAR),
        (lambda x, w: x + x.new_ones(4), LINEAR),
        (lambda x, w: 2 / x, NONLINEAR),
        (lambda x, w: x * x, NONLINEAR),
        (lambda x, w: x + x, LINEAR),
        (lambda x, w: F.dropout(x, 0.1, False), LINEAR),
        (lambda x, w: F.dropout(x, 0.0, True), LINEAR),
        (lambda x, w: F.dropout(x, 0.1, True), RANDOM),
        (lambda x, w: F.layer_norm(x, (4,)), NORM),
        (lambda x, w: F.relu(x), NONLINEAR),
        (lambda x, w: torch.tanh(x), NONLINEAR),
    ],
)
def test_role(function: Callable[[Tensor, Tensor], Tensor], role: str) -> None:
    gm = traced(function, X, W)
    assert Roles(gm, is_parameter).role(last(gm)) == role


def test_what_is_made_of_weights_is_a_weight_and_a_buffer_is_none() -> None:
    def function(x: Tensor, w: Tensor, wb: Tensor) -> Tensor:
        return F.linear(F.linear(x, w / w.norm()), wb)

    gm = traced(function, X, W, W)
    roles = Roles(gm, is_parameter, lambda node: node.name == "wb")
    nodes = by_name(gm)
    assert roles.is_weighted(nodes["linear"])
    assert not roles.is_weighted(nodes["linear_1"])


def test_strip_goes_through_casts_and_layout_to_the_stop() -> None:
    gm = traced(lambda x, w: (x.float().view(2, 12) * 2.0).transpose(0, 1), X, W)
    roles = Roles(gm, is_parameter)
    names = [node.name for node in roles.strip(last(gm), lambda node: node.name == "float_1")]
    assert names == ["transpose", "mul", "view", "float_1"]


@pytest.mark.parametrize(
    ("function", "factors"),
    [
        (lambda x, y: x + y, (1.0, 1.0)),
        (lambda x, y: torch.add(x, y, alpha=2), (1.0, 2.0)),
        (lambda x, y: x.add(y), (1.0, 1.0)),
        (lambda x, y: x + 1, None),
        (lambda x, y: x + x, None),
        (lambda x, y: x * y, None),
    ],
)
def test_summands(function: Any, factors: tuple[float, float] | None) -> None:
    found = summands(last(traced(function, X, X)))
    assert (found and (found[0][1], found[1][1])) == factors


@pytest.mark.parametrize(
    ("function", "axis"),
    [
        (lambda x, w: F.linear(x, w), -1),
        (lambda x, w: F.conv2d(x, w), -3),
        (lambda x, w: F.linear(x.permute(0, 2, 3, 1), w), -3),
        (lambda x, w: F.linear(x.flatten(2).transpose(1, 2), w), -3),
        (lambda x, w: torch.relu(x), None),
    ],
)
def test_channel_axis(function: Any, axis: int | None) -> None:
    weight = torch.randn(4, 4, 1, 1) if "conv2d" in function.__code__.co_names else W
    gm = traced(function, torch.randn(2, 4, 4, 4), weight)
    roles = Roles(gm, is_parameter)
    assert channel_axis(by_name(gm)["x"], set(gm.graph.nodes), roles) == axis


def test_strip_goes_through_a_bias_and_not_through_another_activation() -> None:
    gm = traced(lambda x, y, w: (x + y, (x + w[0]) * w[1], 0 + x), X, X, W)
    roles = Roles(gm, is_parameter)
    both, shifted, begun = gm.graph.output_node().args[0]
    assert roles.strip(both, lambda n: False) == [both]
    assert roles.strip(begun, lambda n: False) == [begun]
    assert roles.strip(shifted, lambda n: False)[-1].name == "x"


def test_images_of_a_stream() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        shifted = (x + y) * 0.5
        inverse = x.pow(2).mean(-1, keepdim=True).rsqrt()
        return shifted, x * inverse, F.linear(x, w), shifted + F.linear(x, w)

    gm = traced(function, X, X, W)
    roles = Roles(gm, is_parameter)
    x = by_name(gm)["x"]
    images = roles.images(x, gm.graph.nodes)
    assert [node in images for node in gm.graph.output_node().args[0]] == [True, False, False, True]
