from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile import compat
from mhc_compile.capture import ModuleMap
from tests.tiny import Block, Flat, ids, tiny


def mapped(call: Any, *inputs: Any) -> ModuleMap:
    """The module map of what Dynamo captures of a call; made inside the backend, where the sources can be evaluated."""
    maps: list[ModuleMap] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        maps.append(ModuleMap(gm, compat.current_scope(), example_inputs))
        return gm.forward

    torch.compile(call, backend=keep)(*inputs)
    return maps[0]


def test_every_parameter_has_its_root_path_and_name() -> None:
    model = tiny()
    found = mapped(model, ids())
    names = {".".join((*ref.path, ref.name)) for ref in found.refs.values()}
    assert names == {name for name, _ in model.named_parameters()}
    assert found.roots == [model]
    assert not any(ref.is_buffer for ref in found.refs.values())


def test_two_roots_and_a_closure() -> None:
    blocks = {"a": Block(), "b": Block()}

    def call(x: Tensor) -> Tensor:
        return blocks["b"](blocks["a"](x))

    found = mapped(call, torch.randn(2, 3, 16))
    assert found.roots == [blocks["a"], blocks["b"]]


def test_a_parameter_without_a_module_is_loose() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    found = mapped(lambda x: x @ weight, torch.randn(3, 4))
    assert found.refs == {}
    assert len(found.loose) == 1


def test_a_buffer_is_told_from_a_parameter() -> None:
    norm = nn.BatchNorm1d(4).eval()
    found = mapped(norm, torch.randn(3, 4))
    assert {ref.name: ref.is_buffer for ref in found.refs.values()} == {
        "weight": False, "bias": False, "running_mean": True, "running_var": True,
    }  # fmt: skip


def test_owner_by_stack_by_prefix_and_for_a_leaf() -> None:
    flat = Flat()
    owners: list[Any] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        modules = ModuleMap(gm, compat.current_scope(), example_inputs)
        parameters = [n for n in gm.graph.find_nodes(op="placeholder") if n.name in modules.refs]
        add = next(n for n in gm.graph.nodes if getattr(n.target, "__name__", "") == "add")
        one = [p for p in parameters if modules.refs[p.name].path == ("inner", "0")]
        two = [p for p in parameters if modules.refs[p.name].path[:1] == ("inner",)]
        owners.extend([modules.owner(add, one), modules.owner(add, two), modules.owner(add, [])])
        return gm.forward

    torch.compile(flat, backend=keep)(torch.randn(2, 3, 16))
    # the add stands in the root's own forward: a leaf is not its owner, the list around the leaves is
    assert owners[0] == owners[1] == (flat, ("inner",))
    assert owners[2] is None
