"""Sites whose branch reads the streams through a gate per channel, in several spellings, and what is almost one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from mhc_compile.capture import copy_graph
from mhc_compile.config import Options
from mhc_compile.passes.base import PassContext, run_pass
from mhc_compile.passes.raise_chains import raise_chains
from tests.spellings.harness import raised
from tests.spellings.site import Model, tokens

N, C, RANK = 4, 6, 3


def norm_each(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1.0 + weight)


def norm_inverse_first(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x / torch.sqrt(x.square().sum(-1, keepdim=True) / C + 1e-3))


def norm_shared_weight(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (C,), weight[0], 1e-3)


def gate_linear(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(F.silu(F.linear(x.flatten(-2), down) / N), up)).unflatten(-1, (N, C))


def gate_einsum(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    hidden = F.silu(torch.einsum("bsnc,rnc->bsr", x, down.unflatten(-1, (N, C))) * 0.5)
    return 2.0 * torch.einsum("bsr,ncr->bsnc", hidden, up.unflatten(0, (N, C))).sigmoid()


def gate_matmul(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return (F.silu(x.flatten(-2) @ down.t()) @ up.mT).sigmoid().view_as(x)


@dataclass(frozen=True)
class Spelling:
    """How a site reads its streams; shapes [B, S, n, C]."""

    norm: Callable[[Tensor, Tensor], Tensor] = norm_each
    gate: Callable[[Tensor, Tensor, Tensor], Tensor] = gate_linear
    mix: Callable[[Tensor, Tensor], Tensor] = lambda gate, x: (gate * x).mean(-2)


class Site(nn.Module):
    """X' = X + post(normed X) F(u), u through a gate per channel."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(N, C) / 2)
        self.down, self.up = nn.Parameter(torch.randn(RANK, N * C)), nn.Parameter(torch.randn(N * C, RANK))
        self.inject = nn.Parameter(torch.randn(N, N * C) / 3)
        self.branch = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        own = self.spelling
        normed = own.norm(x, self.weight)
        y = torch.tanh(self.branch(own.mix(own.gate(normed, self.down, self.up), normed)))
        post = 2 * torch.sigmoid(F.linear(normed.flatten(-2), self.inject) / N)
        return x + post.unsqueeze(-1) * y.unsqueeze(-2)


def of(spelling: Spelling) -> Model:
    torch.manual_seed(0)
    return Model([Site(spelling) for _ in range(2)]).double()


ALL = {"expand": 1, "stream_norm": 2, "channel_pre": 2, "coefficients": 2, "post": 2, "collapse": 1}


@pytest.mark.parametrize(
    "spelling",
    [
        Spelling(),
        Spelling(norm=norm_inverse_first, gate=gate_einsum),
        Spelling(norm=norm_shared_weight, gate=gate_matmul, mix=lambda gate, x: (x * gate).sum(2)),
        Spelling(mix=lambda gate, x: torch.einsum("bsnc,bsnc->bsc", gate, x)),
    ],
)
def test_a_spelling_is_raised(spelling: Spelling) -> None:
    got = raised(of(spelling), tokens())
    assert got.reasons == []
    assert got.ops == ALL
    got.assert_same()


def test_the_numbers_around_the_weights_are_attributes() -> None:
    got = raised(of(Spelling(gate=gate_einsum)), tokens())
    inner, scale = next(n.args[3:] for n in got.after.graph.nodes if "channel_pre" in str(n.target))
    assert (inner, scale) == (0.5, 2.0 / N)


def test_the_streams_themselves_may_be_read() -> None:
    got = raised(of(Spelling(norm=lambda x, _: x)), tokens())
    assert got.reasons == []
    assert got.ops == {name: count for name, count in ALL.items() if name != "stream_norm"}
    got.assert_same()


def test_streams_side_by_side_and_any_number_of_tokens() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = Site(Spelling())

        def forward(self, x: Tensor) -> Tensor:
            return self.site(x.unflatten(-1, (N, C))).flatten(-2)

    got = raised(Flat().double(), torch.randn(2, 5, N * C, dtype=torch.float64), dynamic=True)
    assert got.reasons == []
    assert got.ops == {"stream_norm": 1, "channel_pre": 1, "coefficients": 1, "post": 1}
    got.assert_same()


def with_tanh(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(F.linear(F.silu(F.linear(x.flatten(-2), down)), up)).unflatten(-1, (N, C))


def with_relu(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(F.relu(F.linear(x.flatten(-2), down)), up)).unflatten(-1, (N, C))


def of_two_streams(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(F.silu(F.linear(x, down[:, :C])), up[:C]))


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (with_tanh, "channel_pre: the gate per channel ends in tanh, not in sigmoid"),
        (with_relu, "channel_pre: there is relu between the weights of the gate, not silu"),
        (of_two_streams, "channel_pre: `sigmoid` is no gate of low rank over all streams and channels"),
        (lambda x, d, u: gate_linear(x * 2.0, d, u), "pre: the branch reads no weighted sum of the streams"),
        (lambda x, d, u: gate_linear(x, d, u) + 0.1, "pre: the branch reads no weighted sum of the streams"),
    ],
)
def test_what_is_almost_one_stays_with_the_reason(
    gate: Callable[[Tensor, Tensor, Tensor], Tensor], reason: str
) -> None:
    got = raised(of(Spelling(gate=gate)), tokens())
    assert any(found.startswith(reason) for found in got.reasons)
    assert "channel_pre" not in got.ops
    assert got.ops["post"] == got.ops["stream_norm"] == 2
    got.assert_same()


def test_an_inside_that_somebody_reads_is_kept() -> None:
    class Watched(Site):
        def forward(self, x: Tensor) -> Tensor:
            normed = norm_each(x, self.weight)
            gate = gate_linear(normed, self.down, self.up)
            y = torch.tanh(self.branch((gate * normed).mean(-2)))
            return x + torch.ones_like(x[..., :1]) * y.unsqueeze(-2) + gate.mean() * 0.0

    torch.manual_seed(0)
    got = raised(Model([Watched(Spelling())]).double(), tokens())
    assert "channel_pre" not in got.ops
    got.assert_same()


def test_the_norm_of_each_stream_is_replayed_not_kept() -> None:
    """It is as large as the streams themselves: the backward makes it again from them."""
    graphs: list[fx.Graph] = []

    def see(graph: fx.GraphModule, _: object) -> object:
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graph = copy_graph(gm)
        run_pass(raise_chains, graph, PassContext(Options()))
        return aot_autograd(fw_compiler=see, bw_compiler=see, partition_fn=min_cut_rematerialization_partition)(
            graph, inputs
        )

    torch._dynamo.reset()
    torch.compile(of(Spelling()), backend=backend)(tokens()).square().mean().backward()
    forward, backward = graphs
    (output,) = forward.find_nodes(op="output")
    norm = torch.ops.mhc.stream_norm.default
    assert norm not in {getattr(node, "target", None) for node in output.args[0]}
    assert len(backward.find_nodes(op="call_function", target=norm)) == 2
