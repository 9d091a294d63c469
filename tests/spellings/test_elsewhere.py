"""The same algebra in models without streams: it is no site, and only an exact Sinkhorn becomes an op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.harness import raised


class Transport(nn.Module):
    """Entropic optimal transport of two point sets of different sizes, in log space with potentials (SuperGlue)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        cost = torch.einsum("bnc,bmc->bnm", a, b)
        u, v = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
        for _ in range(3):
            u = -torch.logsumexp(cost + v.unsqueeze(-2), -1)
            v = -torch.logsumexp(cost + u.unsqueeze(-1), -2)
        plan = torch.exp(cost + u.unsqueeze(-1) + v.unsqueeze(-2))
        return plan @ b


class Routing(nn.Module):
    """Experts by a Sinkhorn over tokens and experts, then the weighted sum of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        plan = torch.exp(self.gate(x))
        for _ in range(3):
            plan = plan / plan.sum(-1, keepdim=True)
            plan = plan / plan.sum(-2, keepdim=True)
        outputs = torch.einsum("bsc,ecd->bsed", x, self.experts)
        return x + (plan.unsqueeze(-1) * outputs).sum(-2)


class Square(nn.Module):
    """A matching of 6 with 6: a square Sinkhorn without any site around it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        scores = (a @ b.transpose(-1, -2)).softmax(-1)
        for _ in range(3):
            scores = scores / scores.sum(-2, keepdim=True)
            scores = scores / scores.sum(-1, keepdim=True)
        return scores @ b


class DeltaRule(nn.Module):
    """A recurrent state with the algebra of a site, S' = S + k (v - k S): its keys come from the input, not from S."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 4, 6, dtype=x.dtype)
        for t in range(x.shape[1]):
            key = F.normalize(self.key(x[:, t]), dim=-1)
            seen = (key.unsqueeze(-1) * state).sum(-2)
            state = state + key.unsqueeze(-1) * (self.value(x[:, t]) - seen).unsqueeze(-2)
        return state


class Attention(nn.Module):
    """Softmax attention over few keys, with a gated residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return x + torch.sigmoid(self.g(x)) * (weights @ self.v(x))


def points(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_transport_plan_is_left_alone() -> None:
    got = raised(Transport(), points(2, 5, 8), points(2, 7, 8))
    assert got.result.changed == 0
    got.assert_same()


def test_sinkhorn_routing_is_no_site() -> None:
    got = raised(Routing().double(), points(2, 6, 8))
    assert got.result.changed == 0
    assert got.reasons == ["sinkhorn: the matrix is not square (6 x 4)"]
    got.assert_same()


def test_a_square_sinkhorn_may_become_the_bare_op() -> None:
    got = raised(Square(), points(2, 6, 8), points(2, 6, 8))
    assert got.ops == {"sinkhorn": 1}
    got.assert_same()


def test_a_large_square_matrix_mixes_no_streams() -> None:
    got = raised(Square(), points(2, 40, 8), points(2, 40, 8))
    assert got.result.changed == 0
    assert got.reasons == ["sinkhorn: a 40 x 40 matrix mixes no streams (at most 16)"]


def test_a_delta_rule_is_no_site() -> None:
    got = raised(DeltaRule().double(), points(2, 3, 8))
    assert got.result.changed == 0
    assert got.reasons == []


def test_attention_is_no_site() -> None:
    got = raised(Attention().double(), points(2, 4, 8))
    assert got.result.changed == 0
    assert got.reasons == []
