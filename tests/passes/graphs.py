"""Small graphs by symbolic tracing, with fake values as Dynamo gives them, for tests of single functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode


def traced(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """The graph of a function, every node with its ``example_value``; parameters are the inputs named ``w…``."""
    gm = fx.symbolic_trace(function)
    with FakeTensorMode() as mode:
        values: dict[fx.Node, Any] = {}
        inputs = iter(mode.from_tensor(example) for example in examples)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "output":
                continue
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                call = node.target if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
                values[node] = call(*args, **kwargs)
            node.meta["example_value"] = values[node]
    return gm


def is_parameter(node: fx.Node) -> bool:
    """Inputs whose name begins with w stand for parameters."""
    return node.op == "placeholder" and node.name.startswith("w")


def by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes of a graph by name."""
    return {node.name: node for node in gm.graph.nodes}
