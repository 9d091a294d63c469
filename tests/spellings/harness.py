"""Capture a model's torch-level graph, raise it, and compare it with itself: op counts, outputs, gradients."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.capture import copy_graph
from mhc_compile.config import Options
from mhc_compile.passes.base import PassContext, PassResult, run_pass
from mhc_compile.passes.raise_chains import raise_chains


@dataclasses.dataclass
class Raised:
    """A captured graph before and after, with the inputs Dynamo gave it."""

    before: fx.GraphModule
    after: fx.GraphModule
    result: PassResult
    inputs: list[Any]

    @property
    def ops(self) -> dict[str, int]:
        """How often each semantic op stands in the raised graph."""
        return dict(Counter(op_of(node) for node in self.after.graph.nodes if op_of(node)))

    @property
    def reasons(self) -> list[str]:
        """What was refused and why."""
        return [f"{refusal.what}: {refusal.reason}" for refusal in self.result.refusals]

    def attributes(self, op: str) -> list[dict[str, Any]]:
        """Keyword arguments of every node of an op."""
        return [dict(node.kwargs) for node in self.after.graph.nodes if op_of(node) == op]

    def assert_same(self, rtol: float = 1e-9, *, grad: bool = True) -> None:
        """Outputs and all gradients agree, relative to the largest element of each.

        A gradient that is zero but for rounding (H where all streams are equal) is measured against the others.
        """
        old, new = (run(graph, self.inputs, grad=grad) for graph in (self.before, self.after))
        floor = 1e-3 * max(a.double().abs().max().item() for a in old if a is not None)
        for a, b in zip(old, new, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.shape == b.shape
                assert a.dtype == b.dtype
                scale = max(a.double().abs().max().item(), floor)
                assert (a.double() - b.double()).abs().max().item() <= rtol * scale


def in_float64(graph: fx.GraphModule, inputs: list[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph and its inputs with every floating type made float64: the truth that roundings are measured against."""

    def widen(argument: Any) -> Any:
        return torch.float64 if argument in (torch.float32, torch.bfloat16) else argument

    wide = copy_graph(graph)
    for node in wide.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(part, widen) for part in (node.args, node.kwargs))
        if node.op == "call_method" and node.target in ("float", "bfloat16"):
            node.target = "double"
    wide.recompile()
    return wide, [x.double() if _is_float(x) else x for x in inputs]


def rounding(values: list[Tensor | None], truth: list[Tensor | None]) -> list[float]:
    """Root mean square error of each value, relative to the truth's; NaN-free, 0 where the truth is zero."""
    errors = []
    for value, exact in zip(values, truth, strict=True):
        if value is not None and exact is not None and value.is_floating_point():
            size = exact.square().mean().sqrt().item()
            errors.append((value.double() - exact).square().mean().sqrt().item() / size if size else 0.0)
    return errors


def op_of(node: fx.Node) -> str:
    """Bare name of a semantic op's node, empty for every other node."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name.removeprefix("mhc::") if name.startswith("mhc::") else ""


def capture(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[Any, list[Any]]:
    """The graph that Dynamo hands to a backend, and the inputs it is called with."""
    torch._dynamo.reset()
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append((gm, inputs))
        return gm.forward

    torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    assert len(seen) == 1, "the model must be one graph"
    return copy_graph(seen[0][0]), list(seen[0][1])


def raised(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Raised:
    """Capture a model and raise its chains."""
    before, inputs = capture(model, *args, dynamic=dynamic, **kwargs)
    after = copy_graph(before)
    result = run_pass(raise_chains, after, PassContext(Options()))
    after.graph.lint()
    return Raised(before, after, result, inputs)


def run(graph: fx.GraphModule, inputs: list[Any], *, grad: bool = True) -> list[Tensor | None]:
    """Outputs and gradients of a fixed weighting of them, for every floating input."""
    own = [x.detach().clone().requires_grad_(grad) if _is_float(x) else x for x in inputs]
    outputs = [out for out in graph(*own) if isinstance(out, Tensor)]
    leaves = [x for x in own if _is_float(x)]
    total = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        if out.requires_grad:
            weights = torch.linspace(-1.0, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
            total = total + (out.double() * weights).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return [*outputs, *grads]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
