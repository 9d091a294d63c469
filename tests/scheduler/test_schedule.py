"""The pass on graphs: what it moves and where, when it leaves a graph alone, and its identity for the caches."""

from __future__ import annotations

import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.scheduler import contention as contention_of
from mhc_compile.scheduler import emit, schedule
from mhc_compile.scheduler.assign import MAIN_KINDS, Plan, play
from mhc_compile.scheduler.contention import Contention, Pair
from mhc_compile.scheduler.emit import FORK
from mhc_compile.scheduler.host import Host
from mhc_compile.scheduler.schedule import ScheduleLog, SchedulePass, forks, plan_graph, schedule_patches, using
from tests.lowering.interpreter import interpreted
from tests.scheduler.graphs import SIDE, Step, compiled, greedy_buffers, side


def table(hidden: float = 1.0, kind: str = "mhc_test.side", seconds: float = 5e-6) -> Contention:
    """Everything beside `kind`, of every size."""
    sizes = [10 * 4**power for power in range(10)]
    shares = (hidden, hidden, hidden)
    ranks = (False, True)  # a main stream is raised where there is a CUDA device
    pairs = tuple(Pair(m, kind, s, r, 1e-5, seconds, *shares, 1.0) for m in MAIN_KINDS for s in sizes for r in ranks)
    return Contention("test", pairs, host=Host(0.0, 0.0))


def slow_host() -> Contention:
    """The same table on a host that needs a second a launch."""
    return replace(table(), host=Host(1.0, 0.0))


def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A branch with side work that is read behind it, and side work that nobody reads."""
    u = x @ w
    first, sums = side(u, w, 2.0)
    branch = torch.relu(u @ w) @ w
    out = branch + first
    gradient, _ = side(out, w, 1.0)
    end = (out @ w).relu() @ w
    return end + sums, gradient.t()


def graph_of(function: Any, *inputs: Tensor) -> fx.GraphModule:
    traced: fx.GraphModule = make_fx(function, tracing_mode="fake")(*inputs)
    return traced


def planned(function: Any, *inputs: Tensor) -> tuple[fx.GraphModule, Plan]:
    """A graph with its plan written into it, as it runs, whatever the host."""
    gm = graph_of(function, *inputs)
    plan = plan_graph(gm.graph, table(), forced=True)
    gm.graph.lint()
    gm.recompile()
    return gm, plan


def calls(graph: fx.Graph) -> list[str]:
    return [
        str(node.target).removesuffix(".default").split(".", 1)[1] if "mhc" in str(node.target) else str(node.target)
        for node in graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    ]


def test_side_work_is_moved_and_the_graph_computes_the_same() -> None:
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    gm, plan = planned(model, x, w)
    assert len(plan.moves) == 2
    assert list(forks(gm.graph)) == ["mhc_test.side.default"] * 2
    with emit.deferred():
        late = gm(x, w)
    for got, again, want in zip(gm(x, w), late, model(x, w), strict=True):
        assert torch.equal(got, want)
        assert torch.equal(again, want)
    order = calls(gm.graph)
    first, last = order.index("fork"), order.index("join")
    assert "aten.mm.default" in order[first:last], "the branch runs between"
    assert order.index("fork", last) < len(order) - 1 - order[::-1].index("join")


def test_views_of_results_go_behind_the_join_and_views_of_inputs_before_the_fork() -> None:
    def viewed(x: Tensor, w: Tensor) -> Tensor:
        u = (x @ w) @ w
        out, _ = side(u.t(), w, 2.0)
        seen = out.t().reshape(4, 16)
        return ((x @ x) @ w).reshape(4, 16) @ w.reshape(16, 4) @ seen

    x, w = torch.randn(8, 8), torch.randn(8, 8)
    gm, _ = planned(viewed, x, w)
    assert list(forks(gm.graph)) == ["mhc_test.side.default"]
    with emit.deferred():
        assert torch.equal(gm(x, w), viewed(x, w))


@torch.library.custom_op("mhc_test::slow", mutates_args=())
def slow(x: Tensor) -> Tensor:
    """A call of the main stream that a fork cannot pass an argument to: no library's."""
    return x * 2


@slow.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def behind_a_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Side work that would best start when only calls of ours are left before its reader."""
    u = x @ w
    a = u @ w
    first, _ = side(u, w, 2.0)
    return slow(slow(a)) + first


def without_a_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Side work with nothing but calls of ours between what it reads and who reads it."""
    u = slow(x)
    first, _ = side(u, w, 2.0)
    return slow(slow(u)) + first


def test_a_move_starts_earlier_where_it_has_no_place_later() -> None:
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    gm, plan = planned(behind_a_matmul, x, w)
    (one,) = plan.moves
    gate = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.mm.default and FORK in _sources(node))
    assert plan.dag.order[one.fork] == gate.name, "the plan says where it really starts"
    assert plan.predicted == play(plan.dag, plan.moves, table())[0]
    with emit.deferred():
        assert torch.equal(gm(x, w), behind_a_matmul(x, w))


def _sources(node: fx.Node) -> list[Any]:
    return [arg.args[0].target for arg in node.all_input_nodes if arg.target is operator.getitem]


def test_a_move_without_a_place_is_not_planned_with() -> None:
    """Neither in the graph nor in what the plan promises."""
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    gm, plan = planned(without_a_matmul, x, w)
    assert (plan.moves, plan.predicted, plan.gain) == ([], plan.serial, 0.0)
    assert plan.reason == "1 calls could move and have no place to start"
    assert list(forks(gm.graph)) == []

    def both(x: Tensor, w: Tensor) -> Tensor:
        return behind_a_matmul(without_a_matmul(x, w), w)

    gm, plan = planned(both, x, w)
    assert len(plan.moves) == len(list(forks(gm.graph))) == 1
    assert plan.predicted == play(plan.dag, plan.moves, table())[0]
    assert torch.equal(gm(x, w), both(x, w))


def test_beside_collectives_a_plan_has_to_promise_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of the only two plans with collectives that ran lies below what it takes."""
    real = schedule.from_graph

    def with_a_collective(*args: Any) -> Any:
        dag = real(*args)
        first = next(task for task in dag.tasks.values() if task.kind == "matmul")
        first.kind = "communication"
        return dag

    graphs = [graph_of(model, torch.randn(8, 8), torch.randn(8, 8)) for _ in range(4)]
    monkeypatch.setattr(schedule, "COMMUNICATION_GAIN", 0.9)
    assert plan_graph(graphs[0].graph, table()).moves
    monkeypatch.setattr(schedule, "from_graph", with_a_collective)
    plan = plan_graph(graphs[1].graph, table())
    assert plan.moves == []
    assert "below the 90.00%" in plan.reason
    assert plan_graph(graphs[2].graph, table(), forced=True).moves, "a benchmark may ask for it"
    monkeypatch.setattr(schedule, "COMMUNICATION_GAIN", 0.0)
    assert plan_graph(graphs[3].graph, table()).moves


@pytest.mark.parametrize("contention", [table(-0.5), table(0.0), Contention("test"), table(1.0, "mhc_test.other")])
def test_a_graph_without_a_gain_is_left_as_it_was(contention: Contention) -> None:
    gm = graph_of(model, torch.randn(8, 8), torch.randn(8, 8))
    before = str(gm.graph)
    plan = plan_graph(gm.graph, contention)
    assert str(gm.graph) == before
    assert plan.moves == []
    assert plan.reason


def test_where_the_host_is_the_bottleneck_nothing_moves() -> None:
    gm = graph_of(model, torch.randn(8, 8), torch.randn(8, 8))
    plan = plan_graph(gm.graph, slow_host())
    assert "the host is the bottleneck" in plan.reason
    assert {one.stream for one in plan.timeline} == {"main"}, "a trace shows what runs"
    assert list(forks(gm.graph)) == []
    from torch._inductor import config

    with config.patch({"triton.cudagraphs": True}):
        assert plan_graph(gm.graph, slow_host()).moves


def test_the_report_writes_a_trace(tmp_path: Path) -> None:
    log = ScheduleLog()
    with using(table()):
        planner: Any = schedule_patches({}, log)[schedule.SEAM]
    planner(graph_of(model, torch.randn(8, 8), torch.randn(8, 8)).graph)
    events = json.loads(log.write_trace(tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"predicted: forward"} == {one["args"]["name"] for one in events if one["name"] == "process_name"}


def test_what_the_moves_cost_the_host_counts() -> None:
    """The launches alone are quicker than the device: the moves are not."""
    moves = 2
    seconds = plan_graph(graph_of(model, torch.randn(8, 8), torch.randn(8, 8)).graph, table()).serial
    for each, expected in ((0.4 * seconds, moves), (0.6 * seconds, 0)):
        graph = graph_of(model, torch.randn(8, 8), torch.randn(8, 8)).graph
        assert len(plan_graph(graph, replace(table(), host=Host(0.0, each))).moves) == expected


def test_in_a_graph_of_the_users_the_host_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(schedule, "available", lambda: (slow_host(), ""))
    moved = {}
    for captured in (False, True):
        log = ScheduleLog()
        gm = graph_of(model, torch.randn(8, 8), torch.randn(8, 8))
        planner: Any = schedule_patches({}, log, captured=captured)[schedule.SEAM]
        planner(gm.graph)
        moved[captured] = len(log.plans[0].moves), planner.uuid()
    assert (moved[False][0], moved[True][0]) == (0, 2)
    assert moved[False][1] != moved[True][1]


def test_an_autotuned_matmul_stays_where_inductor_tunes_it() -> None:
    from torch._inductor import config

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(4, 4, dtype=torch.bfloat16)
    wide = graph.call_function(torch.ops.aten.mm.dtype, (x, x, torch.float32))
    wide.meta["val"] = torch.ones(4, 4)
    plain = graph.call_function(torch.ops.aten.mm.default, (x, x))
    plain.meta["val"] = x.meta["val"]
    task = schedule.Task("wide", 1.0, "aten.mm.dtype", 96, [wide])
    assert schedule.movable(task)
    assert not schedule.movable(schedule.Task("plain", 1.0, "matmul", 96, [plain]))
    with config.patch(max_autotune=True):
        assert not schedule.movable(task)


def test_a_part_is_taken_out_only_where_the_rest_moves() -> None:
    """Whatever is split and not moved is put back."""

    def split(graph: fx.Graph) -> list[schedule.Split]:
        found: list[schedule.Split] = []
        for node in list(graph.find_nodes(op="call_function", target=SIDE)):
            with graph.inserting_before(node):
                early = graph.call_function(torch.ops.aten.sum.dim_IntList, (node.args[0], [0]))
            sums = next((user for user in node.users if user.args[1] == 1), None)
            if sums is None:
                graph.erase_node(early)
                continue
            early.meta["val"] = sums.meta["val"]
            sums.replace_all_uses_with(early)

            def undo(sums: fx.Node = sums, early: fx.Node = early) -> None:
                early.replace_all_uses_with(sums)
                graph.erase_node(early)

            found.append((node, early, undo))
        return found

    x, w = torch.randn(8, 8), torch.randn(8, 8)
    gm = graph_of(model, x, w)
    before = calls(gm.graph)
    plan_graph(gm.graph, table(-1.0), split=split)
    assert calls(gm.graph) == before
    plan_graph(gm.graph, table(1.0, seconds=1e-3), split=split)
    assert "aten.sum.dim_IntList" in calls(gm.graph)
    gm.graph.lint()


def test_the_pass_needs_a_calibrated_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))
    log = ScheduleLog()
    gm = graph_of(model, torch.randn(8, 8), torch.randn(8, 8))
    before = str(gm.graph)
    SchedulePass(log, schedule.no_split, "")(gm.graph)
    assert str(gm.graph) == before
    assert log.lines() == ["one stream: no CUDA device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "gpu")
    assert schedule.available()[1] == "gpu has not been calibrated (python -m mhc_compile calibrate)"
    contention_of.save(table().__class__("gpu", table().pairs))
    found, reason = schedule.available()
    assert found is not None
    assert not reason


def test_identity_follows_what_the_plan_is_made_from() -> None:
    log = ScheduleLog()
    with using(table()):
        first = SchedulePass(log, schedule.no_split, "a").uuid()
        assert first == SchedulePass(ScheduleLog(), schedule.no_split, "a").uuid()
        assert first != SchedulePass(log, schedule.no_split, "b").uuid()
    with using(table(0.3)):
        assert first != SchedulePass(log, schedule.no_split, "a").uuid()
    assert first != SchedulePass(log, schedule.no_split, "a").uuid()
    json.dumps(first)


def test_the_pass_stands_before_what_was_there() -> None:
    seen: list[str] = []

    class Other(Step):
        def uuid(self) -> Any:
            return "other"

    log = ScheduleLog()
    with using(table()):
        patches = schedule_patches({schedule.SEAM: Other(lambda graph: seen.extend(forks(graph))), "x": 1}, log)
        alone = schedule_patches({}, log)
    gm = graph_of(model, torch.randn(8, 8), torch.randn(8, 8))
    both: Any = patches[schedule.SEAM]
    both(gm.graph)
    assert seen == ["mhc_test.side.default"] * 2
    assert patches["x"] == 1
    assert both.uuid()[1] == "other"
    assert isinstance(alone[schedule.SEAM], SchedulePass)


@pytest.mark.slow
def test_through_inductor_with_gradients() -> None:
    """The whole way: planned by the pass itself on inductor's own graph, both ends of time, the bits of no plan."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        return greedy_buffers(x, w)

    x, w = torch.randn(32, 32), torch.randn(32, 32) / 6
    log = ScheduleLog()
    with using(table(), least_gain=0.0), torch.no_grad():
        on = compiled(function, SchedulePass(log, schedule.no_split, "test"))
        got = on(x, w)
        with emit.deferred():
            late = on(x, w)
    assert log.plans
    assert log.plans[0].moves
    with torch.no_grad():
        off = compiled(function, Step(lambda graph: None))(x, w)
    assert torch.equal(got, off)
    assert torch.equal(late, off)


@pytest.mark.slow
def test_a_model_through_the_backend_with_side_work_is_the_model_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a converted model with every matmul moved that something can run beside (on a CPU our own
    calls are all waited for): at both ends of time the bits of one stream."""
    from mhc_compile.backend import reports
    from tests.tiny import compiled as converted
    from tests.tiny import ids, loss_of, tiny

    def run(call: Any, model: torch.nn.Module) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        out = call(ids())
        loss_of(out).backward()
        return [out.detach(), *(one.grad for one in model.parameters() if one.grad is not None)]

    def alone(task: schedule.Task) -> bool:
        return task.kind == "matmul" and len(task.nodes) == 1

    off_model = tiny()
    off = run(converted(off_model, compiler="inductor"), off_model)
    torch._dynamo.reset()
    monkeypatch.setattr(schedule, "movable", alone)
    model = tiny()
    on = converted(model, compiler="inductor", schedule="auto")
    with using(table(1.0, "matmul", 1e-3), least_gain=0.0):
        early = run(on, model)
    with emit.deferred():
        late = run(on, model)
    plans = {plan.name: plan for plan in reports[-1].schedule.plans}
    assert len(plans["backward"].moves) > 3
    assert "two streams" in str(reports[-1])
    assert "two streams" in " ".join(json.loads(reports[-1].to_json())["schedule"])
    assert len(off) > 20
    for one, other, again in zip(off, early, late, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, again)


KERNELS = """
import torch
from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.side import split_coefficients
from mhc_compile.scheduler import emit
from mhc_compile.scheduler.schedule import forks, plan_graph
from tests.lowering import graphs
from mhc_compile.lowering import few_tokens
from tests.scheduler.test_schedule import table

few_tokens.FEW = 0  # a dozen tokens take a kernel that has nothing to move

class Planned(graphs.LowerPass):
    def __call__(self, graph):
        super().__call__(graph)
        if kind:
            plan_graph(graph, table(1.0, "mhc_kernel." + kind, 1e-3), split=split_coefficients, forced=True)
            moved.extend(forks(graph))
            parts = ("mhc_kernel.activate_pre.default", "mhc_kernel.logits_backward_rest.default")
            assert sum(str(node.target) in parts for node in graph.nodes) == len(list(forks(graph))), graph
            assert sum("logits_backward.default" in str(node.target) for node in graph.nodes) in (0, 2)

graphs.LowerPass, moved, found = Planned, [], []
for kind in (None, "activate", "logits_backward_early"):
    torch._dynamo.reset()
    call = graphs.lowered(graphs.chain, Options(fuse=False), LoweringLog(), [])  # few tokens are fused otherwise
    found.append(graphs.gradients(call, graphs.inputs(6)))
    with emit.deferred():
        found.append(graphs.gradients(call, graphs.inputs(6)))
assert moved == ["mhc_kernel.activate.default"] * 2 + ["mhc_kernel.logits_backward_early.default"] * 2, moved
for other in found[1:]:
    assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
print("same bits")
"""


def test_our_kernels_on_the_side_give_the_same_bits() -> None:
    """Under Triton's interpreter: pre made early and its gradient late, post and res at both ends of time."""
    from mhc_compile.compat import triton_version

    if not triton_version():
        pytest.skip("Triton is not installed")
    assert "same bits" in interpreted(KERNELS)
