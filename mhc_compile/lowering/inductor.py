"""Where the lowering meets inductor: graph passes through its documented seams, and their identity for its caches.

`config_patches` gives the settings for `torch._inductor.compile(gm, inputs, options=...)`. The pass runs after
autograd and
partitioning, once on the forward and once on the backward graph, in this order: fuse (pattern, check, replace over the
semantic ops), then lower what is left, each node by the first provider that takes it (see `base`). Before partitioning
there is one more where a recompute plan asks for it (see `logits_alone`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from mhc_compile import ops
from mhc_compile.compat import chain_graph_passes, declare_fallbacks, triton_version
from mhc_compile.ops.base import compute_dtype

from . import kernels, logits_alone, opaque, tune
from .base import BACKWARD_TARGETS, FORWARD_TARGETS, TARGETS, LoweringLog, arguments, device_of, options_key
from .inline import Bodies, replace_by_function

SINKHORN_INLINE_STEPS = 6
"""Longer Sinkhorn loops stay one opaque call where the native body is traced: unrolled into a graph, 40 steps
forward and 80 backward a site multiply inductor's compile time, and the matrices are 16 numbers a token."""


@functools.cache
def source_hash() -> str:
    """Hash over every source file of the package: any change of ours invalidates inductor's on-disk artefacts."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _traced_sinkhorn(logits: Tensor, **attributes: Any) -> Tensor:
    """The inner Sinkhorn of a traced `coefficients`: kept as an op, so that it is lowered on its own terms."""
    return torch.ops.mhc.sinkhorn.default(logits, **attributes)


def _traced_sinkhorn_backward(grad: Tensor, logits: Tensor, **attributes: Any) -> Tensor:
    return torch.ops.mhc.sinkhorn_backward.default(grad, logits, **attributes)


def _coefficients_body(*args: Any) -> Any:
    from mhc_compile.ops.coefficients import activate, native_spec, split_arguments

    x, phi, bias, alphas, spec = split_arguments(args)
    return native_spec(x, phi, bias, alphas, spec, functools.partial(activate, sinkhorn=_traced_sinkhorn))


def _activate_body(*args: Any) -> Any:
    from mhc_compile.ops.activate import split
    from mhc_compile.ops.coefficients import activate

    return activate(*split(args), sinkhorn=_traced_sinkhorn)


def _coefficients_backward_body(*args: Any) -> Any:
    from mhc_compile.ops.coefficients import native_backward_spec, small_gradients, split_backward_arguments

    grads, x, phi, bias, alphas, projection, needs, spec = split_backward_arguments(args)
    small = functools.partial(small_gradients, sinkhorn_backward=_traced_sinkhorn_backward)
    return native_backward_spec(grads, x, phi, bias, alphas, projection, spec, needs, small)


def _post_backward_body(
    grad: Tensor, streams: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor | None, transpose: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The native backward of post with dH as one reduction: run eagerly it would hold [..., n, n, C], compiled it holds
    nothing, and n reductions and their concatenation are 2n + 1 nodes a site for inductor to schedule."""
    rest = [*needs[:3], False]
    dx, dy, d_post, d_res = ops.post.native_backward(grad, streams, y, h_post, h_res, transpose, rest)
    if needs[3] and h_res is not None:
        dtype = compute_dtype(streams, y, h_post, h_res, grad)
        g, x = grad.to(dtype), streams.to(dtype)
        rows, columns = (x, g) if transpose else (g, x)
        d_res = (rows.unsqueeze(-2) * columns.unsqueeze(-3)).sum(-1).to(h_res.dtype)
    return dx, dy, d_post, d_res


def native_body(name: str) -> Callable[..., Any]:
    """The plain PyTorch function that is traced for an op; coefficients keep their Sinkhorn as an op of its own."""
    if name == "post_backward":
        return _post_backward_body
    if name == "coefficients":
        return _coefficients_body
    if name == "coefficients_backward":
        return _coefficients_backward_body
    if name == "activate":
        return _activate_body
    backward = name.endswith("_backward")
    op = ops.OPS[name.removesuffix("_backward")]
    return op.native_backward if backward else op.native


def opaque_reason(name: str, named: dict[str, Any]) -> str:
    """Why the native body should not be traced into the graph; empty if it should."""
    if name.startswith("sinkhorn") and named["steps"] > SINKHORN_INLINE_STEPS:
        return f"{named['steps']} half steps would be unrolled (limit {SINKHORN_INLINE_STEPS})"
    return ""


def _small_part_is_opaque(name: str, named: dict[str, Any]) -> bool:
    """On the CPU, coefficients whose Sinkhorn is one call anyway: what is computed from K numbers a token joins it. It
    is little work at run time and most of what inductor would have to schedule."""
    device = device_of(named)
    if name not in opaque.BODIES or device is None or device.type != "cpu":
        return False
    return named["res"] == "sinkhorn" and named["sinkhorn_steps"] > SINKHORN_INLINE_STEPS


def lower(graph: fx.Graph, options: Any, log: LoweringLog) -> int:
    """Lower every `mhc::` node of `graph`; returns how many. Raises where `lowering='triton'` and a kernel refuses."""
    mode = getattr(options, "lowering", "auto")
    bodies: Bodies = {}
    count = 0
    while True:
        pending = [node for node in graph.nodes if node.target in TARGETS and "mhc_opaque" not in node.meta]
        if not pending:
            return count
        for node in pending:
            _lower_node(node, mode, log, bodies)
            count += 1


def _lower_node(node: fx.Node, mode: str, log: LoweringLog, bodies: Bodies) -> None:
    name, named = TARGETS[node.target], arguments(node)
    reason = "lowering='native'" if mode == "native" else kernels.refusal(name, named)
    if not reason:
        kernels.lower(node, name, named)
        log.record(name, "triton")
        return
    if mode == "triton":
        raise RuntimeError(f"lowering='triton', but mhc::{name} on {device_of(named)} has no kernel: {reason}")
    whole = opaque_reason(name, named)
    if whole:
        node.meta["mhc_opaque"] = True
        log.record(name, "native", f"triton: {reason}; inductor: {whole}")
        return
    body = native_body(name)
    if _small_part_is_opaque(name, named):
        body = opaque.BODIES[name]
        reason += "; gates and Sinkhorn are one call of the native body"
    replace_by_function(node, body, list(named.values()), bodies=bodies)
    log.record(name, "inductor", reason)


class LowerPass(CustomGraphPass):
    """Fuses and lowers our ops on one partitioned graph. `uuid` covers the package's source, Triton, the options and
    `key`."""

    def __init__(self, options: Any, log: LoweringLog, key: str = "") -> None:
        self.options = options
        self.log = log
        self.key = key

    def __call__(self, graph: fx.Graph) -> None:
        """Fuse, then lower."""
        if not any(node.target in TARGETS for node in graph.nodes):
            return
        logits_alone.merge(graph)
        logits_alone.gather(graph)
        fuse = getattr(self.options, "lowering", "auto") != "native"
        if fuse:
            kernels.fuse(graph, self.log, self._fuses)
        lower(graph, self.options, self.log)
        if fuse:
            kernels.fuse_lowered(graph, self.log, self._fuses)
        graph.eliminate_dead_code()
        graph.lint()

    def _fuses(self, name: str) -> bool:
        if name in ("activate_post", "activate_beside_norm") and self.options.schedule != "off":
            return False  # Sinkhorn is the scheduler's to move
        return bool(self.options.fuses(name))

    def uuid(self) -> Any:
        """Identity for FxGraphCache and AOTAutogradCache."""
        return ("mhc_compile.lowering", source_hash(), triton_version(), repr(options_key(self.options)), self.key)


class LeavePass(CustomGraphPass):
    """The pass over the joint graph that has the logits alone kept, where the recompute plan's tags say so; `key` is
    their identity."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite one joint graph."""
        if logits_alone.leave(graph):
            graph.lint()

    def uuid(self) -> Any:
        """Identity for FxGraphCache and AOTAutogradCache."""
        return ("mhc_compile.logits", source_hash(), self.key)


def _is_ours(target: Any) -> bool:
    """Whether a call is one of ours: mhc::, mhc_kernel::, mhc_native::, mhc_stream::."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace.partition("_")[0] == "mhc"


class LaunchPass(CustomGraphPass):
    """Last of inductor's graph passes: gives a gate that the scheduler has set free to the kernel that reads it, and
    opens our kernels' opaque calls into launches (they mutate their outputs, and the passes before this one expect a
    functional graph), each with its setting: the fixed one, with the option `autotune` the one that was measured (see
    `tune`). Without `opens` they stay opaque."""

    def __init__(self, log: LoweringLog, options: Any = None, opens: bool = True) -> None:
        self.log = log
        self.options = options
        self.opens = opens
        # Taken now: the backward is compiled on a thread of autograd's own, where no context of ours is.
        wanted = getattr(options, "autotune", False) and not torch.are_deterministic_algorithms_enabled()
        self.tuning = tune.current() or (tune.Session(log.record_setting) if wanted else None)

    def __call__(self, graph: fx.Graph) -> None:
        """Open every call of a kernel in `graph`; what stays a call of ours, inductor is told."""
        if any(str(node.target).startswith("mhc_kernel.") for node in graph.nodes):
            if self.options is None or self.options.fuses("gate_pre_norm"):
                kernels.fuse_planned(graph, self.log)
            if self.opens:
                with tune.session(self.tuning):
                    kernels.expand_launches(graph, self.log)
            graph.lint()
        declare_fallbacks({node.target for node in graph.nodes if _is_ours(node.target)})

    def uuid(self) -> Any:
        """Identity for inductor's caches."""
        tuned = tune.identity() if self.tuning is not None else None
        fused = self.options is None or bool(self.options.fuses("gate_pre_norm"))
        return (
            "mhc_compile.launches",
            source_hash(),
            triton_version(),
            kernels.interpreted(),
            tuned,
            fused,
            self.opens,
        )


def config_patches(options: Any, log: LoweringLog, key: str = "", traced_launches: bool = True) -> dict[str, object]:
    """Settings for `torch._inductor.compile(..., options=...)` that lower our ops; a pass the user has set runs first.

    `options` is `config.Options`; `log` collects op, provider and reason while graphs are compiled (empty on a cache
    hit, when nothing is lowered). `key` is the identity of what torch's cache keys leave out: tags on the graph's nodes
    (a recompute plan). `traced_launches` opens the kernels' calls into launches that inductor emits itself; without it
    each is an opaque call, which costs some 30 us of the host.
    """
    patches: dict[str, object] = {
        "post_grad_custom_pre_pass": chain_graph_passes("post_grad_custom_pre_pass", LowerPass(options, log, key))
    }
    if key:
        patches["joint_custom_post_pass"] = chain_graph_passes("joint_custom_post_pass", LeavePass(key))
    launches = LaunchPass(log, options, traced_launches)
    patches["post_grad_custom_post_pass"] = chain_graph_passes("post_grad_custom_post_pass", launches)
    return patches


__all__ = ["BACKWARD_TARGETS", "FORWARD_TARGETS", "LowerPass", "config_patches", "lower", "native_body", "source_hash"]
