"""Fold the norm that a branch begins with into the ``pre`` before it: ``mhc::pre_norm``, one kernel.

On a GPU the branch input is then never written and read again: about 7 u of a site's traffic. Where no kernel of ours
takes the op nothing is folded: on a CPU nothing is gained, and inductor may order a traced reduction differently in a
replay, which would show in the bits. The kernel gives the same bits each time, so a replayed ``pre`` may take its norm
with it, whole or spelled out.

What is found is said in ``patterns.pre_norm``. The new node stands where the norm's result stood, and has the recompute
tags of the ``pre`` (a checkpoint's of the user), whatever those of the norm were. The plan of ``recompute`` is made
afterwards, of what is there then: what is folded never depends on it, and the bits do not either. A ``pre`` that is
left has its reason in the notes; it is no refusal, the model is the same.

Where the gate is there before the state is (``single_pass``) the op keeps u for its backward, which has another way to
the gate's gradient then than to read X once more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from mhc_compile import ops
from mhc_compile.capture.graph import Builder, meta_value, user_line
from mhc_compile.capture.mutation import remove_dead
from mhc_compile.lowering import kernels
from mhc_compile.passes.base import PassContext, PassResult
from mhc_compile.passes.recompute import PLAN_KEY, plan_key
from mhc_compile.patterns import pre_norm, reading
from mhc_compile.patterns.pre_norm import BranchNorm

KernelRefusal = Callable[[dict[str, Any]], str]
"""(values of the arguments of a ``mhc::pre_norm`` by name) -> why no kernel takes it, empty if one does."""


def fold_norms(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Fold where a kernel runs it; ``changed`` counts the folded norms. Without the fusion ``norm`` all stays as it is.

    Running it again finds nothing: the ``pre`` is gone.
    """
    return fold(gm, ctx, _kernel_refusal)


def fold(gm: fx.GraphModule, ctx: PassContext, kernel_refusal: KernelRefusal) -> PassResult:
    """``fold_norms`` for any device that ``kernel_refusal`` allows."""
    result = PassResult("fold_norms")
    if not ctx.options.fuses("norm"):
        return result
    pres = [node for node in gm.graph.nodes if node.target is ops.pre.overload]
    unread = [node for node in gm.graph.nodes if not node.users]
    regions = _regions(gm.graph) if pres else {}
    left: dict[str, list[fx.Node]] = {}
    for pre in pres:
        found = _find(pre, ctx, kernel_refusal, regions)
        if isinstance(found, str):
            left.setdefault(found, []).append(pre)
            continue
        _replace(gm, pre, found)
        result.changed += 1
    if result.changed:
        remove_dead(gm, unread)  # the casts of the weights
        gm.meta[PLAN_KEY] = plan_key(gm)
    result.notes = [_note(reason, nodes) for reason, nodes in left.items()]
    return result


def _note(reason: str, pres: list[fx.Node]) -> str:
    where = next((line for pre in pres if (line := user_line(pre))), "")
    return f"{len(pres)} x left: {reason}" + (f" (first at {where})" if where else "")


# ------------------------------------------------------------------------------------------------ check
def _kernel_refusal(named: dict[str, Any]) -> str:
    device = named["streams"].device
    return kernels.refusal("pre_norm", named) if device.type == "cuda" else f"on {device.type} there is no kernel"


def _find(
    pre: fx.Node, ctx: PassContext, kernel_refusal: KernelRefusal, regions: dict[fx.Node, object]
) -> BranchNorm | str:
    """The norm to be folded into a ``pre``, or the reason why there is none."""
    if ctx.options.lowering in ("native", "mlir"):
        return f"lowering={ctx.options.lowering!r} has no kernels"
    reason = kernel_refusal(dict.fromkeys(("weight", "bias")) | {"streams": meta_value(pre.args[0])})
    if reason:
        return reason  # before anything is read: on a CPU this is all that happens
    found = pre_norm.find(pre, lambda node: _is_parameter(node, ctx))
    if isinstance(found, str):
        return found
    if any(regions[node] != regions[pre] for node in found.inside):
        return "a region of autocast or of another grad mode begins or ends between it and the norm"
    arguments = {"streams": meta_value(pre.args[0]), "weight": meta_value(found.weight), "bias": meta_value(found.bias)}
    reason = kernel_refusal(arguments)
    return reason or found


def _is_parameter(node: fx.Node, ctx: PassContext) -> bool:
    return node.op in ("placeholder", "get_attr") and (
        ctx.is_parameter(node) or isinstance(meta_value(node), nn.Parameter)
    )


def _regions(graph: fx.Graph) -> dict[fx.Node, object]:
    """What is the same for two nodes under the same grad mode and the same autocast and inference regions."""
    switches = [node.args[0] for node in graph.nodes if node.target is torch._C._set_grad_enabled]
    # Dynamo writes down changes, not what holds at the start.
    grad = not switches[0] if switches and (switches[0] or torch.is_grad_enabled()) else torch.is_grad_enabled()
    entered: tuple[fx.Node, ...] = ()
    found: dict[fx.Node, object] = {}
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        if node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
        elif name.startswith("_enter_"):
            entered = (*entered, node)
        elif name.startswith("_exit_"):
            entered = tuple(other for other in entered if other not in node.all_input_nodes)
        found[node] = (grad, entered)
    return found


# ------------------------------------------------------------------------------------------------ replace
def _replace(gm: fx.GraphModule, pre: fx.Node, norm: BranchNorm) -> None:
    builder = Builder(gm)
    builder.tags = pre
    reading.pin_floats(other for node in norm.inside for other in node.all_input_nodes)
    with builder.at(before=norm.out, like=pre):
        both = builder.call(
            ops.pre_norm.overload,
            *pre.args[:2],
            norm.weight,
            norm.bias,
            norm.kind,
            norm.eps,
            norm.offset,
            norm.round_first,
            _is_known_before(pre),
        )
        new = builder.call(operator.getitem, both, 0)
    norm.out.replace_all_uses_with(new)
    for node in reversed((pre, *norm.inside)):
        gm.graph.erase_node(node)


def _is_known_before(pre: fx.Node) -> bool:
    """True where the gate of a ``pre`` is computed before the ``post`` that makes its state."""
    state, gate = pre.args[:2]
    assert isinstance(state, fx.Node)
    return state.target is ops.post.overload and isinstance(gate, fx.Node) and gate < state
