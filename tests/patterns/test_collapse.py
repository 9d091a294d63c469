"""The two ends of a carrier, in their spellings; the same operations elsewhere are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.spellings.harness import op_of, raised
from tests.spellings.site import STREAMS, Model, Pieces, Site, tokens

N = STREAMS


def whole(expand: Callable[[Tensor], Tensor], collapse: Callable[[Tensor], Tensor]) -> Model:
    class Ends(Model):
        def forward(self, x: Tensor) -> Tensor:
            streams = expand(x)
            for site in self.sites:
                streams = site(streams)
            return collapse(streams)

    torch.manual_seed(0)
    return Ends([Site(Pieces())]).double()


def copied(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, N, -1)


@pytest.mark.parametrize(
    "expand",
    [
        lambda x: copied(x).contiguous(),
        lambda x: copied(x).clone(),
        lambda x: torch.stack([x] * N, dim=2),
        lambda x: x.unsqueeze(-2).repeat(1, 1, N, 1),
        lambda x: x.repeat(1, 1, N).unflatten(-1, (N, -1)),
        lambda x: x[:, :, None].broadcast_to(2, 3, N, 6),
    ],
)
def test_an_expansion(expand: Callable[[Tensor], Tensor]) -> None:
    got = raised(whole(expand, lambda x: x.mean(2)), tokens())
    assert got.reasons == []
    assert got.ops["expand"] == 1
    got.assert_same()


@pytest.mark.parametrize(
    ("collapse", "kind"),
    [
        (lambda x: x.mean(2), "mean"),
        (lambda x: torch.mean(x, dim=-2, keepdim=True).squeeze(-2), "mean"),
        (lambda x: x.sum(-2), "sum"),
        (lambda x: x.transpose(1, 2).sum(1), "sum"),
    ],
)
def test_a_collapse(collapse: Callable[[Tensor], Tensor], kind: str) -> None:
    got = raised(whole(copied, collapse), tokens())
    assert got.reasons == []
    assert [node.args[1] for node in got.after.graph.nodes if op_of(node) == "collapse"] == [kind]
    got.assert_same()


@pytest.mark.parametrize(
    "collapse", [lambda x: x[:, :, 0], lambda x: x.mean((1, 2)), lambda x: x.amax(2), lambda x: x.mean(-1)]
)
def test_what_is_no_collapse(collapse: Callable[[Tensor], Tensor]) -> None:
    got = raised(whole(copied, collapse), tokens())
    assert "collapse" not in got.ops
    got.assert_same()


def test_noise_on_the_copies_is_no_expansion() -> None:
    got = raised(whole(lambda x: copied(x) * torch.arange(1.0, N + 1)[:, None], lambda x: x.mean(2)), tokens())
    assert "expand" not in got.ops
    assert got.ops["post"] == 1
    got.assert_same()
