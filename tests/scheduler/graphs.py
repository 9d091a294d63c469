"""A slow side op, a model around it, and inductor with a pass on its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass


@torch.library.custom_op("mhc_test::side", mutates_args=())
def side(x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(x w scale, column sums of x)."""
    return x @ w * scale, x.sum(0)


@side.register_fake
def _(x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[1]), x.new_empty(x.shape[1])


SIDE = torch.ops.mhc_test.side.default


class Step(CustomGraphPass):
    """A function as a graph pass that is never cached; keeps the graphs as text."""

    def __init__(self, function: Callable[[fx.Graph], object]) -> None:
        self.function = function
        self.graphs: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.function(graph)
        graph.lint()
        self.graphs.append(str(graph))

    def uuid(self) -> None:
        return None


def compiled(function: Callable[..., Any], step: CustomGraphPass, **settings: Any) -> Callable[..., Any]:
    """`function` through inductor with a pass behind its own."""
    torch._dynamo.reset()
    result: Callable[..., Any] = torch.compile(
        function, fullgraph=True, options={"post_grad_custom_post_pass": step, **settings}
    )
    return result


def greedy_buffers(x: Tensor, w: Tensor) -> Tensor:
    """Side calls whose inputs die at once: a value that inductor would update in place, one that it would copy for the
    call alone (odd strides), a graph input, and one whose buffer the next matmul would take."""
    a = (x + 1).relu()
    first, sums = side(a, w, 2.0)
    second, others = side((x * 3).t().contiguous().t(), w, 0.5)
    b = a.sin() * 2
    c = b @ w
    third, _ = side(c, w, 1.5)
    d = (c.relu() @ w).cos()
    e = (d @ w).exp()
    f = (e.tanh() @ w).sin()
    return f + first + sums + second + others + third
