"""Tasks of a graph, critical path and slack, on graphs small enough to do by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.cost import Device
from mhc_compile.scheduler import emit
from mhc_compile.scheduler.dag import Dag, Task, base_of, from_graph, is_opaque, kind_of, readers

DEVICE = Device("test", 1e9, {"bfloat16": 1e12, "float32": 1e12}, 1e-6)


def diamond() -> Dag:
    """a (2) feeds b (3) and c (1), which feed d (2)."""
    tasks = [Task("a", 2.0), Task("b", 3.0), Task("c", 1.0), Task("d", 2.0)]
    return Dag(tasks, [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])


def test_critical_path_and_slack() -> None:
    dag = diamond()
    assert dag.total() == 8.0
    assert dag.span() == 7.0
    assert dag.critical_path() == ["a", "b", "d"]
    assert dag.slack() == {"a": 0.0, "b": 0.0, "c": 2.0, "d": 0.0}
    assert dag.earliest()["d"] == 5.0


def test_work_that_nothing_waits_for_has_slack_to_the_end() -> None:
    dag = Dag([Task("a", 1.0), Task("gradient", 1.0), Task("b", 5.0)], [("a", "gradient"), ("a", "b")])
    assert dag.slack()["gradient"] == 4.0


def test_an_empty_program() -> None:
    assert (Dag().span(), Dag().critical_path(), Dag().slack()) == (0.0, [], {})


def test_the_program_is_an_order_of_the_graph() -> None:
    with pytest.raises(ValueError, match="a stands before b"):
        Dag([Task("a", 1.0), Task("b", 1.0)], [("b", "a")])
    with pytest.raises(ValueError, match="two tasks"):
        Dag([Task("a", 1.0), Task("a", 1.0)])


@given(st.integers(1, 9), st.randoms(use_true_random=False))
def test_span_is_the_longest_chain(count: int, random: object) -> None:
    tasks = [Task(str(index), random.randint(1, 9)) for index in range(count)]  # type: ignore[attr-defined]  # a Random
    edges = [
        (str(a), str(b))
        for b in range(count)
        for a in range(b)
        if random.random() < 0.4  # type: ignore[attr-defined]  # a Random
    ]
    dag = Dag(tasks, edges)

    def longest(name: str) -> float:
        return dag.tasks[name].seconds + max((longest(one) for one in dag.after(name)), default=0.0)

    assert dag.span() == max(longest(task.name) for task in tasks)
    path = dag.critical_path()
    assert sum(dag.tasks[name].seconds for name in path) == dag.span()
    assert all(b in dag.after(a) for a, b in itertools.pairwise(path))
    slack = dag.slack()
    assert all(value >= 0 for value in slack.values())
    assert all(slack[name] == 0 for name in path)


def traced(function: object, *inputs: Tensor) -> fx.Graph:
    graph: fx.Graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return graph


def test_fusible_work_is_one_task_and_opaque_calls_are_their_own() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        h = torch.relu(x + 1) * 2
        return torch.sin((h @ w).t() * 3).sum(0)

    graph = traced(model, torch.ones(8, 8), torch.ones(8, 8))
    dag = from_graph(graph, DEVICE)
    kinds = [task.kind for task in dag.tasks.values()]
    assert kinds == ["memory", "matmul", "memory"]
    first, matmul, last = dag.tasks.values()
    assert len(first.nodes) == 3, "add, relu, mul are one launch"
    assert first.bytes == 2 * 8 * 8 * 4, "what enters and what leaves"
    assert last.bytes == 8 * 8 * 4 + 8 * 4, "the view between moves nothing"
    assert dag.before(last.name) == {matmul.name}
    assert first.seconds == pytest.approx(1e-6 + 512 / 1e9)


def test_two_halves_of_a_chain_around_a_matmul_are_not_one_task() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        h = torch.relu(x)
        return torch.sin(h) + (h @ w)  # sin could be fused with either side

    dag = from_graph(traced(model, torch.ones(8, 8), torch.ones(8, 8)), DEVICE)
    assert [task.kind for task in dag.tasks.values()] == ["memory", "matmul", "memory"]
    assert dag.order[0] != dag.order[2]


def test_fused_work_on_a_side_task_waits_for_its_reader() -> None:
    tasks = [Task("s", 1.0, "s"), Task("add", 1.0), Task("cast", 1.0), Task("m", 1.0, "matmul"), Task("read", 1.0, "x")]
    edges = [("s", "add"), ("add", "cast"), ("cast", "read"), ("m", "read")]
    assert Dag(tasks, edges).sunk(["s"]).order == ["s", "m", "add", "cast", "read"]
    assert Dag(tasks, edges[:2]).sunk(["s"]).order == ["s", "m", "read", "add", "cast"]
    assert Dag(tasks, edges).sunk([]).order == ["s", "add", "cast", "m", "read"]


def test_measured_kinds_replace_the_estimate() -> None:
    graph = traced(lambda x: x @ x, torch.ones(8, 8))
    dag = from_graph(graph, DEVICE, lambda kind, size: 7.0 if kind == "matmul" and size == 2 * 256 else None)
    assert dag.total() == 7.0


def test_kinds() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(4, 4)
    mm = graph.call_function(torch.ops.aten.mm.default, (x, x))
    wide = graph.call_function(torch.ops.aten.mm.dtype, (x, x, torch.float32))
    ours = graph.call_function(emit.JOIN, ([x], [], "", 0))
    item = graph.call_function(torch.ops.aten.view.default, (mm, [16]))
    assert [kind_of(node) for node in (mm, wide, ours)] == ["matmul", "aten.mm.dtype", "mhc_stream.join"]
    assert not is_opaque(item)
    assert base_of(item) is mm
    assert readers(x) == {mm, wide, ours}
