"""In-place writes on a residual stream become values, where nobody can see the difference.

``x += f(x)`` and ``clone[mask] = value`` write into a tensor that other nodes may share. A rewrite that follows values
would read the tensor before or after the write, as chance has it. So such a write is replaced by its out-of-place
form when no other name of the same storage is read afterwards and the storage is no input of the graph; otherwise it
stays, and ``find_sites`` refuses the chain that meets it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from mhc_compile.capture.graph import Builder, meta_value

INPLACE_ADDS = ("iadd", "add_", "__iadd__")
_OUT_OF_PLACE = {
    **dict.fromkeys(INPLACE_ADDS, operator.add),
    **dict.fromkeys(("imul", "mul_", "__imul__"), operator.mul),
    **dict.fromkeys(("itruediv", "div_", "__itruediv__"), operator.truediv),
}
"""In-place arithmetic on a stream and what makes the same value."""
_INPLACE = frozenset(
    """
    setitem __setitem__ iadd isub imul itruediv ifloordiv ipow iand ior ixor __iadd__ __isub__ __imul__ __itruediv__
    """.split()
)

_MAY_ALIAS = frozenset(
    """
    alias as_strided chunk contiguous detach diagonal double dropout expand expand_as flatten float bfloat16 half
    getitem movedim moveaxis narrow permute real reshape select split squeeze swapaxes swapdims t to transpose type
    type_as unbind unflatten unfold unsqueeze view view_as view_as_complex view_as_real identity atleast_1d
    __getitem__ ravel broadcast_to tensor_split iadd add_ mul_ imul
    """.split()
)
"""Operators whose result may share storage with their first argument (a cast that has nothing to do returns it)."""

_AUGMENTED = frozenset(
    """
    iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul iconcat setitem delitem
    """.split()
)


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``add`` for operator.add, torch.add, Tensor.add and aten.add.Tensor."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return str(getattr(node.target, "__name__", node.target))


def is_write(node: fx.Node) -> bool:
    """True for a node that must stay even if nobody reads its result: it writes into a tensor, or has another effect.

    ``fx`` itself believes every method and every Python-level function of torch to be pure, ``mask.scatter_(...)`` too.
    """
    name = op_name(node)
    if node.is_impure(False):
        return True
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = getattr(node.target, "__module__", "") == "_operator" and name in _AUGMENTED
    return in_place or augmented or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None


def remove_dead(gm: fx.GraphModule, keep: Iterable[fx.Node] = ()) -> None:
    """Erase the nodes that nobody reads, except writes and those in ``keep``.

    ``fx``'s own elimination would go on into submodules, which are Dynamo's (the bodies of custom autograd functions),
    and take the writes in them away.
    """
    kept = set(keep)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node not in kept and not is_write(node):
            gm.graph.erase_node(node)


def set_item(target: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``target`` with ``target[index] = value``, as a new tensor of the same shape and dtype."""
    result = target.clone()
    result[index] = value
    return result


def functionalize(gm: fx.GraphModule) -> int:
    """Replace in-place adds, scalings and item writes of unaliased tensors by values; returns how many there were."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    builder = Builder(gm)
    changed = 0
    for node in list(gm.graph.nodes):
        if _is_inplace_arithmetic(node):
            changed += _replace_arithmetic(node, builder, order)
        elif op_name(node) == "setitem" and node.op == "call_function":
            changed += _replace_setitem(node, builder, order)
    return changed


def _is_inplace_arithmetic(node: fx.Node) -> bool:
    if op_name(node) not in _OUT_OF_PLACE or len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
        return False
    left, right = meta_value(node.args[0]), meta_value(node.args[1])
    if not isinstance(left, torch.Tensor) or not left.is_floating_point():
        return False
    if op_name(node) in INPLACE_ADDS:
        return isinstance(right, torch.Tensor)
    return isinstance(right, (torch.Tensor, int, float)) and not node.kwargs


def aliases(tensor: fx.Node) -> set[fx.Node]:
    """All nodes that may share storage with ``tensor``, itself included."""
    found = {tensor}
    queue = [tensor]
    while queue:
        node = queue.pop()
        near = [user for user in node.users if op_name(user) in _MAY_ALIAS and user.args and user.args[0] is node]
        if op_name(node) in _MAY_ALIAS and node.args and isinstance(node.args[0], fx.Node):
            near.append(node.args[0])
        for other in near:
            if other not in found and isinstance(meta_value(other), (torch.Tensor, tuple, list)):
                found.add(other)
                queue.append(other)
    return found


def _is_private(tensor: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """True if, after ``write``, nobody reads the storage of ``tensor`` by another name, and it is no graph input."""
    for other in aliases(tensor) - {write}:
        if other.op in ("placeholder", "get_attr"):
            return False
        if other is tensor:
            continue
        later = [u for u in other.users if order.get(u, -1) > order[write]]
        if later and _aliases_without(other, tensor, write, order):
            return False
    return True


def _aliases_without(other: fx.Node, tensor: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """False when ``other`` is a name made after the write: both forms read the new value there."""
    node: Any = other
    while isinstance(node, fx.Node):
        if node is write:
            return False
        if op_name(node) not in _MAY_ALIAS or not node.args:
            return True
        if node.args[0] is tensor and order.get(node, -1) > order[write]:
            return False
        node = node.args[0]
    return True


def written(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Values whose storage an in-place operation of the graph writes to, each with (one of) the writes."""
    found: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        name = op_name(node)
        is_write = name in _INPLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if is_write or node.kwargs.get("inplace") is True:
            if not isinstance(meta_value(node.args[0]), torch.Tensor):
                continue
            for alias in aliases(node.args[0]):
                found.setdefault(alias, node)
    return found


def _rename_later_uses(old: fx.Node, new: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> None:
    for user in list(old.users):
        if order.get(user, -1) > order[write]:
            user.replace_input_with(old, new)


def _replace_arithmetic(node: fx.Node, builder: Builder, order: dict[fx.Node, int]) -> int:
    target, other = node.args[0], node.args[1]
    assert isinstance(target, fx.Node)
    if not _is_private(target, node, order):
        return 0
    alpha = node.kwargs.get("alpha", 1)
    with builder.at(before=node):
        total = (
            builder.call(torch.add, target, other, alpha=alpha)
            if alpha != 1
            else builder.call(_OUT_OF_PLACE[op_name(node)], target, other)
        )
        total.meta = {**node.meta, "example_value": total.meta["example_value"]}
        dtype = meta_value(target).dtype
        if total.meta["example_value"].dtype != dtype:  # an in-place operation keeps the dtype of what it writes to
            total = builder.method("to", total, dtype)
    order[total] = order[node]
    _rename_later_uses(target, total, node, order)
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)
    return 1


def _replace_setitem(node: fx.Node, builder: Builder, order: dict[fx.Node, int]) -> int:
    target = node.args[0]
    if not isinstance(target, fx.Node) or op_name(target) != "clone" or not _is_private(target, node, order):
        return 0
    with builder.at(before=node):
        value = builder.call(set_item, *node.args)
        value.meta = {**node.meta, "example_value": value.meta["example_value"]}
    order[value] = order[node]
    _rename_later_uses(target, value, node, order)
    node.graph.erase_node(node)
    return 1
