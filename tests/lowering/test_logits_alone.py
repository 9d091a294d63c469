"""`leave` on a joint graph and `merge` on a partitioned one, and the seam of inductor's that they sit in."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import ops
from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LeavePass, LowerPass, config_patches
from mhc_compile.lowering.logits_alone import TAG, gather, leave, merge
from mhc_compile.ops import CoefficientSpec

SPEC = CoefficientSpec()


def made(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda source: source.meta["val"])
    node.meta["val"] = target(*values)
    return node


def joint(tag: Any = TAG, backward: bool = True) -> fx.Graph:
    """A site's coefficients that are read forward and backward, without the rest of the site."""
    graph = fx.Graph()
    shapes = {"x": (2, 3, 4, 8), "phi": (24, 32), "bias": (24,), "a": (), "b": (1,), "c": (), "g": (2, 3, 4)}
    nodes = {name: graph.placeholder(name) for name in shapes}
    with FakeTensorMode():
        for name, node in nodes.items():
            node.meta["val"] = torch.randn(shapes[name])
    tensors = [nodes[name] for name in ("x", "phi", "bias", "a", "b", "c")]
    flat = tuple(SPEC.op_arguments().values())
    call = made(graph, ops.coefficients.overload, *tensors, *flat)
    call.meta |= {"recompute": tag, "ac_graph_id": 3, "partitioner_tag": "is_forward", "seq_nr": 5}
    pre, post, _, projection = (made(graph, operator.getitem, call, index) for index in range(4))
    forward = made(graph, torch.ops.aten.mul.Tensor, pre, post)
    results = [forward]
    if backward:
        scaled = made(graph, torch.ops.aten.mul.Tensor, nodes["g"], post)
        needs = [True] * 6
        grads = made(graph, ops.coefficients.backward_overload, scaled, None, None, *tensors, projection, needs, *flat)
        results.append(made(graph, operator.getitem, grads, 0))
    graph.output(tuple(results))
    return graph


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is target]


def test_readers_get_what_the_projection_gives() -> None:
    graph = joint()
    assert leave(graph) == 1
    graph.lint()
    (whole,), (again,) = calls(graph, ops.coefficients.overload), calls(graph, ops.activate.overload)
    (projection,) = whole.users
    assert projection.args[1] == 3
    assert again.args[0] is projection
    assert again.args[1:5] == whole.args[2:6]
    assert again.args[5:] == whole.args[6:]
    assert {user.args[1] for user in again.users if user.users} == {0, 1}
    for node in (whole, projection):
        assert node.meta["recompute"] == CheckpointPolicy.MUST_SAVE
        assert "ac_graph_id" not in node.meta
    for node in (again, *again.users):
        assert node.meta["recompute"] == CheckpointPolicy.MUST_RECOMPUTE
        assert "ac_graph_id" not in node.meta
    assert (again.meta["partitioner_tag"], again.meta["seq_nr"]) == ("is_forward", 5)
    assert [tuple(value.shape) for value in again.meta["val"]] == [(2, 3, 4), (2, 3, 4), (2, 3, 4, 4)]
    (backward,) = calls(graph, ops.coefficients.backward_overload)
    assert projection in backward.args
    assert leave(graph) == 0, "once is enough"


def test_results_that_are_picked_late_or_twice() -> None:
    graph = joint()
    (whole,) = calls(graph, ops.coefficients.overload)
    post, projection = (user for user in whole.users if user.args[1] in (1, 3))
    (first, second) = calls(graph, torch.ops.aten.mul.Tensor)
    first.prepend(post)
    with graph.inserting_before(second):
        twice = made(graph, operator.getitem, whole, 3)
        made(graph, torch.ops.aten.mul.Tensor, twice, twice)
    (backward,) = calls(graph, ops.coefficients.backward_overload)
    backward.prepend(projection)
    graph.lint()
    assert leave(graph) == 1
    graph.lint()
    assert [user.args[1] for user in whole.users] == [3]


@pytest.mark.parametrize("tag", [None, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_other_tags_are_left_alone(tag: Any) -> None:
    graph = joint(tag)
    before = str(graph)
    assert leave(graph) == 0
    assert str(graph) == before


def test_a_graph_without_a_backward_is_left_alone() -> None:
    graph = joint(backward=False)
    before = str(graph)
    assert leave(graph) == 0
    assert str(graph) == before


def test_merge_takes_back_what_leave_did() -> None:
    graph = joint()
    leave(graph)
    assert merge(graph) == 1
    graph.lint()
    graph.eliminate_dead_code()
    assert not calls(graph, ops.activate.overload)
    (whole,) = calls(graph, ops.coefficients.overload)
    (product, scaled) = calls(graph, torch.ops.aten.mul.Tensor)
    assert [(node.args[0], node.args[1]) for node in product.args] == [(whole, 0), (whole, 1)]
    assert scaled.args[1] is product.args[1]
    assert all(isinstance(user.meta["val"], torch.Tensor) for user in whole.users)
    assert merge(graph) == 0


def test_merge_wants_the_same_parameters() -> None:
    for change in ("bias", "attribute", "input"):
        graph = joint()
        leave(graph)
        (again,) = calls(graph, ops.activate.overload)
        args = list(again.args)
        if change == "bias":
            args[1] = args[2]
        elif change == "attribute":
            args[10] = 3.0
        else:
            args[0] = graph.find_nodes(op="placeholder")[0]  # a backward graph's projection is an input
        again.args = tuple(args)
        assert merge(graph) == 0, change


def test_the_lowering_of_a_forward_graph_starts_with_it() -> None:
    """And is that of coefficients that are kept; what is left in a backward graph is lowered on its own."""
    graph, plain = joint(), joint()
    leave(graph)
    logs = [LoweringLog(), LoweringLog()]
    for each, log in zip((graph, plain), logs, strict=True):
        with torch.no_grad():
            LowerPass(Options(), log)(each)
    assert logs[0].counts() == logs[1].counts()
    alone = fx.Graph()
    inputs = [torch.randn(2, 3, 25), torch.randn(24), torch.randn(()), torch.randn(1), torch.randn(())]
    nodes = [alone.placeholder(f"x{index}") for index in range(5)]
    mode = FakeTensorMode()
    for node, value in zip(nodes, inputs, strict=True):
        node.meta["val"] = mode.from_tensor(value)
    results = made(alone, ops.activate.overload, *nodes, *SPEC.op_arguments().values())
    alone.output(tuple(made(alone, operator.getitem, results, index) for index in range(3)))
    log = LoweringLog()
    LowerPass(Options(), log)(alone)
    assert log.counts()["activate", "inductor"] == 1
    assert not calls(alone, ops.activate.overload)
    got = fx.GraphModule(torch.nn.Module(), alone)(*inputs)
    want = ops.activate(*inputs, *SPEC.op_arguments().values())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------------------------ the seam
def test_the_seam_is_taken_where_there_is_a_plan() -> None:
    assert "joint_custom_post_pass" not in config_patches(Options(), LoweringLog())
    keys = {key: config_patches(Options(), LoweringLog(), key)["joint_custom_post_pass"] for key in ("a", "b")}
    assert isinstance(keys["a"], LeavePass)
    assert keys["a"].uuid() == LeavePass("a").uuid() != keys["b"].uuid()


def test_the_users_joint_pass_runs_first() -> None:
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen: list[int] = []

    class Theirs(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append(len(calls(graph, ops.activate.overload)))

        def uuid(self) -> str:
            return "theirs"

    with config.patch(joint_custom_post_pass=Theirs()):
        step: Any = config_patches(Options(), LoweringLog(), "a")["joint_custom_post_pass"]
    graph = joint()
    step(graph)
    assert seen == [0]
    assert len(calls(graph, ops.activate.overload)) == 1
    assert step.uuid()[0] == "theirs"


def test_inductor_calls_the_seam_between_autograd_and_the_partitioner() -> None:
    """Seen in 2.11 and 2.13: once on the joint graph, whose tags the partitioner then reads."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen: list[list[str]] = []

    class Look(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append([node.name for node in graph.find_nodes(op="placeholder")])

        def uuid(self) -> None:
            return None

    torch._dynamo.reset()
    with config.patch(joint_custom_post_pass=Look(), force_disable_caches=True):
        torch.compile(lambda x: x.sin().sum())(torch.randn(3, requires_grad=True)).backward()
    assert len(seen) == 1
    assert any(name.startswith("tangents") for name in seen[0])


def backward_of_a_block(early: bool = True) -> fx.Graph:
    """Two replayed states and the normed input of each, every coefficient made again right before its reader; with
    `early` False the second ones come of a projection that is computed in between."""
    graph = fx.Graph()
    shapes = {"x": (3, 4, 8), "y": (3, 8), "p0": (3, 25), "p1": (3, 25), "bias": (24,), "a": (1,)}
    nodes = {name: graph.placeholder(name) for name in shapes}
    with FakeTensorMode():
        for name, node in nodes.items():
            node.meta["val"] = torch.ones(shapes[name])
    parameters = [nodes["bias"], nodes["a"], nodes["a"], nodes["a"], *SPEC.op_arguments().values()]
    state, results = nodes["x"], []
    for index in range(2):
        projection = nodes[f"p{index}"]
        if index and not early:
            projection = made(graph, torch.ops.aten.neg.default, projection)
        again = made(graph, ops.activate.overload, projection, *parameters)
        pre, post, res = (made(graph, operator.getitem, again, part) for part in range(3))
        state = made(graph, ops.post.overload, state, nodes["y"], post, res, False)
        norm = made(graph, ops.pre_norm.overload, state, pre, None, None, "rms", 1e-6, 0.0, True)
        results.append(made(graph, operator.getitem, norm, 0))
    graph.output(tuple(results))
    return graph


def test_what_a_block_needs_is_made_before_its_first_state() -> None:
    graph = backward_of_a_block()
    assert gather(graph) == 1
    graph.lint()
    order = [node.target for node in graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    again, state, norm = ops.activate.overload, ops.post.overload, ops.pre_norm.overload
    assert order == [again, again, state, norm, state, norm]
    assert gather(graph) == 0


def test_what_is_computed_in_between_stays_there() -> None:
    graph = backward_of_a_block(early=False)
    before = str(graph)
    assert gather(graph) == 0
    assert str(graph) == before
