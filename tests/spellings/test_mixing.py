"""Every spelling and layout of the mixing, and what a site may look like without a Sinkhorn."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.spellings.harness import Raised, op_of, raised
from tests.spellings.site import STREAMS, WIDTH, Model, Pieces, Site, model, softmax_sinkhorn, tokens

WHOLE = {"expand": 1, "coefficients": 2, "pre": 2, "post": 2, "collapse": 1}

MIX = {
    "matmul": lambda h, x: torch.matmul(h, x),
    "transposed": lambda h, x: h.transpose(-1, -2) @ x,
    "einsum": lambda h, x: torch.einsum("bsij,bsjc->bsic", h, x),
    "einsum transposed": lambda h, x: torch.einsum("...ji,...jc->...ic", h, x),
    "broadcast": lambda h, x: (h.unsqueeze(-1) * x.unsqueeze(-3)).sum(-2),
    "broadcast transposed": lambda h, x: torch.sum(h[..., None] * x[:, :, :, None, :], dim=2),
    "bmm": lambda h, x: torch.bmm(h.reshape(6, 4, 4), x.reshape(6, 4, WIDTH)).view(2, 3, 4, WIDTH),
}
PRE = {
    "matmul": lambda h, x: (h.unsqueeze(-2) @ x).squeeze(-2),
    "einsum": lambda h, x: torch.einsum("bsn,bsnc->bsc", h, x),
    "reversed": lambda h, x: torch.sum(x * h[..., None], dim=2),
    "keepdim": lambda h, x: (h.unsqueeze(-1) * x).sum(-2, keepdim=True).squeeze(-2),
}
OUTER = {
    "einsum": lambda h, y: torch.einsum("bsn,bsc->bsnc", h, y),
    "matmul": lambda h, y: h.unsqueeze(-1) @ y.unsqueeze(-2),
    "expanded": lambda h, y: y.unsqueeze(-2).expand(-1, -1, 4, -1) * h[..., None].expand(-1, -1, -1, WIDTH),
}
MERGE = {
    "reversed": lambda mixed, out: torch.add(out, mixed),
    "in place": lambda mixed, out: mixed.add_(out),
}
SPELLINGS = {
    **{f"mix by {name}": Pieces(mix=f) for name, f in MIX.items()},
    **{f"pre by {name}": Pieces(pre=f) for name, f in PRE.items()},
    **{f"outer by {name}": Pieces(outer=f) for name, f in OUTER.items()},
    **{f"merge {name}": Pieces(merge=f) for name, f in MERGE.items()},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_of_the_mixing_is_raised(name: str) -> None:
    got = raised(model(SPELLINGS[name]), tokens())
    assert got.reasons == []
    assert got.ops == WHOLE
    transposes = [node.args[4] for node in got.after.graph.nodes if op_of(node) == "post"]
    assert transposes == ["transposed" in name] * 2
    got.assert_same()


class Fused(Site):
    def forward(self, x: Tensor) -> Tensor:
        pre, post, res = self.gates(x)
        y = torch.tanh(self.branch(torch.einsum("bsn,bsnc->bsc", pre, x)))
        return torch.addcmul(res @ x, post.unsqueeze(-1), y.unsqueeze(-2))


def test_addcmul_is_a_post() -> None:
    got = raised(model(lambda: Fused(Pieces())), tokens())
    assert got.ops == WHOLE
    got.assert_same()


class StreamMinor(Site):
    """State [B, S, C, n], as TransformerEngine lays it out."""

    def forward(self, x: Tensor) -> Tensor:
        pre, post, res = self.gates(x.transpose(-1, -2))
        y = torch.tanh(self.branch((x * pre.unsqueeze(-2)).sum(-1)))
        return torch.einsum("bscj,bsij->bsci", x, res) + y.unsqueeze(-1) * post.unsqueeze(-2)


class StreamMinorModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        streams = torch.stack([x] * self.n, dim=-1)
        for site in self.sites:
            streams = site(streams)
        return streams.mean(-1)


class Flat(Site):
    """State [S, B, n * C], as Megatron lays it out."""

    def forward(self, x: Tensor) -> Tensor:
        streams = x.view(x.shape[0], x.shape[1], self.n, -1)
        pre, post, res = self.gates(streams)
        y = torch.tanh(self.branch((pre.unsqueeze(-1) * streams).sum(2)))
        mixed = torch.matmul(res, streams)
        return mixed.flatten(-2) + (post.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)


class FlatModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        streams = x.repeat(1, 1, self.n)
        for site in self.sites:
            streams = site(streams)
        return streams.unflatten(-1, (self.n, -1)).sum(-2)


@pytest.mark.parametrize(("whole", "site"), [(StreamMinorModel, StreamMinor), (FlatModel, Flat)])
@pytest.mark.parametrize("batch", [1, 2])
def test_other_layouts_are_raised(whole: type[Model], site: type[Site], batch: int) -> None:
    torch.manual_seed(0)
    got = raised(whole([site(Pieces()) for _ in range(2)]).double(), tokens(batch=batch))
    assert got.reasons == []
    assert got.ops == WHOLE
    got.assert_same()


class Static(nn.Module):
    """Coefficients that do not depend on the input: parameters, H through a Sinkhorn of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Parameter(torch.rand(STREAMS))
        self.post = nn.Parameter(torch.rand(STREAMS))
        self.logits = nn.Parameter(torch.randn(STREAMS, STREAMS))
        self.branch = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.branch(torch.einsum("n,bsnc->bsc", self.pre, x)))
        return softmax_sinkhorn(self.logits) @ x + self.post[:, None] * y[:, :, None, :]


def test_static_coefficients_leave_the_sinkhorn_and_the_mixing() -> None:
    got = raised(model(Static), tokens())
    assert got.reasons == []
    assert got.ops == {"expand": 1, "sinkhorn": 2, "pre": 2, "post": 2, "collapse": 1}
    got.assert_same()


class Permutations(Site):
    """mHC-lite: H is a convex combination of all n! permutations."""

    def __init__(self) -> None:
        super().__init__(Pieces())
        orders = torch.tensor(list(itertools.permutations(range(STREAMS))))
        self.register_buffer("matrices", torch.eye(STREAMS)[orders])
        self.phi = nn.Parameter(torch.randn(2 * STREAMS + len(orders), STREAMS * WIDTH) / WIDTH)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.n
        p, q, s = nn.functional.linear(self.pieces.norm(x.flatten(-2)), self.phi).split([n, n, 24], -1)
        return p.sigmoid(), 2 * q.sigmoid(), torch.einsum("bsk,kij->bsij", s.softmax(-1), self.matrices)


class Kronecker(Site):
    """KromHC: H is the Kronecker product of two 2 x 2 matrices."""

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.n
        p, q, s = nn.functional.linear(self.pieces.norm(x.flatten(-2)), self.phi).split([n, n, 16], -1)
        a, b = s[..., :2].softmax(-1), s[..., 2:4].softmax(-1)
        left, right = (torch.stack([t, t.flip(-1)], -2) for t in (a, b))
        res = torch.einsum("bsij,bskl->bsikjl", left, right).reshape(*s.shape[:-1], n, n)
        return p.sigmoid(), 2 * q.sigmoid(), res


@pytest.mark.parametrize("site", [Permutations, lambda: Kronecker(Pieces())], ids=["permutations", "kronecker"])
def test_another_family_of_matrices_is_mixed_but_not_computed_by_us(site: type[nn.Module]) -> None:
    got = raised(model(site), tokens())
    assert got.ops == {"expand": 1, "pre": 2, "post": 2, "collapse": 1}
    assert (
        got.reasons
        == [
            "coefficients: res comes from `einsum`, which is no projection of the streams",
            "coefficients: rows from 8 on of the projection are used for something else",
        ]
        * 2
    )
    got.assert_same()


def test_unconstrained_hyper_connections_are_linear_coefficients() -> None:
    pieces = Pieces(sinkhorn=lambda s: s, activate=lambda p: p, post_scale=1.0)
    got = raised(model(pieces), tokens())
    assert got.reasons == []
    assert got.ops == WHOLE
    assert all(a["gate"] == "linear" and a["res"] == "linear" for a in got.attributes("coefficients"))
    got.assert_same()


def test_logits_through_a_tanh_are_refused() -> None:
    got = raised(model(Pieces(sinkhorn=lambda s: s, activate=torch.tanh)), tokens())
    assert got.ops == {"expand": 1, "pre": 2, "post": 2, "collapse": 1}
    assert "coefficients: the pre logits pass through `tanh`" in got.reasons
    got.assert_same()


class Identity(Site):
    """No H at all, and a gate of magnitude and floor."""

    def __init__(self) -> None:
        super().__init__(Pieces())
        self.phi = nn.Parameter(torch.randn(2 * STREAMS, STREAMS * WIDTH) / WIDTH)
        self.bias = nn.Parameter(torch.randn(2 * STREAMS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        logits = nn.functional.linear(flat, self.phi) * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-5)
        p, q = logits.chunk(2, -1)
        pre = torch.sigmoid(p * self.alpha[0] + self.bias[: self.n]) + 1e-3
        post = 1.5 * torch.sigmoid(q * self.alpha[1] + self.bias[self.n :]) + 1e-3
        y = torch.tanh(self.branch((pre.unsqueeze(-1) * x).sum(2)))
        return post.unsqueeze(-1) * y.unsqueeze(-2) + x


def test_a_site_without_a_matrix() -> None:
    got = raised(model(Identity), tokens())
    assert got.reasons == []
    assert got.ops == WHOLE
    (first, _) = got.attributes("coefficients")
    assert (first["layout"], first["res"], first["norm_eps"]) == ("pre,post", "none", 1e-5)
    assert (first["pre_eps"], first["post_scale"], first["post_eps"]) == (1e-3, 1.5, 1e-3)
    got.assert_same()


class SinglePass(nn.Module):
    """The pre-mix of a site comes from the coefficients of the site before."""

    def __init__(self) -> None:
        super().__init__()
        self.sites = nn.ModuleList(Site(Pieces()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        streams = torch.stack([x] * STREAMS, dim=2)
        pre, _, _ = self.sites[0].gates(streams)
        for site in self.sites:
            following, post, res = site.gates(streams)
            y = torch.tanh(site.branch((pre.unsqueeze(-1) * streams).sum(2)))
            streams = res @ streams + post.unsqueeze(-1) * y.unsqueeze(-2)
            pre = following
        return (pre.unsqueeze(-1) * streams).sum(2)


def test_mixing_with_the_coefficients_of_the_site_before_is_raised() -> None:
    got = raised(SinglePass().double(), tokens())
    assert (got.ops["pre"], got.ops["post"], got.ops["expand"]) == (4, 3, 1)
    got.assert_same()


def check_casts(got: Raised) -> None:
    assert got.reasons == []
    assert got.ops == WHOLE
    assert all(attributes["mix_dtype"] == torch.bfloat16 for attributes in got.attributes("coefficients"))


class Cast(Site):
    """bf16 streams, fp32 coefficients, post and H rounded to bf16 before they mix."""

    def forward(self, x: Tensor) -> Tensor:
        pre, post, res = self.gates(x.float())
        y = torch.tanh(self.branch((pre.unsqueeze(-1) * x).sum(2).to(x.dtype)))
        mixed = torch.matmul(res.to(x.dtype).transpose(-1, -2), x)
        return post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + mixed


def test_the_dtype_of_the_mixing_is_an_attribute() -> None:
    torch.manual_seed(0)
    whole = Model([Cast(Pieces()) for _ in range(2)])
    for site in whole.sites:
        site.branch.to(torch.bfloat16)
    got = raised(whole, tokens().to(torch.bfloat16))
    check_casts(got)
    got.assert_same(rtol=0.05)
