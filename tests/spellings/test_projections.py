"""Every spelling of what comes before the gates: norm, projection, split, scale and bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.harness import raised
from tests.spellings.site import STREAMS, WIDTH, Pieces, Site, model, softmax_sinkhorn, tokens

WHOLE = {"expand": 1, "coefficients": 2, "pre": 2, "post": 2, "collapse": 1}
N, K = STREAMS, STREAMS * STREAMS + 2 * STREAMS

NORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, float]]] = {
    "rsqrt": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), ("rms", 1e-5)),
    "sqrt": (lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5), ("rms", 1e-5)),
    "power": (lambda x: x * (x.square().mean(dim=-1, keepdim=True) + 1e-5) ** -0.5, ("rms", 1e-5)),
    "sum": (lambda x: x * torch.rsqrt((x**2).sum(-1, keepdim=True) / x.shape[-1] + 1e-5), ("rms", 1e-5)),
    "function": (lambda x: F.rms_norm(x, (N * WIDTH,), None, 1e-5), ("rms", 1e-5)),
    "length": (lambda x: x / (x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + 1e-6), ("rms_outside", 1e-6)),
    "scaled length": (
        lambda x: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-6),
        ("rms_outside", 1e-6),
    ),
    "none": (lambda x: x, ("none", 0.0)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_spelling_of_the_norm_is_read(name: str) -> None:
    norm, expected = NORMS[name]
    got = raised(model(Pieces(norm=norm)), tokens())
    assert got.reasons == []
    assert got.ops == WHOLE
    assert {(a["norm"], a["norm_eps"]) for a in got.attributes("coefficients")} == {expected}
    got.assert_same()


class Weighted(Site):
    def __init__(self) -> None:
        super().__init__(Pieces())
        self.scale = nn.Parameter(torch.rand(N * WIDTH) + 0.5)
        self.pieces = Pieces(norm=lambda x: F.rms_norm(x, (N * WIDTH,), self.scale, 1e-6))


class WeightedByHand(Site):
    def __init__(self) -> None:
        super().__init__(Pieces())
        self.scale = nn.Parameter(torch.rand(N * WIDTH) - 0.5)
        self.pieces = Pieces(norm=lambda x: (1.0 + self.scale) * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)))


class After(Site):
    """The paper's order: the division by the rms comes after the projection; phi is [n C, K]; one bias a part."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.reshape(*x.shape[:-2], -1)
        r = torch.sqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
        mixes = (flat @ self.phi.t()) / r
        pre = torch.sigmoid(mixes[..., :N] * self.alpha[0] + self.bias[:N])
        post = 2.0 * torch.sigmoid(mixes[..., N : 2 * N] * self.alpha[1] + self.bias[N : 2 * N])
        logits = mixes[..., 2 * N :].view(*x.shape[:-2], N, N) * self.alpha[2] + self.bias[2 * N :].view(N, N)
        return pre, post, softmax_sinkhorn(logits)


class Reordered(Site):
    """[pre, res, post], all scaled and shifted before they are split."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixes = F.linear(self.pieces.norm(x.flatten(-2)), self.phi) * 0.5 + self.bias
        pre, res, post = torch.split(mixes, [N, N * N, N], dim=-1)
        return torch.sigmoid(pre), 2 * torch.sigmoid(post), softmax_sinkhorn(res.unflatten(-1, (N, N)))


class Separate(Site):
    """Three projections as nn.Linear with their own biases; gates without a scale."""

    def __init__(self) -> None:
        super().__init__(Pieces())
        self.to_pre, self.to_post = nn.Linear(N * WIDTH, N), nn.Linear(N * WIDTH, N, bias=False)
        self.to_res = nn.Linear(N * WIDTH, N * N)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.pieces.norm(x.flatten(-2))
        res = self.to_res(flat).view(*x.shape[:-2], N, N)
        return self.to_pre(flat).sigmoid(), 2 * self.to_post(flat).sigmoid(), softmax_sinkhorn(res)


class Einsum(Site):
    """phi as [n, C, K]; the streams are never flattened."""

    def __init__(self) -> None:
        super().__init__(Pieces())
        self.phi = nn.Parameter(torch.randn(N, WIDTH, K) / WIDTH)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = x * torch.rsqrt(x.square().mean((-1, -2), keepdim=True) + 1e-6)
        mixes = torch.einsum("bsnc,nck->bsk", normed, self.phi)
        pre, post, res = mixes.tensor_split((N, 2 * N), -1)
        res = res.unflatten(-1, (N, N)) * self.alpha[2] + self.bias[2 * N :].view(N, N)
        pre = torch.sigmoid(self.alpha[0] * pre + self.bias[:N])
        return pre, torch.sigmoid(post * self.alpha[1]) * 2, softmax_sinkhorn(res)


SITES = [Weighted, WeightedByHand, lambda: After(Pieces()), lambda: Reordered(Pieces()), Separate, Einsum]
NAMES = ["weighted", "weighted by hand", "after", "reordered", "separate", "einsum"]


@pytest.mark.parametrize("site", SITES, ids=NAMES)
def test_a_spelling_of_the_projection_is_raised(site: Callable[[], nn.Module]) -> None:
    got = raised(model(site), tokens())
    assert got.reasons == []
    assert got.ops == WHOLE
    got.assert_same()


def test_the_order_of_the_rows_is_the_layout() -> None:
    got = raised(model(lambda: Reordered(Pieces())), tokens())
    assert {a["layout"] for a in got.attributes("coefficients")} == {"pre,res,post"}


class PerStream(Site):
    """Each stream has its own norm: not the norm of coefficients, which therefore start behind it."""

    def __init__(self) -> None:
        super().__init__(Pieces())
        self.pieces = Pieces(
            norm=lambda x: (
                x.unflatten(-1, (N, WIDTH))
                * torch.rsqrt(x.unflatten(-1, (N, WIDTH)).square().mean(-1, keepdim=True) + 1e-6)
            ).flatten(-2)
        )


def test_behind_a_norm_of_another_kind_the_op_starts_without_one() -> None:
    got = raised(model(PerStream), tokens())
    assert got.reasons == []
    assert got.ops == {**WHOLE, "stream_norm": 2}
    assert {a["norm"] for a in got.attributes("coefficients")} == {"none"}
    got.assert_same()


class Scaled(Site):
    """The bias is scaled together with the logits."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.pieces.norm(x.flatten(-2))
        pre, post, res = (F.linear(flat, self.phi) + self.bias).split([N, N, N * N], -1)
        res = softmax_sinkhorn((res * self.alpha[2]).unflatten(-1, (N, N)))
        return (pre * self.alpha[0]).sigmoid(), 2 * (post * self.alpha[1]).sigmoid(), res


class Vector(Site):
    """One scale for every row."""

    def __init__(self) -> None:
        super().__init__(Pieces())
        self.alpha = nn.Parameter(torch.rand(K))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.pieces.norm(x.flatten(-2))
        pre, post, res = (F.linear(flat, self.phi) * self.alpha).split([N, N, N * N], -1)
        return pre.sigmoid(), 2 * post.sigmoid(), softmax_sinkhorn(res.unflatten(-1, (N, N)))


class Mixed(Site):
    """pre and post with different activations."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, res = F.linear(self.pieces.norm(x.flatten(-2)), self.phi).split([N, N, N * N], -1)
        return pre.sigmoid(), post, softmax_sinkhorn(res.unflatten(-1, (N, N)))


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (Scaled, "bias is scaled together with the logits"),
        (Vector, "logits are scaled by more than one number"),
        (Mixed, "pre and post have different activations"),
    ],
)
def test_coefficients_that_no_attribute_describes_are_refused(site: type[Site], reason: str) -> None:
    got = raised(model(site if site is Vector else lambda: site(Pieces())), tokens())
    assert got.ops == {"expand": 1, "sinkhorn": 2, "pre": 2, "post": 2, "collapse": 1}
    assert any(reason in r for r in got.reasons), got.reasons
    got.assert_same()
