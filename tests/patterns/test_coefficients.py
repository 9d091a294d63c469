"""The coefficients of a site are read off the graph, attribute by attribute, and refused where one does not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.harness import op_of, raised
from tests.spellings.site import STREAMS, WIDTH, Pieces, Site, model, softmax_sinkhorn, tokens

N = STREAMS


def test_every_attribute_is_read() -> None:
    got = raised(model(Pieces(post_scale=1.7), sites=1), tokens())
    (found,) = got.attributes("coefficients")
    expected = {
        "layout": "pre,post,res",
        "streams": N,
        "norm": "rms",
        "norm_eps": 1e-6,
        "gate": "sigmoid",
        "pre_scale": 1.0,
        "pre_eps": 0.0,
        "post_scale": 1.7,
        "post_eps": 0.0,
        "res": "sinkhorn",
        "mix_dtype": None,
        "sinkhorn_positivity": "softmax",
        "sinkhorn_positive_eps": 1e-6,
        "sinkhorn_first": "column",
        "sinkhorn_steps": 7,
        "sinkhorn_eps": 1e-6,
        "sinkhorn_eps_mode": "add",
    }
    assert found == expected


def test_parameters_are_taken_as_they_are() -> None:
    """phi and bias go into the op without a copy; a split of them would cost a node and a gradient each."""
    got = raised(model(Pieces(), sites=1), tokens())
    (node,) = [node for node in got.after.graph.nodes if op_of(node) == "coefficients"]
    assert [arg.op for arg in node.args[1:3]] == ["placeholder"] * 2


class Scaled(Site):
    """Numbers around the gates, in any order."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q, s = F.linear(self.pieces.norm(x.flatten(-2)), self.phi).split([N, N, N * N], -1)
        pre = (torch.sigmoid(p / 3.0 + self.bias[:N]) + 0.1) * 0.5
        post = 0.25 + torch.sigmoid(q * self.alpha[1] * 2.0 + self.bias[N : 2 * N]) / 4
        return pre, post, softmax_sinkhorn(0.5 * s.unflatten(-1, (N, N)))


def test_numbers_around_the_gates() -> None:
    got = raised(model(lambda: Scaled(Pieces()), sites=1), tokens())
    assert got.reasons == []
    (found,) = got.attributes("coefficients")
    names = ("pre_scale", "pre_eps", "post_scale", "post_eps")
    assert [found[name] for name in names] == pytest.approx([0.5, 0.05, 0.25, 0.25])
    got.assert_same()


class TwoBiases(Site):
    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, res = (F.linear(self.pieces.norm(x.flatten(-2)), self.phi) + self.bias).split([N, N, N * N], -1)
        return (pre + self.bias[:N]).sigmoid(), post.sigmoid(), softmax_sinkhorn(res.unflatten(-1, (N, N)))


class Turned(Site):
    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, res = F.linear(self.pieces.norm(x.flatten(-2)), self.phi).split([N, N, N * N], -1)
        return pre.sigmoid(), post.sigmoid(), softmax_sinkhorn(res.unflatten(-1, (N, N)).mT)


class Conditioned(Site):
    """Logits that depend on the position in the batch, which is no parameter."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, res = F.linear(self.pieces.norm(x.flatten(-2)), self.phi).split([N, N, N * N], -1)
        return (
            (pre + x.mean((-1, -2))[..., None]).sigmoid(),
            post.sigmoid(),
            softmax_sinkhorn(res.unflatten(-1, (N, N))),
        )


class Shared(Site):
    """pre and post rest on one projection, res on another."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces)
        self.gate, self.matrix = nn.Linear(N * WIDTH, 2 * N), nn.Linear(N * WIDTH, N * N)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.pieces.norm(x.flatten(-2))
        pre, post = self.gate(flat).chunk(2, -1)
        return pre.sigmoid(), post.sigmoid(), softmax_sinkhorn(self.matrix(flat).unflatten(-1, (N, N)))


class Normed(Site):
    """The gates rest on differently normalised streams."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, _ = F.linear(x.flatten(-2), self.phi).split([N, N, N * N], -1)
        res = F.linear(self.pieces.norm(x.flatten(-2)), self.phi)[..., 2 * N :]
        return pre.sigmoid(), post.sigmoid(), softmax_sinkhorn(res.unflatten(-1, (N, N)))


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (TwoBiases, "the pre logits have two biases"),
        (Turned, "the res logits are transposed before the Sinkhorn"),
        (Conditioned, "the pre logits are a sum of two things that depend on the input"),
        (Shared, "rows from 0 on of the projection are used for something else"),
        (Normed, "the gates rest on differently normalised streams"),
    ],
)
def test_refusals(site: type[Site], reason: str) -> None:
    got = raised(model(lambda: site(Pieces()), sites=1), tokens())
    assert any(reason in found for found in got.reasons), got.reasons
    assert got.ops.get("coefficients", 0) == 0
    assert (got.ops["sinkhorn"], got.ops["pre"], got.ops["post"]) == (1, 1, 1)
    got.assert_same()
