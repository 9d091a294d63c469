"""A small model with hyper-connections, written from the mathematics, every piece of it exchangeable.

X' = H X + h_post F(h_pre X), (h_pre, h_post, H) from X. The pieces are plain functions, so that a test names the one
spelling it is about and takes the rest from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STREAMS, WIDTH = 4, 6


def rms_before(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over the root of its mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def softmax_sinkhorn(logits: Tensor, iterations: int = 4, eps: float = 1e-6) -> Tensor:
    """DeepSeek-V4's order: softmax + eps, columns, then rows and columns in turn."""
    m = torch.softmax(logits, -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


@dataclass(frozen=True)
class Pieces:
    """The exchangeable spellings of a site; shapes as in the functions' defaults."""

    norm: Callable[[Tensor], Tensor] = rms_before
    sinkhorn: Callable[[Tensor], Tensor] = softmax_sinkhorn
    activate: Callable[[Tensor], Tensor] = torch.sigmoid
    mix: Callable[[Tensor, Tensor], Tensor] = lambda h, x: h @ x
    pre: Callable[[Tensor, Tensor], Tensor] = lambda h, x: (h.unsqueeze(-1) * x).sum(-2)
    outer: Callable[[Tensor, Tensor], Tensor] = lambda h, y: h.unsqueeze(-1) * y.unsqueeze(-2)
    merge: Callable[[Tensor, Tensor], Tensor] = lambda mixed, out: mixed + out
    post_scale: float = 2.0


class Site(nn.Module):
    """One site with a branch of one layer."""

    def __init__(self, pieces: Pieces, n: int = STREAMS, width: int = WIDTH) -> None:
        super().__init__()
        self.pieces, self.n = pieces, n
        rows = n * n + 2 * n
        self.phi = nn.Parameter(torch.randn(rows, n * width) / width)
        self.bias = nn.Parameter(torch.randn(rows) * 0.5)
        self.alpha = nn.Parameter(torch.tensor([0.9, 1.2, 1.5]))
        self.branch = nn.Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        """[..., nC] -> the logits of all gates."""
        return nn.functional.linear(x, self.phi)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre [..., n], post [..., n], H [..., n, n]."""
        n, pieces = self.n, self.pieces
        logits = self.project(pieces.norm(x.flatten(-2)))
        p, q, s = logits.split([n, n, n * n], -1)
        b_pre, b_post, b_res = self.bias.split([n, n, n * n])
        pre = pieces.activate(p * self.alpha[0] + b_pre)
        post = pieces.post_scale * pieces.activate(q * self.alpha[1] + b_post)
        res = pieces.sinkhorn((s * self.alpha[2] + b_res).unflatten(-1, (n, n)))
        return pre, post, res

    def forward(self, x: Tensor) -> Tensor:
        """X -> X'."""
        pre, post, res = self.gates(x)
        y = torch.tanh(self.branch(self.pieces.pre(pre, x)))
        return self.pieces.merge(self.pieces.mix(res, x), self.pieces.outer(post, y))


class Model(nn.Module):
    """x [B, S, C] copied to n streams, some sites, the mean of the streams."""

    def __init__(self, sites: Sequence[nn.Module], n: int = STREAMS) -> None:
        super().__init__()
        self.sites, self.n = nn.ModuleList(sites), n

    def forward(self, x: Tensor) -> Tensor:
        """x -> x."""
        streams = x.unsqueeze(-2).expand(-1, -1, self.n, -1).contiguous()
        for site in self.sites:
            streams = site(streams)
        return streams.mean(-2)


def model(make: Callable[[], nn.Module] | Pieces, sites: int = 2) -> Model:
    """A float64 model of some sites, seeded."""
    torch.manual_seed(0)
    return Model([Site(make) if isinstance(make, Pieces) else make() for _ in range(sites)]).double()


def tokens(batch: int = 2, length: int = 3, width: int = WIDTH) -> Tensor:
    """An input of a model."""
    return torch.randn(batch, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
