from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mhc_compile.capture import Builder, copy_graph, meta_value, qualified_module, user_line
from tests.tiny import ids, tiny


def captured(model: Any, *inputs: Any) -> fx.GraphModule:
    """The torch-level graph that Dynamo hands to a backend."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=keep)(*inputs)
    return graphs[0]


def test_a_copy_is_independent_and_computes_the_same() -> None:
    gm = captured(tiny(), ids())
    before = [(node.name, node.op) for node in gm.graph.nodes]
    copy = copy_graph(gm)
    add = next(node for node in copy.graph.nodes if node.target is operator.add)
    add.meta["ours"] = True
    add.replace_all_uses_with(add.args[0])
    copy.graph.erase_node(add)
    assert [(node.name, node.op) for node in gm.graph.nodes] == before
    assert not any("ours" in node.meta for node in gm.graph.nodes)
    whole = copy_graph(gm)
    whole.recompile()
    values = [torch.randn(meta_value(n).shape) for n in gm.graph.find_nodes(op="placeholder") if n.name != "l_ids_"]
    arguments = [ids() if n.name == "l_ids_" else values.pop(0) for n in gm.graph.find_nodes(op="placeholder")]
    assert torch.equal(gm(*arguments)[0], whole(*arguments)[0])


def test_a_copy_keeps_sources_and_drops_what_is_dynamos() -> None:
    copy = copy_graph(captured(tiny(), ids()))
    placeholders = copy.graph.find_nodes(op="placeholder")
    assert all(hasattr(node, "_dynamo_source") for node in placeholders)
    assert not any("grapharg" in node.meta for node in copy.graph.nodes)


def test_builder_gives_value_place_and_tags() -> None:
    gm = copy_graph(captured(tiny(), ids()))
    add = next(node for node in gm.graph.nodes if node.target is operator.add)
    add.meta["recompute"] = "tag"
    builder = Builder(gm)
    builder.tags = add
    with builder.at(after=add):
        first = builder.call(torch.mul, add, 2.0)
        second = builder.method("sum", first, -1)
    assert tuple(meta_value(second).shape) == tuple(meta_value(add).shape)[:-1]
    assert user_line(first) == user_line(add) != ""
    assert first.meta["recompute"] == "tag"
    order = list(gm.graph.nodes)
    assert order.index(add) + 1 == order.index(first) == order.index(second) - 1
    gm.graph.lint()


def test_names_of_the_users_line_and_module() -> None:
    gm = captured(tiny(), ids())
    adds = [node for node in gm.graph.nodes if node.target is operator.add]
    assert {qualified_module(node) for node in adds} == {"layers.0", "layers.1"}
    assert all("tests/tiny.py:" in user_line(node) for node in adds)
    bare = fx.Graph().placeholder("x")
    assert (user_line(bare), qualified_module(bare), meta_value(3)) == ("", "", 3)


def test_an_op_of_ours_is_worked_out_once_for_each_kind_of_arguments() -> None:
    """The fakes are equal in all but identity; another size, dtype or attribute is another kind."""
    from torch._subclasses import FakeTensorMode

    from mhc_compile import ops

    with FakeTensorMode():
        x, low = torch.zeros(2, 3, 16), torch.zeros(2, 3, 16, dtype=torch.bfloat16)
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "low", "y")]
    for node, value in zip(nodes, (x, low, x), strict=True):
        node.meta["example_value"] = value
    end = graph.output(())
    builder = Builder(fx.GraphModule({}, graph))
    with builder.at(before=end):
        made = [builder.call(ops.expand.overload, node, 4) for node in (*nodes, nodes[0])]
        wider = builder.call(ops.expand.overload, nodes[0], 8)
        named = builder.call(ops.expand.overload, nodes[0], streams=4)
    values = [meta_value(node) for node in (*made, named)]
    assert [tuple(value.shape) for value in values] == [(2, 3, 4, 16)] * 5
    assert [value.dtype for value in values] == [torch.float32, torch.bfloat16, *[torch.float32] * 3]
    assert meta_value(wider).shape == (2, 3, 8, 16)
    assert len({id(value) for value in values}) == len({value.untyped_storage()._cdata for value in values}) == 5
    assert {value.stride() for value in values} == {(192, 64, 16, 1)}
    assert all(type(value).__name__ == "FakeTensor" for value in values)
