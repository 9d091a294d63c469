"""Replace a node by the traced body of a plain PyTorch function, on the very fake tensors of the graph.

The body is traced with the graph's own fake tensors, so symbolic sizes stay the symbols they are: one compiled artefact
serves every number of tokens.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mhc_compile.compat import inductor_decompositions

from .base import fake, origin


def faking(values: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """The mode of the first fake tensor among `values`, to allocate in; nothing without one."""
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    return mode if mode is not None else contextlib.nullcontext()


def trace(function: Callable[..., Any], nodes: Sequence[fx.Node], prune: bool = True) -> fx.GraphModule:
    """`function` over the fake values of `nodes`, as an ATen graph decomposed the way inductor wants it.

    `prune` drops dead code; not for a body that launches kernels, which torch 2.11 takes for dead.
    """
    values = [node.meta["val"] for node in nodes]
    # What the body allocates must be fake too, on a machine without the device as on one with it.
    with faking(values):
        traced = make_fx(function, decomposition_table=inductor_decompositions(), tracing_mode="real")(*values)
    if prune:
        traced.graph.eliminate_dead_code()
    return traced


def inline(graph: fx.Graph, before: fx.Node, body: fx.GraphModule, nodes: Sequence[fx.Node]) -> Any:
    """Copy `body` into `graph` in front of `before`, its placeholders bound to `nodes`; returns its outputs as
    nodes."""
    bound: dict[fx.Node, Any] = {}
    sources = iter(nodes)
    outputs: Any = None
    with graph.inserting_before(before):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                bound[node] = next(sources)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], bound.__getitem__)
            elif node.op == "get_attr":
                raise ValueError(f"the traced body holds a constant, {node.target}")
            else:
                copy = graph.node_copy(node, bound.__getitem__)
                copy.meta.update(origin(before))
                bound[node] = copy
    return outputs


def replace(node: fx.Node, outputs: Any) -> None:
    """Give the users of `node` its new values (`outputs` a node, or a sequence behind getitems), and erase it."""
    if isinstance(outputs, (tuple, list)):
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise ValueError(f"{node} has several results and {user} takes it whole")
            index: Any = user.args[1]
            user.replace_all_uses_with(outputs[index])
            node.graph.erase_node(user)
    else:
        node.replace_all_uses_with(outputs)
    node.graph.erase_node(node)


def give(node: fx.Node, named: dict[str, Any]) -> None:
    """Give a call of an op other arguments: `named`, all of them, by the schema's names.

    What autograd has noted of the inputs it was traced with (their strides, for inductor) holds no longer.
    """
    schema = node.target._schema.arguments  # type: ignore[union-attr]  # an OpOverload
    node.args, node.kwargs = tuple(named[argument.name] for argument in schema), {}
    node.meta.pop("eager_input_vals", None)


Bodies = dict[Any, fx.GraphModule]
"""Traced bodies by what they were traced from."""


def signature(function: Callable[..., Any], spec: object, flat: Sequence[Any]) -> Any:
    """What two calls of `function` have in common if one traced body serves both: literals, shapes, strides, dtypes,
    devices, and which of the arguments are one node."""
    nodes: dict[fx.Node, int] = {}
    described: list[Any] = []
    for value in flat:
        if not isinstance(value, fx.Node):
            described.append((type(value), value))
            continue
        own = value.meta["val"]
        known: Any = str(own)
        if isinstance(own, torch.Tensor):
            known = (own.dtype, own.device, str(tuple(own.shape)), str(own.stride()), str(own.storage_offset()))
        described.append((nodes.setdefault(value, len(nodes)), known))
    return function, str(spec), tuple(described)


def _renew(copies: Sequence[fx.Node]) -> None:
    """Give copies of a body's nodes fake values of their own: a value that two nodes share makes them one for whoever
    traces or compares by value."""
    for node in copies:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]  # an ATen overload


def _closed(
    function: Callable[..., Any], args: Sequence[Any]
) -> tuple[Callable[..., Any], list[fx.Node], list[Any], Any]:
    """`function` of the nodes among (or inside) `args` alone, those nodes, and the flattened arguments with their
    structure."""
    flat, spec = pytree.tree_flatten(list(args))
    positions = [index for index, value in enumerate(flat) if isinstance(value, fx.Node)]

    def closed(*values: Any) -> Any:
        filled = list(flat)
        for index, value in zip(positions, values, strict=True):
            filled[index] = value
        return function(*pytree.tree_unflatten(filled, spec))

    return closed, [flat[index] for index in positions], flat, spec


def insert_function(before: fx.Node, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The outputs, as nodes, of the traced `function(*args)` in front of `before`; nodes among (or inside) `args`
    become its inputs."""
    closed, nodes, _, _ = _closed(function, args)
    return inline(before.graph, before, trace(closed, nodes), nodes)


def replace_by_function(
    node: fx.Node, function: Callable[..., Any], args: Sequence[Any], prune: bool = True, bodies: Bodies | None = None
) -> None:
    """Replace `node` by the traced `function(*args)`; nodes among (or inside) `args` become its inputs.

    With `bodies`, what was traced for another node of the same signature is copied.
    """
    closed, nodes, flat, spec = _closed(function, args)
    key = None if bodies is None else signature(function, spec, flat)
    body = None if bodies is None else bodies.get(key)
    if body is None:
        body = trace(closed, nodes, prune)
        replace(node, inline(node.graph, node, body, nodes))
        if bodies is not None:
            bodies[key] = body
        return
    before = node.prev
    outputs = inline(node.graph, node, body, nodes)
    with faking([source.meta["val"] for source in nodes]), torch.no_grad():
        _renew(between(before, node))
    replace(node, outputs)


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes after `first` and before `last`."""
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


__all__ = [
    "Bodies",
    "between",
    "fake",
    "faking",
    "give",
    "inline",
    "insert_function",
    "replace",
    "replace_by_function",
    "signature",
    "trace",
]
