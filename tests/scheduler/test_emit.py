"""Fork and join: the text of a call, the graph, and that inductor never touches a held buffer.

A CPU has no streams, so time is played by its two ends: a moved call runs at its fork, or (``deferred``) at its join,
on the memory that the fork was given. If anything wrote to that memory or freed it in between, the two differ.
"""

from __future__ import annotations

import gc
import itertools
import operator
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code

from mhc_compile.scheduler import emit
from mhc_compile.scheduler.dag import is_opaque
from tests.scheduler.graphs import SIDE, Step, compiled, greedy_buffers, side


def side_graph() -> tuple[fx.Graph, fx.Node, fx.Node]:
    """x, w -> side -> both results; (graph, side, matmul behind it)."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["val"], w.meta["val"] = torch.ones(3, 4), torch.ones(4, 5)
    node = graph.call_function(SIDE, (x, w, 2.0))
    node.meta["val"] = (torch.ones(3, 5), torch.ones(4))
    parts = [graph.call_function(operator.getitem, (node, index)) for index in range(2)]
    matmul = graph.call_function(torch.ops.aten.mm.default, (x, w))
    for part, value in zip((*parts, matmul), (*node.meta["val"], torch.ones(3, 5)), strict=True):
        part.meta["val"] = value
    graph.output((*parts, matmul))
    return graph, node, matmul


def test_a_call_as_text_is_the_call() -> None:
    graph, node, _ = side_graph()
    text, inputs = emit.encode(node)
    assert [one.name for one in inputs] == ["x", "w"]
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    assert all(torch.equal(a, b) for a, b in zip(emit.run_call(text, [x, w]), side(x, w, 2.0), strict=True))
    wide = graph.call_function(torch.ops.aten.sum.dim_IntList, (node.args[0], [0]), {"dtype": torch.float64})
    got = emit.run_call(emit.encode(wide)[0], [x])
    assert len(got) == 1
    assert torch.equal(got[0], x.sum([0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (torch.ops.aten.add_.Tensor, "xx", "writes"),
        (torch.ops.aten.view.default, "x", "view"),
        (torch.ops.aten.full.default, "", "no tensor argument"),
        (torch.sin, "x", "operator overload"),
    ],
)
def test_calls_that_cannot_move(target: Any, args: str, reason: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(3)
    extra = ([3],) if target is torch.ops.aten.view.default else ([3], 1.0) if not args else ()
    with pytest.raises(ValueError, match=reason):
        emit.encode(graph.call_function(target, (*[x] * len(args), *extra)))
    size = graph.placeholder("s")
    size.meta["val"] = 3
    with pytest.raises(ValueError, match="is no tensor"):
        emit.encode(graph.call_function(torch.ops.aten.mul.Tensor, (x, size)))
    with pytest.raises(ValueError, match="kept as text"):
        emit.encode(graph.call_function(torch.ops.aten.sum.default, (x,), {"dtype": torch.device("cpu")}))


def test_a_moved_call_in_the_graph() -> None:
    graph, node, matmul = side_graph()
    position = {other: index for index, other in enumerate(graph.nodes)}
    gate = emit.gate_argument(matmul, position, position[node])
    assert gate is not None
    output = next(iter(graph.find_nodes(op="output")))
    emit.move(node, node, output, 3, (matmul, gate), [matmul])
    graph.lint()
    names = [str(one.target) for one in graph.nodes if one.op == "call_function" and one.target is not operator.getitem]
    assert names == ["mhc_stream.fork.default", "aten.mm.default", "mhc_stream.join.default"]
    fork = next(iter(graph.find_nodes(op="call_function", target=emit.FORK)))
    join = next(iter(graph.find_nodes(op="call_function", target=emit.JOIN)))
    assert matmul.all_input_nodes[0].args == (fork, 2), "the matmul reads an argument through the fork"
    assert len(join.args[0]) == 2, "what passed through for the order alone is not held"
    assert list(join.args[1]) == [matmul]
    gm = fx.GraphModule(torch.nn.Module(), graph)
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    for got, want in zip(gm(x, w), (*side(x, w, 2.0), x @ w), strict=True):
        assert torch.equal(got, want)


def test_a_join_without_its_fork_is_an_error() -> None:
    text, _ = emit.encode(side_graph()[1])
    with pytest.raises(RuntimeError, match="not started by this graph"):
        emit.JOIN([torch.ones(3, 4), torch.ones(4, 5)], [], text, 77)


def test_inputs_are_held_until_the_join_and_a_failed_run_is_dropped() -> None:
    text, _ = emit.encode(side_graph()[1])
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    watched = weakref.ref(x.untyped_storage())
    with emit.deferred():
        held = emit.FORK([x, w], text, 5)
        del x, held
        gc.collect()
        assert watched() is not None or emit._thread.pending[5].inputs[0].sum() == 12
        emit.FORK([torch.zeros(3, 4), w], text, 5)  # the host failed before the join: the next fork takes the slot
        assert emit.JOIN([torch.ones(3, 4), w], [], text, 5)[0].sum() == 0
    assert 5 not in emit._thread.pending


def test_results_alias_for_the_compiler_what_the_fork_was_given() -> None:
    schema = emit.FORK._schema
    assert schema.arguments[0].alias_info.before_set == schema.returns[0].alias_info.before_set
    assert not schema.is_mutable
    assert emit.JOIN._schema.returns[0].alias_info is None


def _join_of(code: str, slot: str) -> int:
    """Where the join of a slot stands in inductor's code."""
    line = next(one for one in code.splitlines() if "= torch.ops.mhc_stream.join" in one and one.endswith(f", {slot})"))
    return code.index(line)


def move_everything(graph: fx.Graph) -> None:
    """Every side call: forked where it stands, joined before its first reader."""
    for slot, node in enumerate(graph.find_nodes(op="call_function", target=SIDE)):
        position = {other: index for index, other in enumerate(graph.nodes)}
        users = {user for item in node.users for user in item.users}
        join = min(users, key=position.__getitem__)
        behind = [one for one in graph.nodes if is_opaque(one) and position[node] < position[one] < position[join]]
        behind = [one for one in behind if one.target is torch.ops.aten.mm.default]
        gate = None
        if behind:
            argument = emit.gate_argument(behind[0], position, position[node])
            gate = (behind[0], argument) if argument is not None else None
        emit.move(node, node, join, slot, gate, behind[-1:])


def both_ends(function: Any, *inputs: Tensor) -> tuple[Any, Any, str]:
    with torch.no_grad():
        early, code = run_and_get_code(function, *inputs)
        with emit.deferred():
            late = function(*inputs)
    return early, late, code[-1]


@pytest.mark.slow
def test_inductor_keeps_what_a_fork_was_given_until_the_join() -> None:
    function = compiled(greedy_buffers, Step(move_everything))
    x, w = torch.randn(64, 64), torch.randn(64, 64) / 8
    early, late, code = both_ends(function, x, w)
    assert torch.equal(early, late)
    assert torch.allclose(early, greedy_buffers(x, w), atol=1e-4)
    call = code[code.index("def call(") :]
    forks = [line for line in call.splitlines() if "= torch.ops.mhc_stream.fork" in line]
    assert len(forks) == 3
    for line in forks:
        slot = line.rsplit(",", 1)[1].strip(" )")
        body = call[call.index(line) : _join_of(call, slot)]
        own = line.split("[", 1)[1].split("]")[0]
        for name in {word.strip(" ,()") for word in own.replace("(", " ").split() if word.startswith("buf")}:
            assert f"= {name}; del {name}" not in body, "reused before the join"
        assert "extern_kernels.mm" in body, "the main stream has work between fork and join"


@pytest.mark.slow
@pytest.mark.parametrize("loose", [False, True])
def test_without_the_alias_inductor_would_write_into_them(loose: bool) -> None:
    """The tests here can fail: with a fork whose results alias nothing (``loose``) the two ends differ."""
    library = torch.library.Library("mhc_test_loose", "DEF")
    library.define("fork(Tensor[] inputs, str call, int slot) -> Tensor[]")

    def fork_loose(inputs: list[Tensor], call: str, slot: int) -> list[Tensor]:
        emit._fork(inputs, call, slot)
        return [torch.empty_like(one) for one in inputs]

    library.impl("fork", fork_loose, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "mhc_test_loose::fork", lambda inputs, call, slot: [torch.empty_like(one) for one in inputs], lib=library
    )

    def step(graph: fx.Graph) -> None:
        for slot, node in enumerate(graph.find_nodes(op="call_function", target=SIDE)):
            output = next(iter(graph.find_nodes(op="output")))
            product = next(iter(graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)))
            emit.move(node, node, output, slot, after=[product])
        for fork in graph.find_nodes(op="call_function", target=emit.FORK) if loose else ():
            fork.target = torch.ops.mhc_test_loose.fork.default

    def chain(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a = x @ w
        first, _ = side(a, w, 2.0)
        b = a * (x @ x).mean()  # the last that inductor sees of a: it writes there
        return b @ w, first

    function = compiled(chain, Step(step), reorder_for_peak_memory=False)
    early, late, _ = both_ends(function, torch.randn(64, 64), torch.randn(64, 64))
    assert torch.equal(early[0], late[0])
    assert torch.equal(early[1], late[1]) is not loose


OPERATIONS = ("relu", "sin", "mm", "add", "side", "odd", "halve")


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5), st.integers(0, 5)), min_size=8, max_size=16))
def test_random_programs_give_the_same_bits_at_both_ends(steps: list[tuple[str, int, int]]) -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        values, results = [x], []
        for name, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            if name == "side":
                out, sums = side(a, w, 0.5)
                results += [out, sums.expand_as(out)]
            else:
                new = {
                    "relu": lambda a=a: torch.relu(a), "sin": lambda a=a: torch.sin(a), "mm": lambda a=a: a @ w,
                    "add": lambda a=a, b=b: a + b, "odd": lambda a=a: a.t().contiguous().t() * 2,
                    "halve": lambda a=a: a / 2,
                }[name]()  # fmt: skip
                values.append(new)
        return torch.stack([values[-1] @ w, *results[::-1]]).sum(0) if results else values[-1] @ w

    function = compiled(program, Step(move_everything))
    early, late, _ = both_ends(function, torch.randn(16, 16), torch.randn(16, 16) / 4)
    assert torch.equal(early, late)


def test_slots_are_of_one_thread() -> None:
    import threading

    text, _ = emit.encode(side_graph()[1])
    seen: list[int] = []

    def other() -> None:
        emit.FORK([torch.zeros(3, 4), torch.ones(4, 5)], text, 1)
        seen.append(len(emit._thread.pending))
        emit.JOIN([torch.zeros(3, 4), torch.ones(4, 5)], [], text, 1)

    emit.FORK([torch.ones(3, 4), torch.ones(4, 5)], text, 1)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [1]
    assert emit.JOIN([torch.ones(3, 4), torch.ones(4, 5)], [], text, 1)[0][0, 0] == 8.0


def test_a_view_that_is_nobodys_is_no_gate() -> None:
    graph, node, matmul = side_graph()
    position = {other: index for index, other in enumerate(graph.nodes)}
    assert emit.gate_argument(matmul, position, 0) is None, "nothing stands before the first node"
    sine = graph.call_function(torch.ops.aten.sin.default, (node.args[0],))
    sine.meta["val"] = torch.ones(3, 4)
    matmul.args = (sine, sine)
    position = dict(zip(graph.nodes, itertools.count(), strict=False))
    assert emit.gate_argument(matmul, position, 99) is None, "a fused value would have to be written for it"
