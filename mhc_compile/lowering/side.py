"""Our kernels as work for a side stream: what can be taken apart for it, and what to measure on a device.

Which calls move is decided elsewhere, by cost; here is what only the kernels know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from .base import arguments


def split_coefficients(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node, Callable[[], None]]]:
    """Take the pre part out of every ``mhc_kernel::activate`` that also makes post or res.

    The branch waits for pre alone; post and res with their Sinkhorn are wanted behind it. Returns (the activate, the
    call that makes pre, how to take that back) of each; the graph computes the same.
    """
    found: list[tuple[fx.Node, fx.Node, Callable[[], None]]] = []
    kernels = [node for node in graph.nodes if str(node.target) == "mhc_kernel.activate.default"]
    if not kernels:
        return found
    from . import activate_pre  # noqa: F401  # registers the op

    for node in kernels:
        named = arguments(node)
        parts = str(named["layout"]).split(",")
        pre = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        if "pre" not in parts or len(parts) < 2 or len(pre) != 1:
            continue
        with graph.inserting_before(node):
            kept = {name: value for name, value in named.items() if name not in ("alpha_post", "alpha_res")}
            early = graph.call_function(torch.ops.mhc_kernel.activate_pre.default, tuple(kept.values()))
        early.meta["val"] = pre[0].meta["val"]
        early.meta.update(
            {key: node.meta[key] for key in ("stack_trace", "nn_module_stack", "seq_nr") if key in node.meta}
        )
        found.append((node, early, _Merge(pre[0], early)))
        pre[0].replace_all_uses_with(early)
    return found


class _Merge:
    """Gives the users of the early call back to the result that it stands for."""

    def __init__(self, whole: fx.Node, early: fx.Node) -> None:
        self.whole, self.early = whole, early

    def __call__(self) -> None:
        """Undo one split."""
        self.early.replace_all_uses_with(self.whole)
        self.early.graph.erase_node(self.early)


def side_cases(tokens: int, width: int, n: int = 4) -> list[tuple[str, Callable[[], object], int]]:
    """(kind as ``scheduler.dag.kind_of`` names it, a call, bytes read and written) of our kernels, bfloat16, on CUDA.

    Bytes are what ``cost.work`` says of the call in a graph: tensor arguments and results.
    """
    from mhc_compile.ops.spec import CoefficientSpec

    from . import coefficients, coefficients_backward, post, pre

    spec = CoefficientSpec()
    flat = list(spec.op_arguments().values())
    make = torch.Generator(device="cuda").manual_seed(0)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=make)

    def bf16(*shape: int) -> torch.Tensor:
        return fp32(*shape).to(torch.bfloat16)

    x, y, g = bf16(tokens, n, width), bf16(tokens, width), bf16(tokens, n, width)
    q, h, p = fp32(tokens, n), fp32(tokens, n, n), fp32(tokens, n)
    phi, bias, alphas = fp32(spec.rows, n * width) * 0.02, fp32(spec.rows), [fp32(1) for _ in range(3)]
    hi, lo = coefficients.halves(phi, torch.bfloat16)
    padded = coefficients.padded_rows(spec)
    splits = coefficients.project_splits(tokens, padded, n * width, 2)
    partial = coefficients.project(x, hi, lo, spec.rows, padded, splits)
    outs = coefficients.activate(partial, bias, *alphas, n * width, *flat)
    back = coefficients_backward.logits_backward(p, q, h, outs[3], bias, *alphas, n * width, False, *flat)
    dm, rows = back[0], x.view(tokens, n * width)

    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def gradient() -> torch.Tensor:
        result: torch.Tensor = torch.ops.aten.mm.dtype(dm.t(), rows, torch.float32)
        return result

    return [
        (
            "mhc_kernel.activate",
            lambda: coefficients.activate(partial, bias, *alphas, n * width, *flat),
            size(partial, bias, *alphas, *outs),
        ),
        (
            "mhc_kernel.project",
            lambda: coefficients.project(x, hi, lo, spec.rows, padded, splits),
            size(x, hi, lo, partial),
        ),
        (
            "mhc_kernel.logits_backward",
            lambda: coefficients_backward.logits_backward(p, q, h, outs[3], bias, *alphas, n * width, False, *flat),
            size(p, q, h, outs[3], bias, *alphas, *back),
        ),
        ("aten.mm.dtype", gradient, size(dm, rows) + dm.shape[1] * n * width * 4),
        ("mhc_kernel.post", lambda: post.forward(x, y, q, h, False), size(x, y, q, h, x)),
        ("mhc_kernel.pre", lambda: pre.forward(x, p), size(x, p, y)),
        ("mhc_kernel.post_dots", lambda: post.dots(g, x, y, q, h, False, True), size(g, x, y, q, h, y, q, h)),
    ]
