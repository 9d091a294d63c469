"""Which Triton kernel takes which node: the first provider. Triton is imported when a node could run on it, never
before."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mhc_compile.compat import keep_kernel_launches, remember_kernel_analysis, triton_version

from . import ends
from .base import LoweringLog, arguments, device_of, fake
from .inline import Bodies, replace_by_function


def interpreted() -> bool:
    """TRITON_INTERPRET=1: kernels run on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def platform_refusal(device: torch.device | None) -> str:
    """Why Triton does not run there; empty if it does."""
    if not triton_version():
        return "Triton is not installed"
    if device is not None and device.type == "cpu" and interpreted():
        return ""
    if device is None or device.type != "cuda":
        return f"no kernels for {device.type if device is not None else 'no device'}"
    if torch.version.hip is not None:
        return "kernels are not tested on ROCm"
    if _capability(device.index or 0) < (8, 0):
        return f"compute capability {_capability(device.index or 0)} is below 8.0"
    return ""


def register_kernels(device: torch.device | None) -> None:
    """Make the `mhc_kernel::` ops known where kernels run on `device`.

    A compiled graph that comes from inductor's cache in another process runs no pass of ours, and names them as text.
    """
    if not platform_refusal(device):
        from . import activate_pre, boundary, coefficients, coefficients_backward, post, pre, sinkhorn  # noqa: F401
        from . import logits_backward_parts  # noqa: F401  # isort: skip
        from . import activate_again, activate_beside_norm, activate_post, activate_pre_norm  # noqa: F401  # isort: skip
        from . import gate_pre_norm, post_project  # noqa: F401  # isort: skip
        from . import post_collapse  # noqa: F401  # isort: skip
        from . import post_pre_norm, pre_norm, replay, replay_normed, site_boundary  # noqa: F401  # isort: skip


def refusal(name: str, named: dict[str, Any]) -> str:
    """Why no kernel takes the node; empty if one does. `named` are the node's arguments."""
    if name.startswith(("expand", "collapse")):
        return "element-wise: inductor's own kernel is at the floor"
    if name.startswith(("stream_norm", "channel_pre")):
        return "no kernel of ours: inductor fuses it around its matrix products"
    reason = platform_refusal(device_of(named))
    if reason:
        return reason
    from . import activate_again, coefficients, post, pre, pre_norm, sinkhorn

    values = {key: fake(value) for key, value in named.items()}
    backward = name.endswith("_backward")
    stem = name.removesuffix("_backward")
    if stem == "sinkhorn":
        return sinkhorn.refusal(values, values["logits"], backward)
    if stem == "pre":
        return pre.refusal(values["streams"])
    if stem == "post":
        return post.refusal(values["streams"], values["y"])
    if stem == "pre_norm":
        return pre_norm.refusal(values["streams"], values["weight"], values["bias"])
    if stem == "activate":
        return activate_again.refusal(values)
    return coefficients.refusal(values, values["x"], values["phi"], backward)


def sites_a_replay(streams: torch.Tensor) -> int:
    """How many sites of such a state [..., n, C] one call replays with their branch inputs: 1 where each has its
    own."""
    if platform_refusal(streams.device):
        return 1
    from . import replay_normed

    return 1 if replay_normed.refusal(streams) else replay_normed.MOST


def takes_rows(streams: torch.Tensor) -> bool:
    """Whether kernels read one row for all streams where the gradient of such a state comes from a collapse."""
    if platform_refusal(streams.device):
        return False
    from .launch import state_refusal

    return not state_refusal(streams)


def lower(node: fx.Node, name: str, named: dict[str, Any]) -> None:
    """Replace `node` by calls of its kernels and the few tensor operations around them."""
    from . import activate_again, boundary, coefficients, post, pre, pre_norm, sinkhorn

    functions = {
        "activate": activate_again.forward,
        "sinkhorn": sinkhorn.forward,
        "sinkhorn_backward": sinkhorn.backward,
        "pre": pre.forward,
        "pre_backward": pre.backward,
        "pre_norm": pre_norm.forward,
        "pre_norm_backward": pre_norm.backward,
        "post": post.forward,
        "post_backward": post.backward,
        "coefficients": coefficients.forward,
        "coefficients_backward": boundary.coefficients_backward,
    }
    replace_by_function(node, functions[name], list(named.values()))


def expand_launches(graph: fx.Graph, log: LoweringLog) -> int:
    """Replace every `mhc_kernel::` call by its allocations and launches, which inductor emits in its own wrapper.

    Left as it is (one opaque call, some tens of microseconds of Python) under the interpreter, or where torch cannot
    trace the launch; the reason is logged. Returns how many calls were opened.
    """
    from .launch import KERNEL_OPS, traced_launches

    keep_kernel_launches()
    remember_kernel_analysis(__name__.split(".")[0])
    opened = 0
    bodies: Bodies = {}
    for node in [node for node in graph.nodes if node.target in KERNEL_OPS]:
        name = str(node.target).removesuffix(".default")
        if interpreted():
            log.record(name, "opaque", "the interpreter's kernels cannot be traced")
            continue
        try:
            with traced_launches():
                replace_by_function(node, KERNEL_OPS[node.target], list(arguments(node).values()), False, bodies)
        except (
            Exception
        ) as error:  # torch's tracing of user kernels differs between versions; the opaque call is right too
            log.record(name, "opaque", f"{type(error).__name__}: {str(error)[:200]}")
            continue
        opened += 1
    return opened


def fuse(graph: fx.Graph, log: LoweringLog, fuses: Callable[[str], bool]) -> None:
    """Fusions over several semantic ops, where the kernels for them can run."""
    from . import fuse as fusions

    fusions.run(graph, log, fuses)


def fuse_lowered(graph: fx.Graph, log: LoweringLog, fuses: Callable[[str], bool]) -> None:
    """Fusions of what kernels read with the kernels, once every op has its kernels."""
    within = fuses("activate_post") and fuses("gate_pre_norm")
    if within and any(str(node.target) == "mhc_kernel.activate.default" for node in graph.nodes):
        from . import activate_post

        activate_post.merge(graph, log)
    if fuses("activate_beside_norm") and any(str(node.target) == "mhc_kernel.activate.default" for node in graph.nodes):
        from . import activate_beside_norm

        activate_beside_norm.merge(graph, log)
    if fuses("site_boundary") and any(str(node.target).startswith("mhc_kernel.post_dots") for node in graph.nodes):
        from . import site_boundary

        site_boundary.merge(graph, log)
    if fuses("addends") and any(str(node.target).startswith("mhc_kernel.pre_norm_dots") for node in graph.nodes):
        from .addends import take_addends

        take_addends(graph, log)
    if fuses("ends"):
        ends.take_rows(graph, log)
    if fuses("replay") and any(str(node.target).startswith("mhc_kernel.replay_normed") for node in graph.nodes):
        from . import replay_runs

        replay_runs.drop_unread(graph)


def fuse_planned(graph: fx.Graph, log: LoweringLog) -> None:
    """Fusions of what the scheduler has taken apart and left on the main stream."""
    if any(str(node.target) == "mhc_kernel.activate_pre.default" for node in graph.nodes):
        from . import gate_pre_norm

        gate_pre_norm.merge(graph, log)
