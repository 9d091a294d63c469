"""Activation checkpoints: their bodies are opened, so that a residual stream runs through them unbroken.

Dynamo wraps every ``torch.utils.checkpoint`` call in a ``tag_activation_checkpoint`` node with the body as a
submodule. The residual adds are inside. Opening the body keeps what the user asked for by tagging each of its nodes
to be recomputed, which AOTAutograd's min-cut partitioner honours (the same tags Dynamo's own operator sets).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import compat
from mhc_compile.capture.graph import user_line
from mhc_compile.capture.mutation import remove_dead
from mhc_compile.errors import LayoutError


def checkpoint_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The activation checkpoints of a graph."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target is compat.tag_activation_checkpoint()]


def inline_checkpoints(gm: fx.GraphModule) -> int:
    """Open every activation checkpoint of the graph (nested ones too); returns how many.

    Raises:
        LayoutError: a selective checkpoint (``context_fn``), whose policy is bound to its body and would be lost.
    """
    opened = 0
    while nodes := checkpoint_nodes(gm):
        for node in nodes:
            _inline(gm, node, compat.next_checkpoint_id())
            opened += 1
    if opened:
        remove_dead(gm)
    return opened


def _inline(gm: fx.GraphModule, node: fx.Node, checkpoint_id: int) -> None:
    body_node = node.args[0]
    assert isinstance(body_node, fx.Node)
    assert isinstance(body_node.target, str)
    body = getattr(gm, body_node.target)
    if "_checkpoint_context_fn" in body.meta or node.meta.get("_checkpoint_context_fn") is not None:
        raise LayoutError(
            "a selective activation checkpoint (context_fn) surrounds a residual add",
            where=user_line(node),
            cure="use plain checkpointing (no context_fn), or options={'recompute': ...} instead of it",
        )
    mapping: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
    outputs: Any = None
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                outputs = fx.map_arg(inner.args[0], lambda n: mapping[n])
                break
            if inner.op == "get_attr":
                name = _adopt_attribute(gm, body, str(inner.target))
                copy = gm.graph.get_attr(name)
            else:
                copy = gm.graph.node_copy(inner, lambda n: mapping[n])
            copy.meta = dict(inner.meta)
            if torch.is_grad_enabled():  # without a backward AOTAutograd refuses the tags
                copy.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
                copy.meta.setdefault("ac_graph_id", checkpoint_id)
            mapping[inner] = copy
    _replace_outputs(node, outputs)
    gm.graph.erase_node(node)
    if not body_node.users:
        gm.graph.erase_node(body_node)


def _replace_outputs(node: fx.Node, outputs: Any) -> None:
    if not isinstance(outputs, (tuple, list)):
        node.replace_all_uses_with(outputs)
        return
    for user in list(node.users):
        is_getitem = user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem"
        if not is_getitem or not isinstance(user.args[1], int):
            raise LayoutError("the result of an activation checkpoint is used as a tuple", where=user_line(user))
        value = outputs[user.args[1]]
        user.replace_all_uses_with(value)
        user.graph.erase_node(user)


def _adopt_attribute(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    value: Any = body
    for part in name.split("."):
        value = getattr(value, part)
    fresh = name.replace(".", "_")
    while hasattr(gm, fresh) and getattr(gm, fresh) is not value:
        fresh += "_"
    if not hasattr(gm, fresh):
        setattr(gm, fresh, value)
    return fresh
