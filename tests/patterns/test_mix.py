"""Where the sites are: what makes a sum a post-apply, and which states and gates follow from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from mhc_compile.patterns import mix, reading
from mhc_compile.patterns.base import Candidate, Refused
from mhc_compile.patterns.region import GraphFacts
from tests.spellings.harness import capture, raised
from tests.spellings.site import Model, Pieces, Site, model, tokens


def found_in(model: Callable[..., Tensor], *args: Tensor) -> tuple[list[Candidate | Refused], list[mix.State]]:
    graph, _ = capture(model, *args)
    return mix.find(graph.graph, GraphFacts(graph.graph, _is_parameter))


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(reading.value(node), nn.Parameter)


def test_states_and_their_gates() -> None:
    found, states = found_in(model(Pieces(), sites=3), tokens())
    assert [candidate.what for candidate in found] == ["post"] * 3 + ["pre"] * 3
    assert len(states) == 4
    assert [sorted(state.gates.values()) for state in states] == [["post", "pre", "res"]] * 3 + [[]]
    assert {(state.stream, state.channel) for state in states} == {(2, 3)}


def test_how_the_matrix_is_read_is_an_attribute() -> None:
    for transposed in (False, True):
        pieces = Pieces(mix=lambda h, x, t=transposed: (h.mT if t else h) @ x)
        found, _ = found_in(model(pieces, sites=1), tokens())
        assert isinstance(found[0], Candidate)
        assert found[0].attributes == {"transpose": transposed}


class Unread(Site):
    """The branch reads one stream, no weighted sum of them."""

    def forward(self, x: Tensor) -> Tensor:
        _, post, res = self.gates(x)
        return res @ x + post.unsqueeze(-1) * torch.tanh(self.branch(x[:, :, 0])).unsqueeze(-2)


def test_a_site_without_a_pre_is_reported() -> None:
    got = raised(model(lambda: Unread(Pieces()), sites=1), tokens())
    assert got.ops["post"] == 1
    assert "pre: the branch reads no weighted sum of the streams that is known" in got.reasons
    got.assert_same()


class Foreign(Site):
    """The gates come from another input than the streams."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        pre, post, res = self.gates(other)
        y = torch.tanh(self.branch((pre.unsqueeze(-1) * x).sum(2)))
        return res @ x + post.unsqueeze(-1) * y.unsqueeze(-2)


class Apart(Site):
    """What is added does not come from the streams."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        _, post, res = self.gates(x)
        return res @ x + post.unsqueeze(-1) * self.branch(other[:, :, 0]).unsqueeze(-2)


@pytest.mark.parametrize("site", [Foreign, Apart])
def test_without_evidence_there_is_no_site(site: type[nn.Module]) -> None:
    x, other = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    found, states = found_in(site(Pieces()).double(), x, other)
    assert (found, states) == ([], [])


def test_more_than_sixteen_rows_are_no_streams() -> None:
    sites = [Site(Pieces(), n=17)]
    found, _ = found_in(Model(sites, n=17).double(), tokens())
    assert found == []


@pytest.mark.parametrize("n", [2, 3, 6, 8])
def test_any_number_of_streams(n: int) -> None:
    """Six streams of six channels: only the place of the axes tells them apart."""
    torch.manual_seed(0)
    got = raised(Model([Site(Pieces(), n=n) for _ in range(2)], n=n).double(), tokens())
    assert got.reasons == []
    assert got.ops == {"expand": 1, "coefficients": 2, "pre": 2, "post": 2, "collapse": 1}
    got.assert_same()


def test_a_result_wider_than_the_streams_keeps_its_dtype() -> None:
    class Wide(Site):
        def forward(self, x: Tensor) -> Tensor:
            pre, post, res = self.gates(x.float())
            y = torch.tanh(self.branch((pre.unsqueeze(-1) * x.float()).sum(2)))
            return res @ x.float() + post.unsqueeze(-1) * y.unsqueeze(-2)

    torch.manual_seed(0)
    got = raised(Model([Wide(Pieces())]), tokens().to(torch.bfloat16))
    assert (got.ops["pre"], got.ops["post"]) == (1, 1)
    got.assert_same(rtol=1e-2)


def test_a_branch_input_that_is_rounded_stays_rounded() -> None:
    """``.to(bf16)`` and then the norm's own ``.float()``: the first cast is pre's, the second is the norm's. Taken for
    one, the streams would be widened in memory, and u would skip a rounding."""

    class Rounded(Site):
        def forward(self, x: Tensor) -> Tensor:
            pre, post, res = self.gates(x.float())
            u = (pre.unsqueeze(-1) * x).sum(2).to(x.dtype)
            wide = u.float()
            y = torch.tanh(self.branch(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)
            return (res @ x.float() + (post.unsqueeze(-1) * y.unsqueeze(-2)).float()).to(x.dtype)

    torch.manual_seed(0)
    got = raised(Model([Rounded(Pieces()) for _ in range(2)]), tokens().to(torch.bfloat16))
    assert (got.ops["pre"], got.ops["post"]) == (2, 2)
    for node in got.after.graph.nodes:
        if node.target is torch.ops.mhc.pre.default:
            assert reading.dtype(node) == reading.dtype(node.args[0]) == torch.bfloat16
    got.assert_same(rtol=2e-2)
