"""The norm of the streams, before or after the projection, weighted or not; norms of other axes are no such norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.patterns.axes import Axes
from mhc_compile.patterns.base import Refused
from mhc_compile.patterns.reading import value
from mhc_compile.patterns.stream_norm import Norm, Streams, read_inverse, read_length, read_normalised
from tests.spellings.harness import capture

N, C = 4, 6
X = torch.randn(2, 3, N, C)


def read_with(reader: Callable[..., Norm | None], function: Callable[[Tensor], Tensor]) -> Norm | None:
    graph, _ = capture(function, X)
    nodes = list(graph.graph.nodes)
    state = next(node for node in nodes if node.op == "placeholder" and value(node).dim() == 4)
    axes = Axes()
    stream, channel = axes.new(N), axes.new(C)
    axes.pin(state, ((axes.new(2),), (axes.new(3),), (stream,), (channel,)))
    static = {node for node in nodes if isinstance(value(node), nn.Parameter)}
    return reader(nodes[-1].args[0][0], Streams((state,), axes, stream, channel, static))


def mean_square(x: Tensor) -> Tensor:
    return x.flatten(-2).square().mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.rsqrt(mean_square(x) + 1e-5), Norm("rms", 1e-5)),
        (lambda x: torch.rsqrt(x.pow(2).mean((2, 3))[..., None] + 1e-5), Norm("rms", 1e-5)),
        (lambda x: 1.0 / torch.sqrt(mean_square(x)), Norm("rms", 0.0)),
        (lambda x: 1.0 / (mean_square(x).sqrt() + 1e-3), Norm("rms_outside", 1e-3)),
        (lambda x: torch.rsqrt(x.square().mean(-1, keepdim=True).sum(-2) + 1e-5), None),
        (lambda x: torch.rsqrt(x.abs().mean((-1, -2)) + 1e-5), None),
    ],
)
def test_a_factor(function: Callable[[Tensor], Tensor], expected: Norm | None) -> None:
    assert read_with(read_inverse, function) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.sqrt(mean_square(x) + 1e-5), Norm("rms", 1e-5)),
        (lambda x: x.flatten(-2).norm(dim=-1) / math.sqrt(N * C) + 1e-5, Norm("rms_outside", 1e-5)),
        (lambda x: x.flatten(-2).norm(dim=-1) / math.sqrt(C) + 1e-5, None),
        (lambda x: x.flatten(-2).norm(p=1, dim=-1) / math.sqrt(N * C), None),
    ],
)
def test_a_divisor(function: Callable[[Tensor], Tensor], expected: Norm | None) -> None:
    assert read_with(read_length, function) == expected


def test_a_weight_is_handed_on() -> None:
    weight = nn.Parameter(torch.rand(N * C))
    found = read_with(read_normalised, lambda x: weight * (x.flatten(-2) * torch.rsqrt(mean_square(x) + 1e-6)))
    assert found is not None
    assert (found.kind, found.eps) == ("rms", 1e-6)
    assert found.weight is not None
    assert read_with(read_normalised, lambda x: F.rms_norm(x.flatten(-2), (N * C,), weight, 1e-6)) is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        lambda x: F.rms_norm(x, (C,), None, 1e-6),
    ],
)
def test_a_norm_of_each_stream_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Refused, match="each stream on its own"):
        read_with(read_normalised, function)


def test_other_functions_of_the_streams_are_no_norm() -> None:
    assert read_with(read_normalised, lambda x: x.tanh()) is None
    assert read_with(read_normalised, lambda x: x.flatten(-2).float()) == Norm()


# --- the norm of each stream, which is an op of its own --------------------------------------------------------------


def read_each(function: Callable[[Tensor], Tensor]) -> Norm | None:
    graph, _ = capture(function, X)
    nodes = list(graph.graph.nodes)
    axes = Axes()
    stream, channel = axes.new(N), axes.new(C)
    axes.pin(nodes[0], ((axes.new(2),), (axes.new(3),), (stream,), (channel,)))
    return read_normalised(nodes[-1].args[0][0], Streams((nodes[0],), axes, stream, channel, set(), each=True))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), Norm("rms", 1e-5)),
        (lambda x: x / torch.sqrt(x.square().sum(-1, keepdim=True) / C + 1e-5), Norm("rms", 1e-5)),
        (lambda x: F.rms_norm(x, (C,), None, 1e-5), Norm("rms", 1e-5)),
        (lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) / (N * C) + 1e-5), None),
        (lambda x: F.rms_norm(x, (N, C), None, 1e-5), None),
        (lambda x: x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-5), None),
    ],
)
def test_a_norm_of_each_stream(function: Callable[[Tensor], Tensor], expected: Norm | None) -> None:
    assert read_each(function) == expected
