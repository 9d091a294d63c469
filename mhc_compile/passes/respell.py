"""Adds that are hidden in another operation, written as adds, and back again where they turn out to be none of ours.

``torch.addcmul(x, gate, y)``, ``torch.lerp(x, y, w)``, ``torch.addmm(x, a, b)`` and ``torch.baddbmm`` add something to
their first operand. ``respell`` writes them as an add, so that ``find_sites`` sees the stream; ``fold`` undoes what
``widen`` has not taken, because two operations may round where one does not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mhc_compile.capture.graph import Builder, meta_value
from mhc_compile.capture.mutation import op_name
from mhc_compile.passes.base import PassContext, PassResult

_PRODUCTS: dict[str, Any] = {"addcmul": torch.mul, "addmm": torch.matmul, "baddbmm": torch.matmul}
_MARK = "mhc_respelled"
"""Key in the meta of the new add: name of the operation that it stood in."""


def respell(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Write each such operation whose first operand is a whole activation as an add; ``changed`` counts them."""
    result = PassResult("respell")
    if ctx.options.rewrite and ctx.options.streams > 1:
        builder = Builder(gm)
        for node in list(gm.graph.nodes):
            if _hides_an_add(node, ctx):
                _spell_out(node, builder)
                result.changed += 1
    return result


def fold(gm: fx.GraphModule) -> None:
    """Turn the adds of ``respell`` that are still there back into what the user wrote."""
    builder = Builder(gm)
    for node in list(gm.graph.nodes):
        if _MARK in node.meta:
            _fold_one(node, builder)


def _hides_an_add(node: fx.Node, ctx: PassContext) -> bool:
    name = op_name(node)
    if (name not in _PRODUCTS and name != "lerp") or node.op not in ("call_function", "call_method"):
        return False
    if len(node.args) != 3 or set(node.kwargs) - {"value"}:
        return False
    carrier = node.args[0]
    first, second, out = meta_value(carrier), meta_value(node.args[1]), meta_value(node)
    if not isinstance(carrier, fx.Node) or ctx.is_parameter(carrier):
        return False
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    if not first.is_floating_point() or first.dim() < 2 or tuple(first.shape) != tuple(out.shape):
        return False
    return name != "lerp" or tuple(second.shape) == tuple(out.shape)


def _spell_out(node: fx.Node, builder: Builder) -> None:
    name = op_name(node)
    first, second, third = node.args
    with builder.at(before=node, like=node):
        if name == "lerp":
            rest = 1.0 - third if isinstance(third, (int, float)) else builder.call(torch.rsub, third, 1.0)
            carrier = builder.call(operator.mul, first, rest)
            total = builder.call(operator.add, carrier, builder.call(operator.mul, second, third))
        else:
            product = builder.call(_PRODUCTS[name], second, third)
            value = node.kwargs.get("value", 1)
            alpha = {} if value == 1 else {"alpha": value}
            total = builder.call(torch.add, first, product, **alpha)
    total.meta[_MARK] = name
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)


def _fold_one(node: fx.Node, builder: Builder) -> None:
    name = node.meta.pop(_MARK)
    carrier, product = node.args
    assert isinstance(carrier, fx.Node)
    assert isinstance(product, fx.Node)
    if op_name(product) not in ("mul", "matmul") or (name == "lerp" and op_name(carrier) != "mul"):
        return  # something else has been put in the place of an operand: the add says it as well
    with builder.at(before=node, like=node):
        if name == "lerp":
            whole = builder.call(torch.lerp, carrier.args[0], *product.args)
        else:
            alpha = node.kwargs.get("alpha", 1)
            extra = {"value": alpha} if alpha != 1 else {}
            whole = builder.call(getattr(torch, name), carrier, *product.args, **extra)
    node.replace_all_uses_with(whole)
    for spelled in (node, product, *([carrier] if name == "lerp" else [])):
        if not spelled.users:
            node.graph.erase_node(spelled)
