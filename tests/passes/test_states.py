from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from mhc_compile import ops
from mhc_compile.passes.states import State, find_states
from tests.passes.models import WIDTH, tokens

GATE = torch.full((2, 5, 4), 0.25)


class Chain(nn.Module):
    """Three sites of our ops written by hand; ``between`` is applied to the streams after each."""

    def __init__(self, between: Callable[[Tensor], Tensor], head: bool = False, fork: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("gate", GATE)
        self.between, self.head, self.fork = between, head, fork

    def forward(self, x: Tensor) -> Tensor:
        mhc = torch.ops.mhc
        streams = first = mhc.expand.default(x, 4)
        for layer in self.layers:
            y = layer(mhc.pre.default(streams, self.gate))
            streams = self.between(mhc.post.default(streams, y, self.gate, None, False))
        if self.fork:
            streams = streams + mhc.post.default(first, x, self.gate, None, False)
        return mhc.pre.default(streams, self.gate) if self.head else mhc.collapse.default(streams, "mean")


def states(module: nn.Module) -> list[list[State]]:
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(module, backend=lambda gm, _: graphs.append(gm) or gm.forward)(tokens(2, 5, WIDTH))
    return find_states(graphs[0].graph)


def test_a_chain_from_expand_to_collapse() -> None:
    (chain,) = states(Chain(lambda x: x))
    assert len(chain) == 3
    assert [state.is_expanded for state in chain] == [True, False, False]
    assert all(after.producer is before.post for before, after in itertools.pairwise(chain))
    assert all(len(state.pres) == 1 and not state.paths and not state.shared for state in chain)
    assert all(state.output is not None and state.output.target is not ops.pre.overload for state in chain)


def test_a_head_that_reads_the_last_state_adds_one_without_a_branch() -> None:
    (chain,) = states(Chain(lambda x: x, head=True))
    assert len(chain) == 4
    assert chain[-1].post is None
    assert chain[-1].output is None
    assert len(chain[-1].pres) == 1


def test_operations_that_may_be_run_again_belong_to_the_state() -> None:
    (chain,) = states(Chain(lambda x: (x * 0.5).to(torch.float32)))
    assert len(chain) == 3
    assert [len(state.paths) for state in chain] == [0, 2, 2]


def test_anything_else_ends_the_chain() -> None:
    for between in (torch.nn.functional.dropout, torch.sin):
        chains = states(Chain(between))
        assert [len(chain) for chain in chains] == [1, 1, 1]
        assert not chains[1][0].is_expanded


def test_a_second_reader_of_a_state_shares_it() -> None:
    chains = states(Chain(lambda x: x, fork=True))
    assert [len(chain) for chain in chains] == [3, 1]
    assert chains[0][0].shared
    assert chains[1][0].shared
    assert chains[1][0].producer is chains[0][0].producer


def test_no_ops_no_chain() -> None:
    assert states(nn.Linear(WIDTH, WIDTH)) == []
