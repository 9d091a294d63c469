"""One meaning for every spelling of a node."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mhc_compile.patterns import reading
from mhc_compile.patterns.reading import Op, read
from tests.spellings.harness import capture

X = torch.rand(2, 3, 4, 4) + 0.5


def last(function: Callable[[Tensor], Tensor]) -> tuple[fx.Node, Op | None]:
    """The node that computes a function's result, and its reading."""
    graph, _ = capture(function, X)
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    node = output.args[0][0]
    return node, read(node)


SAME = {
    "sum": [
        lambda x: x.sum(-1),
        lambda x: x.sum(dim=3),
        lambda x: torch.sum(x, -1),
        lambda x: torch.sum(x, dim=(-1,)),
        lambda x: torch.ops.aten.sum.dim_IntList(x, [-1]),
        lambda x: torch.sum(x, axis=3),
    ],
    "div": [
        lambda x: x / 3,
        lambda x: torch.div(x, 3),
        lambda x: x.div(3),
        lambda x: torch.true_divide(x, 3),
        lambda x: (x * 1).div_(3),
    ],
    "reciprocal": [lambda x: 1 / x, lambda x: x.reciprocal(), lambda x: torch.reciprocal(x), lambda x: x**-1],
    "square": [lambda x: x * x, lambda x: x**2, lambda x: x.pow(2), lambda x: torch.square(x)],
    "rsqrt": [lambda x: x.rsqrt(), lambda x: torch.rsqrt(x), lambda x: x**-0.5, lambda x: torch.pow(x, -0.5)],
    "sigmoid": [lambda x: x.sigmoid(), torch.sigmoid, torch.special.expit, lambda x: F.sigmoid(x)],
    "amax": [lambda x: x.amax(-1), lambda x: x.max(-1).values, lambda x: torch.max(x, dim=-1)[0]],
    "softmax": [lambda x: x.softmax(-1), lambda x: torch.softmax(x, -1), lambda x: F.softmax(x, dim=-1)],
    "permute": [
        lambda x: x.transpose(-1, -2),
        lambda x: (x + 1).mT,
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: torch.permute(x, (0, 1, 3, 2)),
        lambda x: x.swapaxes(2, 3),
    ],
    "reshape": [lambda x: x.view(6, 4, 4), lambda x: x.flatten(0, 1), lambda x: x[:, :, None], lambda x: x[..., None]],
    "clamp_min": [lambda x: x.clamp(min=0.7), lambda x: x.clamp_min(0.7), lambda x: torch.clamp(x, 0.7)],
    "slice": [
        lambda x: x[..., :2],
        lambda x: x.narrow(-1, 0, 2),
        lambda x: x.split(2, -1)[0],
        lambda x: x.chunk(2, 3)[0],
    ],
    "expand": [lambda x: x.unsqueeze(2).expand(2, 3, 5, 4, 4), lambda x: x[None].broadcast_to(2, 2, 3, 4, 4)],
    "matmul": [lambda x: x @ x, lambda x: torch.matmul(x, x), lambda x: x.matmul(x)],
}


@pytest.mark.parametrize(("kind", "function"), [(kind, f) for kind, fs in SAME.items() for f in fs])
def test_a_kind_has_many_spellings(kind: str, function: Callable[[Tensor], Tensor]) -> None:
    _, op = last(function)
    assert op is not None
    assert op.kind == kind
    if kind in ("sum", "amax", "softmax", "slice"):
        assert op.dims == (3,)
    if kind == "slice":
        assert (op.start, op.length) == (0, 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.add(x, x, alpha=2),
        lambda x: torch.div(x, 3, rounding_mode="floor"),
        lambda x: x.clamp(0.1, 0.9),
        lambda x: x[..., ::2],
        lambda x: x[..., 0],
        lambda x: x.cumsum(-1),
        lambda x: F.normalize(x, p=2, dim=-1),
        lambda x: x**3,
    ],
)
def test_what_the_table_does_not_hold_reads_as_nothing(function: Callable[[Tensor], Tensor]) -> None:
    assert last(function)[1] is None


def test_einsum_labels_are_written_out() -> None:
    _, op = last(lambda x: torch.einsum("...ij->...i", x))
    assert op is not None
    assert len(op.equation[0]) == 4
    assert op.equation[1] == op.equation[0][:-1]


@pytest.mark.parametrize("function", [lambda x: (x * 1).div_(2), lambda x: operator.itruediv(x * 1, 2)])
def test_a_write_in_place_is_marked(function: Callable[[Tensor], Tensor]) -> None:
    _, op = last(function)
    assert op is not None
    assert op.inplace


def test_strip_looks_through_what_changes_no_number() -> None:
    node, _ = last(lambda x: x.double().transpose(-1, -2).contiguous().flatten(-2).unsqueeze(0))
    assert reading.strip(node).op == "placeholder"


def test_strip_stops_at_a_rounding_and_at_a_write() -> None:
    rounded, _ = last(lambda x: x.bfloat16().unsqueeze(0))
    assert reading.strip(rounded).target == "bfloat16"
    written, _ = last(lambda x: (x * 1).mul_(2).unsqueeze(0))
    assert reading.strip(written).target == "mul_"
