"""Compile through AOTAutograd and our graph passes, without inductor's code generation: quick, and the same graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

SPEC = CoefficientSpec(sinkhorn=SinkhornSpec(steps=4))


def lowered(function: Callable[..., Any], options: Options, log: LoweringLog, seen: list[fx.GraphModule]) -> Any:
    """`torch.compile` of `function` with the lowering pass on both partitioned graphs, which are kept in `seen`."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def compiler(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        LowerPass(options, log)(gm.graph)
        gm.recompile()
        seen.append(gm)
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    return torch.compile(function, backend=backend, fullgraph=True)


def chain(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
    """expand, two sites around a small branch, collapse."""
    state = torch.ops.mhc.expand.default(x, 4)
    for index in range(2):
        own = parameters[5 * index : 5 * index + 5]
        pre, post, res, _ = torch.ops.mhc.coefficients.default(state, *own, **SPEC.op_arguments())
        y = torch.nn.functional.silu(torch.ops.mhc.pre.default(state, pre) @ w)
        state = torch.ops.mhc.post.default(state, y, post, res, False)
    return torch.ops.mhc.collapse.default(state, "mean")


def normed_chain(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
    """`chain` with branches that begin with a norm."""
    state = torch.ops.mhc.expand.default(x, 4)
    weight = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
    for index in range(2):
        own = parameters[5 * index : 5 * index + 5]
        pre, post, res, _ = torch.ops.mhc.coefficients.default(state, *own, **SPEC.op_arguments())
        u, *_ = torch.ops.mhc.pre_norm.default(state, pre, weight, None, "rms", 1e-6, 0.0, True)
        state = torch.ops.mhc.post.default(state, torch.nn.functional.silu(u @ w), post, res, False)
    return torch.ops.mhc.collapse.default(state, "mean")


def kernels_of(graph: fx.Graph) -> list[str]:
    """The names of the kernels that a graph calls, in order."""
    called = [str(node.target).removesuffix(".default") for node in graph.nodes if node.op == "call_function"]
    return [name.removeprefix("mhc_kernel.") for name in called if name.startswith("mhc_kernel.")]


class FakeGraph:
    """A graph that is written by hand, each node with the fake tensor that it gives."""

    def __init__(self) -> None:
        self.graph, self._mode = fx.Graph(), FakeTensorMode()

    def given(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """An input."""
        node = self.graph.placeholder(name)
        with self._mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, target: object, *args: object) -> fx.Node:
        """A call of an overload, or getitem."""
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]  # an overload, or getitem
        with self._mode:
            values = fx.map_arg(args, lambda one: one.meta["val"])
            node.meta["val"] = target(*values)  # type: ignore[operator,misc]  # an overload, or getitem
        return node


def inputs(tokens: int, width: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = [random(2, tokens, width).to(dtype), random(width, width, scale=0.2).to(dtype)]
    for _ in range(2):
        tensors += [random(24, 4 * width, scale=0.1), random(24), *(torch.tensor(0.3 + 0.1 * i) for i in range(3))]
    return [tensor.requires_grad_() for tensor in tensors]


def gradients(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """[output, gradients...] of the sum of squares."""
    out = function(*tensors)
    return [
        out,
        *torch.autograd.grad(out.float().square().sum() if out.dtype != torch.float64 else out.square().sum(), tensors),
    ]


def close(got: Sequence[Tensor], want: Sequence[Tensor], bound: float) -> None:
    """Relative RMS error of each tensor within `bound`.

    The streams of the first site are equal, so its alpha_res has no gradient: nothing to be relative to.
    """
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        scale, error = float(b.detach().norm()), float((a.detach().double() - b.detach().double()).norm())
        assert error <= bound * scale or (scale < 1e-4 and error < 1e-4), (index, error, scale)
