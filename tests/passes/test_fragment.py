"""The rule alone, on graphs of functions; what Dynamo makes of breaks is in ``tests/test_fragments.py``."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhc_compile.config import Options
from mhc_compile.errors import FragmentError
from mhc_compile.passes import PassContext
from mhc_compile.passes.find_sites import find_sites
from mhc_compile.passes.fragment import check_fragment
from tests.passes.graphs import is_parameter, traced


def open_ends(x: Tensor, w: Tensor) -> Tensor:
    x = x + F.linear(x, w)
    return x + F.linear(torch.tanh(x), w)


def open_head(x: Tensor, w: Tensor) -> Tensor:
    return torch.sin(open_ends(x, w))


def open_tail(x: Tensor, w: Tensor) -> Tensor:
    return open_ends(F.linear(x, w), w)


def check(function: Any, post_norm: str = "leave", **facts: Any) -> None:
    *inputs, _ = inspect.signature(function).parameters
    gm = traced(function, *(torch.randn(2, 3, 4) for _ in inputs), torch.randn(4, 4))
    ctx = PassContext(Options(post_norm=post_norm), is_parameter=is_parameter, **facts)
    assert find_sites(gm, ctx).changed == 2
    assert check_fragment(gm, ctx).changed == 0


@pytest.mark.parametrize(
    ("function", "facts"),
    [
        (open_ends, {"inside": "Model"}),
        (open_ends, {"break_reason": "print"}),
        (open_tail, {"break_reason": "print"}),
        (open_ends, {"resumed": True}),
        (open_head, {"resumed": True}),
    ],
)
def test_a_cut_chain_is_refused(function: Any, facts: dict[str, Any]) -> None:
    with pytest.raises(FragmentError, match="chain of 2 sites"):
        check(function, **facts)


@pytest.mark.parametrize(
    ("function", "facts"),
    [
        (open_ends, {}),
        (open_head, {"break_reason": "print"}),
        (open_head, {"inside": "Model"}),
        (open_tail, {"inside": "Model"}),
        (open_tail, {"resumed": True}),
    ],
)
def test_a_whole_chain_is_not(function: Any, facts: dict[str, Any]) -> None:
    check(function, **facts)


def spelled_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def normed_tail(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(open_tail(x, w), (4,))


def spelled_tail(x: Tensor, w: Tensor) -> Tensor:
    return spelled_norm(open_tail(x, w))


def normed_head(x: Tensor, w: Tensor) -> Tensor:
    return open_head(F.layer_norm(x, (4,)), w)


def cut_head(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """y is what the branch of a site has come to in front of the border."""
    return normed_head(x + torch.tanh(y), w)


def cut_spelled_head(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return open_head(spelled_norm(x + torch.tanh(y)), w)


def norm_first(x: Tensor, w: Tensor) -> Tensor:
    return open_ends(F.layer_norm(x, (4,)), w)


def normed_ends(x: Tensor, w: Tensor) -> Tensor:
    x = F.layer_norm(x + F.linear(x, w), (4,))
    return F.layer_norm(x + F.linear(torch.tanh(x), w), (4,))


def read_tail(x: Tensor, w: Tensor) -> Tensor:
    """The first token of the last norm: the stream itself stays inside."""
    return normed_tail(x, w)[:, 0]


NORMED = [
    (normed_tail, {"break_reason": "print"}),
    (spelled_tail, {"break_reason": "print"}),
    (cut_head, {"resumed": True}),
    (cut_spelled_head, {"resumed": True}),
    (norm_first, {"inside": "Model"}),
]


@pytest.mark.parametrize(("function", "facts"), [*NORMED, (normed_ends, {"inside": "Model"})])
def test_a_norm_that_is_applied_to_every_stream_crosses_the_border_with_it(function: Any, facts: Any) -> None:
    with pytest.raises(FragmentError, match="chain of 2 sites"):
        check(function, post_norm="per_stream", **facts)


@pytest.mark.parametrize(
    ("function", "post_norm", "facts"),
    [
        *((function, "leave", facts) for function, facts in NORMED),
        (normed_ends, "per_stream", {}),
        (normed_tail, "per_stream", {"inside": "Model"}),
        (cut_head, "per_stream", {"break_reason": "print"}),
        (normed_head, "per_stream", {"resumed": True, "inside": "Model"}),
        (norm_first, "per_stream", {"resumed": True, "inside": "Model"}),
        (read_tail, "per_stream", {"break_reason": "print"}),
    ],
)
def test_a_norm_that_is_not_ends_the_stream(function: Any, post_norm: str, facts: Any) -> None:
    check(function, post_norm=post_norm, **facts)


def second_half(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Behind a break in a branch: y is what the branch had come to."""
    x = x + F.linear(y, w)
    return torch.sin(x)


def both_halves(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return F.linear(torch.tanh(x + y), w)


def added_from_outside(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """A position is added to an input, and a bias to what comes out."""
    return F.linear(x + torch.sin(y), w) + y.mean()


def check_pair(function: Any, **facts: Any) -> list[str]:
    gm = traced(function, torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4, 4))
    ctx = PassContext(Options(), is_parameter=is_parameter, **facts)
    find_sites(gm, ctx)
    return [refusal.reason for refusal in check_fragment(gm, ctx).refusals]


@pytest.mark.parametrize(
    ("function", "facts"),
    [
        (second_half, {"resumed": True}),
        (second_half, {"inside": "Layer"}),
        (both_halves, {"resumed": True, "inside": "Model"}),
    ],
)
def test_a_cut_add_is_refused(function: Any, facts: dict[str, Any]) -> None:
    with pytest.raises(FragmentError, match="residual add is cut"):
        check_pair(function, **facts)


@pytest.mark.parametrize(
    ("function", "facts"),
    [
        (second_half, {}),
        (second_half, {"break_reason": "print"}),
        (both_halves, {"resumed": True}),
        (added_from_outside, {"resumed": True}),
    ],
)
def test_an_add_of_a_stem_is_not(function: Any, facts: dict[str, Any]) -> None:
    assert check_pair(function, **facts) == []


def test_a_piece_with_weights_and_without_a_chain_is_told() -> None:
    assert ["Model runs in pieces" in reason for reason in check_pair(both_halves, inside="Model")] == [True]


@pytest.mark.parametrize(("reason", "named"), [("Data dependent operator at m.py:1", True), ("print at m.py:1", False)])
def test_the_cure_names_the_settings_that_keep_an_operator_in_the_graph(reason: str, named: bool) -> None:
    with pytest.raises(FragmentError) as caught:
        check(open_tail, break_reason=reason)
    assert ("capture_scalar_outputs" in str(caught.value.cure)) is named
    assert "fullgraph=True" in str(caught.value.cure)
