"""Sites of a backward graph that one call rebuilds with their branch inputs, and those that it does not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

TOKENS = 6


class Block:
    """A graph of `post` and `pre_norm`, and of what reads them."""

    def __init__(self, n: int = 4, dtype: torch.dtype = torch.bfloat16, width: int = 32) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()
        self.n, self.dtype, self.width = n, dtype, width
        self.outputs: list[fx.Node] = []

    def value(self, node: fx.Node, *shape: int, dtype: torch.dtype | None = None) -> fx.Node:
        with self.mode:
            node.meta["val"] = torch.empty((TOKENS, *shape), dtype=dtype or self.dtype)
        return node

    def given(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> fx.Node:
        return self.value(self.graph.placeholder(name), *shape, dtype=dtype)

    def inputs(self, sites: int) -> tuple[fx.Node, list[dict[str, fx.Node]]]:
        """X_0, and y, q, h, p and a weight of each site: all placeholders, before any call."""
        gates = {"q": (self.n,), "h": (self.n, self.n), "p": (self.n,)}
        found = []
        x = self.given("x", self.n, self.width)
        for index in range(sites):
            site = {name: self.given(f"{name}{index}", *shape, dtype=torch.float32) for name, shape in gates.items()}
            found.append(site | {"y": self.given(f"y{index}", self.width), "w": self.given(f"w{index}", self.width)})
        return x, found

    def post(self, state: fx.Node, site: dict[str, fx.Node], mixed: bool = True) -> fx.Node:
        args = (state, site["y"], site["q"], site["h"] if mixed else None, False)
        return self.value(self.graph.call_function(torch.ops.mhc.post.default, args), self.n, self.width)

    def posts(self, sites: int) -> tuple[list[fx.Node], list[dict[str, fx.Node]]]:
        """The states of so many sites after one another, and what `inputs` gives of each."""
        state, found = self.inputs(sites)
        states = []
        for site in found:
            state = self.post(state, site)
            states.append(state)
        return states, found

    def norm(self, state: fx.Node, gate: fx.Node, weight: fx.Node | None, eps: float = 1e-6) -> fx.Node:
        """Its out is an output of the graph."""
        args = (state, gate, weight, None, "rms", eps, 0.0, True)
        call = self.graph.call_function(torch.ops.mhc.pre_norm.default, args)
        with self.mode:
            out, statistics = torch.empty(TOKENS, self.width, dtype=self.dtype), torch.empty(TOKENS, 1)
            call.meta["val"] = (out, statistics, torch.empty(0, dtype=self.dtype))
        self.outputs += [
            self.value(self.graph.call_function(operator.getitem, (call, 0)), self.width),
            self.value(self.graph.call_function(operator.getitem, (call, 1)), 1, dtype=torch.float32),
        ]
        return call

    def sum(self, state: fx.Node) -> fx.Node:
        """Something of ours that is computed from a state, [T, n]."""
        call = self.graph.call_function(torch.ops.aten.sum.dim_IntList, (state, [-1]))
        return self.value(call, self.n, dtype=torch.float32)

    def done(self, *more: fx.Node) -> fx.Graph:
        self.graph.output((*self.outputs, *more))
        return self.graph


def block_of(normed: str, **changes: Any) -> fx.Graph:
    """A site for each letter: n with a norm, p without. All states are read."""
    block = Block(**changes)
    state, sites = block.inputs(len(normed))
    states = []
    for site in sites:
        state = block.post(state, site)
        states.append(state)
    for letter, state, site in reversed(list(zip(normed, states, sites, strict=True))):  # as late as they are read
        if letter == "n":
            block.norm(state, site["p"], site["w"])
    return block.done(*states)


def taken(name: str, named: dict[str, Any]) -> str:
    return ""


def merged(graph: fx.Graph, refused: Callable[[str, dict[str, Any]], str] = taken) -> tuple[list[str], LoweringLog]:
    """The calls of ours that are left, in order."""
    from mhc_compile.lowering import replay_runs

    log = LoweringLog()
    replay_runs.merge(graph, log, refused)
    graph.lint()
    names = (str(node.target).removesuffix(".default") for node in graph.nodes)
    return [name for name in names if name.startswith("mhc")], log


CALL, POST, NORM = "mhc_kernel.replay_normed", "mhc.post", "mhc.pre_norm"


@pytest.mark.parametrize(
    ("normed", "left"),
    [
        ("n", [POST, NORM]),
        ("nn", [CALL]),
        ("nnnn", [CALL]),
        ("nnnnn", [CALL, POST, NORM]),
        ("nnnnnnnn", [CALL, CALL]),
        ("np", [CALL]),
        ("pnpn", [CALL]),
        ("pppp", [POST] * 4),  # `replay` takes them
        ("nnnnppp", [CALL, POST, POST, POST]),
    ],
)
def test_which_sites_are_one_call(normed: str, left: list[str]) -> None:
    from mhc_compile.lowering import replay_runs

    graph = block_of(normed)
    parts = replay_runs.find(graph)
    assert [len(part) for part in parts] == [4 if count >= 4 else count for count in lengths(normed)]
    before = str(graph)
    assert merged(graph, lambda name, named: "no" if name == "pre_norm" else "")[0].count(CALL) == 0
    assert str(graph) == before, "no kernel takes the norms: nothing is changed"
    calls, log = merged(graph)
    assert calls == left
    assert log.counts()["replay", "fused"] == left.count(CALL)


def lengths(normed: str) -> list[int]:
    """Of the parts of four that are two sites or more, one of them with a norm."""
    parts = [normed[start : start + 4] for start in range(0, len(normed), 4)]
    return [len(part) for part in parts if len(part) > 1 and "n" in part]


def test_what_a_call_is_given() -> None:
    """Each state and each result of a norm goes to who read it."""
    graph = block_of("npn")
    merged(graph)
    (call,) = (node for node in graph.nodes if str(node.target).startswith(CALL))
    _, ys, posts, mixes, transpose, normed, written, pres, weights, biases, *rest = call.args
    assert [str(value) for value in (*ys, *posts, *mixes, *pres, *weights)] == [
        "y0", "y1", "y2", "q0", "q1", "q2", "h0", "h1", "h2", "p0", "p2", "w0", "w2",
    ]  # fmt: skip
    assert (transpose, normed, written, biases) == (False, [True, False, True], [True] * 3, [])
    assert rest == ["rms", 1e-6, 0.0, True]
    (output,) = graph.find_nodes(op="output")
    assert [value.args for value in output.args[0]] == [(call, index) for index in (6, 7, 3, 4, 0, 1, 2)]
    shapes = [tuple(value.shape) for value in call.meta["val"]]
    assert shapes == [(6, 4, 32)] * 3 + [(6, 32), (6, 1), (0,)] * 2


def test_a_saved_state_begins_another_call() -> None:
    """Two blocks: the second starts from a state that the forward has kept, below the backward of the first."""
    block = Block()
    x, sites = block.inputs(4)
    kept = block.given("kept", block.n, block.width)
    states = []
    for start, own in ((kept, sites[2:]), (x, sites[:2])):
        state = start
        for site in own:
            state = block.post(state, site)
            states.append(state)
        block.outputs.append(block.sum(state))  # what the backward of the block does
        for state, site in zip(states[-2:], own, strict=True):
            block.norm(state, site["p"], site["w"])
    graph = block.done(*states)
    assert merged(graph)[0] == [CALL, CALL]
    calls = [node for node in graph.nodes if str(node.target).startswith(CALL)]
    assert [str(call.args[0]) for call in calls] == ["kept", "x"]
    order = [str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith((CALL, "aten.sum"))]
    assert order == ["replay_normed", "sum"] * 2


def test_what_has_to_be_computed_in_between_stays() -> None:
    """A gate that comes from its own state has no place in the call, nor has a branch output that does."""
    block = Block()
    x, sites = block.inputs(3)
    first = block.post(x, sites[0])
    block.norm(first, sites[0]["p"], sites[0]["w"])
    second = block.post(first, sites[1])
    block.norm(second, block.sum(second), sites[1]["w"])
    late = block.graph.call_function(torch.ops.aten.sum.dim_IntList, (second, [1]))
    third = block.post(second, sites[2] | {"y": block.value(late, block.width)})
    block.norm(third, sites[2]["p"], sites[2]["w"])
    graph = block.done(first, second, third)
    assert merged(graph)[0] == [CALL, NORM, POST, NORM]
    (call,) = (node for node in graph.nodes if str(node.target).startswith(CALL))
    assert call.args[5] == [True, False]


@pytest.mark.parametrize("other", ["eps", "weight"])
def test_norms_of_another_kind_cut_a_run(other: str) -> None:
    block = Block()
    states, sites = block.posts(4)
    for index, (state, site) in enumerate(zip(states, sites, strict=True)):
        unlike = index >= 2
        weight = None if unlike and other == "weight" else site["w"]
        block.norm(state, site["p"], weight, eps=1e-5 if unlike and other == "eps" else 1e-6)
    assert merged(block.done(*states))[0] == [CALL, CALL]


@pytest.mark.parametrize(("n", "dtype"), [(8, torch.bfloat16), (4, torch.float32)])
def test_what_does_not_fit_the_registers_stays_and_says_so(n: int, dtype: torch.dtype) -> None:
    calls, log = merged(block_of("nnn", n=n, dtype=dtype, width=4096))
    assert calls == [POST] * 3 + [NORM] * 3
    assert [(entry.op, entry.provider) for entry in log.entries] == [("replay", "a kernel a site")]
    assert f"{n} streams of 4096 channels" in log.entries[0].reason


def test_a_state_that_nobody_reads_is_not_written() -> None:
    from mhc_compile.lowering import replay_runs

    block = Block()
    states, sites = block.posts(3)
    for state, site in zip(states, sites, strict=True):
        block.norm(state, site["p"], site["w"])
    dead = block.sum(states[0])
    graph = block.done(states[1])
    merged(graph)
    assert dead in graph.nodes
    assert replay_runs.drop_unread(graph) == 2
    assert replay_runs.drop_unread(graph) == 0, "once is enough"
    graph.lint()
    (call,) = (node for node in graph.nodes if str(node.target).startswith(CALL))
    assert call.args[6] == [False, True, False]
    assert [value.numel() for value in call.meta["val"][:3]] == [0, 6 * 4 * 32, 0]
    with block.mode:
        again = call.target(*fx.map_arg(call.args, lambda node: node.meta["val"]))
    assert [value.shape for value in again] == [value.shape for value in call.meta["val"]]
