"""The rule alone, on graphs of functions; what Dynamo makes of breaks is in ``tests/test_fragments.py``."""

from __future__ import annotations

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


def check(function: Any, **facts: Any) -> None:
    gm = traced(function, torch.randn(2, 3, 4), torch.randn(4, 4))
    ctx = PassContext(Options(), is_parameter=is_parameter, **facts)
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
