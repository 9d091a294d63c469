"""Our kernels as work for a side stream: what can be taken apart for it, and what to measure on a device.

Which calls move is decided elsewhere, by cost; here is what only the kernels know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .base import arguments, origin

Split = tuple[fx.Node, fx.Node, Callable[[], None]]
"""A call that may move, the call that the main stream needs if it does, and how to take the pair back."""


def split_coefficients(graph: fx.Graph) -> list[Split]:
    """Take apart what the main stream needs early, or late, and what can be made beside the branch; the graph computes
    the same."""
    return [*split_activate(graph), *split_logits_backward(graph)]


def split_activate(graph: fx.Graph) -> list[Split]:
    """Take the pre part out of every ``mhc_kernel::activate`` that also makes post or res.

    The branch waits for pre alone; post and res with their Sinkhorn are wanted behind it. Returns (the activate, the
    call that makes pre, how to take that back) of each.
    """
    found: list[Split] = []
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
        kept = [value for name, value in named.items() if name not in ("alpha_post", "alpha_res")]
        early = _call_like(node, torch.ops.mhc_kernel.activate_pre.default, kept, pre[0].meta["val"])
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


def split_logits_backward(graph: fx.Graph) -> list[Split]:
    """Cut every ``mhc_kernel::logits_backward`` that needs more than the gradient of pre in two.

    The gradients of post and res are there before the backward of the branch, that of pre is the last of it: Sinkhorn's
    backward can run beside the branch. Returns (the early call, the rest, how to make one of them) of each.
    """
    found: list[Split] = []
    for node in [node for node in graph.nodes if str(node.target) == "mhc_kernel.logits_backward.default"]:
        named = arguments(node)
        late = named["d_post"] is not None or named["d_res"] is not None
        # Of one stream the compiler may fuse a sum of one product with the addition behind it, where it sees both.
        if named["d_pre"] is None or not late or "pre" not in str(named["layout"]).split(",") or named["streams"] < 2:
            continue
        found.append(_cut(node, named))
    return found


def _cut(node: fx.Node, named: dict[str, Any]) -> Split:
    from . import logits_backward_parts  # noqa: F401  # registers the ops

    ops, values = torch.ops.mhc_kernel, node.meta["val"]
    shared = [named[name] for name in ("projection", "bias", "alpha_pre")]
    attributes = list(named.values())[list(named).index("total") :]
    inner = values[1].new_empty((values[1].shape[0], 2))
    given = [named["d_post"], named["d_res"], *shared, named["alpha_post"], named["alpha_res"], *attributes]
    early = _call_like(node, ops.logits_backward_early.default, given, (values[0], inner, values[2]))
    parts = [_call_like(node, operator.getitem, [early, index], value) for index, value in enumerate(early.meta["val"])]
    late = _call_like(node, ops.logits_backward_rest.default, [named["d_pre"], *parts, *shared, *attributes], values)
    whole = (node.target, node.args, node.kwargs)
    node.replace_all_uses_with(late)
    node.graph.erase_node(node)
    return early, late, _Whole(early, late, whole)


def _call_like(node: fx.Node, target: Any, args: list[Any], value: Any) -> fx.Node:
    """A call before `node` with what is known of where that one came from."""
    with node.graph.inserting_before(node):
        call = node.graph.call_function(target, tuple(args))
    call.meta.update(origin(node), val=value)
    return call


class _Whole:
    """Puts one call back in the place of two."""

    def __init__(self, early: fx.Node, late: fx.Node, whole: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
        self.early, self.late, self.whole = early, late, whole

    def __call__(self) -> None:
        """Undo one cut."""
        target, args, kwargs = self.whole
        node = _call_like(self.late, target, list(args), self.late.meta["val"])
        node.kwargs = kwargs
        self.late.replace_all_uses_with(node)
        parts = list(self.early.users)
        for call in (self.late, *parts, self.early):
            call.graph.erase_node(call)


Case = tuple[str, Callable[[], object], int] | tuple[str, Callable[[], object], int, Callable[[], object]]
"""Kind as ``scheduler.dag.kind_of`` names it, a call, bytes read and written; the call whose place it takes."""


def side_cases(tokens: int, width: int, n: int = 4) -> list[Case]:
    """What may run on the side stream: our kernels, bfloat16, on CUDA. Not `project` and `post_dots`, reductions whose
    bits depend on a setting that is chosen where their launch is compiled.

    Bytes are what ``cost.work`` says of the call in a graph: tensor arguments and results.
    """
    return _cases(tokens, width, n)[0]


def main_parts(tokens: int, width: int, n: int = 4) -> list[Case]:
    """What the main stream has to do in addition if a call of `split_coefficients` moves."""
    return _cases(tokens, width, n)[1]


def _cases(tokens: int, width: int, n: int) -> tuple[list[Case], list[Case]]:
    from mhc_compile.ops.spec import CoefficientSpec

    from . import coefficients, gate_pre_norm, logits_backward_parts, post, post_pre_norm, pre, pre_norm, replay
    from . import replay_normed, site_boundary  # isort: skip

    spec = CoefficientSpec(streams=n)
    flat = list(spec.op_arguments().values())
    make = torch.Generator(device="cuda").manual_seed(0)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=make)

    def bf16(*shape: int) -> torch.Tensor:
        return fp32(*shape).to(torch.bfloat16)

    x, y = bf16(tokens, n, width), bf16(tokens, width)
    q, h, p = fp32(tokens, n), fp32(tokens, n, n), fp32(tokens, n)
    phi, bias, alphas = fp32(spec.rows, n * width) * 0.02, fp32(spec.rows), [fp32(1) for _ in range(3)]
    hi, lo = coefficients.halves(phi, torch.bfloat16)
    padded = coefficients.padded_rows(spec)
    splits = coefficients.project_splits(tokens, padded, n * width, 2)
    partial = coefficients.project(x, hi, lo, spec.rows, padded, splits)
    active = (partial, bias, *alphas, n * width, *flat)
    outs = coefficients.activate(*active)
    sums = fp32(site_boundary.partial_sums(width), tokens, n + n * n)
    shared = (outs[3], bias, *alphas, n * width, False, *flat)
    back = logits_backward_parts.early(q, h, *shared)
    rest = (p, *back, outs[3], bias, alphas[0], n * width, False, *flat)
    norm = (None, None, "rms", 1e-6, 0.0, True, False)
    dm, rows = logits_backward_parts.rest(*rest)[0], x.view(tokens, n * width)

    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def gradient() -> torch.Tensor:
        result: torch.Tensor = torch.ops.aten.mm.dtype(dm.t(), rows, torch.float32)
        return result

    sides: list[Case] = [
        ("mhc_kernel.activate", lambda: coefficients.activate(*active), size(partial, bias, *alphas, *outs)),
        (
            "mhc_kernel.logits_backward_early",
            lambda: logits_backward_parts.early(q, h, *shared),
            size(q, h, outs[3], bias, *alphas, *back),
        ),
        (
            "mhc_kernel.logits_backward_early",  # behind a site whose gradients come as partial sums
            lambda: logits_backward_parts.early(sums, None, *shared),
            size(sums, outs[3], bias, *alphas, *back),
        ),
        ("aten.mm.dtype", gradient, size(dm, rows) + dm.shape[1] * n * width * 4),
        ("mhc_kernel.post", lambda: post.forward(x, y, q, h, False), size(x, y, q, h, x)),
        ("mhc_kernel.pre", lambda: pre.forward(x, p), size(x, p, y)),
        (
            "mhc_kernel.replay",  # of a recompute plan, two sites
            lambda: replay.forward(x, [y, y], [q, q], [h, h], False),
            size(x, y, y, q, q, h, h, x, x),
        ),
        (
            "mhc_kernel.post_pre_norm",  # likewise, a site with its branch input
            lambda: post_pre_norm.forward(x, y, q, h, False, p, *norm),
            size(x, y, q, h, p, x, y),
        ),
        (
            "mhc_kernel.replay_normed",  # likewise, two sites with their branch inputs
            lambda: replay_normed.forward(
                x, [y, y], [q, q], [h, h], False, [True, True], [True, True], [p, p], [], [], "rms", 1e-6, 0.0, True
            ),
            size(x, *2 * (y, q, h, p, x, y)),
        ),
    ]
    mains: list[Case] = [
        (
            "mhc_kernel.activate_pre",  # which a norm does for itself
            lambda: gate_pre_norm.forward(x, *norm, partial, bias, alphas[0], n * width, *flat),
            size(partial, bias, alphas[0], p),
            lambda: pre_norm.forward(x, p, *norm),
        ),
        (
            "mhc_kernel.logits_backward_rest",
            lambda: logits_backward_parts.rest(*rest),
            size(p, *back, outs[3], bias, alphas[0], dm, p[:, 0], back[2]),
        ),
    ]
    return sides, mains
