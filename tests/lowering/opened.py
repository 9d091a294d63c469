"""A kernel's op opened into its launches, as inductor will make them, and the kernel of a launch compiled for sm_90:
with tensors that have no memory, hence on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from tests.lowering.calls import calls
from tests.lowering.hopper import BF16, FP16, FP32, Resources, compile_for_hopper

DEVICE = "cuda:0"
TYPES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}


def some_tokens(dynamic: bool, example: int = 8192) -> tuple[FakeTensorMode, Any]:
    """A fake mode and a number of tokens in it: a symbol, or the example."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    if not dynamic:
        return mode, example
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode, mode.from_tensor(torch.empty(example, device="meta"), symbolic_context=context).shape[0]


def fake_calls(tokens: Any, width: int, mode: FakeTensorMode, **changes: Any) -> dict[str, list[tuple[Any, ...]]]:
    """`calls` for a CUDA device that need not be there."""
    with mode:
        return calls(tokens, width, device=DEVICE, **changes)


def opened(name: str, arguments: Sequence[Any], mode: FakeTensorMode) -> tuple[fx.Graph, list[str]]:
    """A graph of nothing but one call, behind `expand_launches`; and the reasons why the call was left as it is."""
    from mhc_compile.lowering import kernels
    from mhc_compile.lowering.base import LoweringLog

    graph, log = fx.Graph(), LoweringLog()

    def given(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"given_{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    nodes = pytree.tree_map(given, tuple(arguments))
    call = graph.call_function(getattr(torch.ops.mhc_kernel, name).default, nodes)
    with mode, torch.no_grad():
        call.meta["val"] = call.target(*arguments)
    kernels.expand_launches(graph, log)
    return graph, [entry.reason for entry in log.entries]


def launches(graph: fx.Graph) -> list[fx.Node]:
    """The launches in it."""
    target = torch.ops.higher_order.triton_kernel_wrapper_mutation
    return [node for node in graph.nodes if node.target is target]


def compiled(launch: fx.Node) -> Resources:
    """Its kernel, with the constants, the dtypes, the warps and the stages of this launch."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    tuner = kernel_side_table.get_kernel(launch.kwargs["kernel_idx"])
    (config,) = tuner.configs  # torch keeps warps and stages in one
    pointers, scalars, constants = {}, {}, {}
    for parameter in tuner.fn.params:
        value = fx.map_arg(launch.kwargs["kwargs"][parameter.name], lambda node: node.meta["val"])
        if isinstance(value, Tensor):
            pointers[parameter.name] = TYPES[value.dtype]
        elif parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[parameter.name] = value
        else:
            scalars[parameter.name] = "i32"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_for_hopper(tuner.fn, pointers, scalars, constants, **options)
