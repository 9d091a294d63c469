"""Named axes through views, permutations, broadcasts and products; sizes known and symbolic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor, fx

from mhc_compile.patterns.axes import Axes, flat, quotient, without
from tests.spellings.harness import capture

H, X = torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5)


def ends(function: Callable[..., Tensor], *args: Tensor, dynamic: bool = False) -> tuple[list[fx.Node], fx.Node]:
    graph, _ = capture(function, *args, dynamic=dynamic or None)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder" and isinstance(n.meta["example_value"], Tensor)]
    (output,) = [n for n in graph.graph.nodes if n.op == "output"]
    return inputs, output.args[0][0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda h, x: (h.unsqueeze(-1) * x).sum(2),
        lambda h, x: torch.einsum("bsn,bsnc->bsc", h, x),
        lambda h, x: (h.unsqueeze(-2) @ x).squeeze(-2),
        lambda h, x: torch.matmul(h[:, :, None], x)[..., None].flatten(-3),
        lambda h, x: (h[..., None].expand_as(x) * x).sum(-2),
        lambda h, x: (
            (h.flatten(0, 1)[:, :, None] * x.reshape(-1, x.shape[2], x.shape[3])).sum(1).view(x[:, :, 0].shape)
        ),
    ],
)
def test_one_contraction_in_many_spellings(function: Callable[..., Tensor], dynamic: bool) -> None:
    (h, x), out = ends(function, H, X, dynamic=dynamic)
    axes = Axes()
    axes.pin(h)
    axes.pin(x)
    result = axes.atoms(out)
    b, s, n, c = axes.atoms(x)
    assert result == (b, s, c)
    assert axes.atoms(h) == (b, s, n)


def test_a_flattened_axis_is_cut_where_a_view_cuts_it() -> None:
    (x,), out = ends(lambda x: x.view(2, 3, 20).unflatten(-1, (2, 10)).flatten(0, 1), X)
    axes = Axes()
    axes.pin(x)
    assert [len(dim) for dim in axes.dims(out)] == [2, 1, 2]
    assert flat(axes.dims(out)) == axes.atoms(x)  # the stream axis of 4 is two atoms of 2 now
    assert len(axes.dims(x)[2]) == 2


def test_a_view_that_cuts_across_axes_names_new_ones() -> None:
    (x,), out = ends(lambda x: x.reshape(2, 3, 5, 4), X)
    axes = Axes()
    before = axes.pin(x)
    assert not set(flat(before[2:])) & set(axes.atoms(out)[2:])


def test_copies_are_an_axis_of_their_own() -> None:
    for function in (
        lambda x: x.unsqueeze(2).expand(-1, -1, 4, -1),
        lambda x: torch.stack([x] * 4, 2),
        lambda x: x.repeat(1, 1, 4),
    ):
        (x,), out = ends(function, torch.randn(2, 3, 5))
        axes = Axes()
        axes.pin(x)
        assert len(set(axes.atoms(out)) - set(axes.atoms(x))) == 1


def test_quotients_of_symbols() -> None:
    s, t = sympy.Symbol("s", integer=True, positive=True), sympy.Symbol("t", integer=True, positive=True)
    assert quotient(24, 4) == 6
    assert quotient(24, 5) is None
    assert quotient(6 * s, s) == 6
    assert quotient(s * t, t) == s
    assert quotient(s, t) is None


def test_what_is_left_when_atoms_go() -> None:
    assert without(((0,), (1, 2), ()), (2,)) == ((0,), (1,), ())
    assert without(((0,), (1, 2), ()), (1, 2)) == ((0,), ())
