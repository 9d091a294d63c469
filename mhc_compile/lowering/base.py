"""Providers: who computes a semantic op in the compiled graph, and why.

For each `mhc::` node the providers are asked in order: **triton** (one of our kernels), **inductor** (the native
body is traced into the graph, so that inductor fuses it), **native** (the custom op stays one opaque call of the native
body). A
provider answers with the empty string, or with the reason why it does not take the node; the reasons reach the report.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.ops import INNER_OPS, OPS

PROVIDERS = ("triton", "inductor", "native")

FORWARD_TARGETS: dict[Any, str] = {op.overload: name for name, op in OPS.items()}
BACKWARD_TARGETS: dict[Any, str] = {op.backward_overload: f"{name}_backward" for name, op in OPS.items()}
INNER_TARGETS: dict[Any, str] = {op.overload: name for name, op in INNER_OPS.items()}
"""Of ops that a model cannot hold: what our passes put in behind autograd."""
TARGETS: dict[Any, str] = FORWARD_TARGETS | BACKWARD_TARGETS | INNER_TARGETS
"""Every overload that must be lowered -> its name; a backward op's name ends in `_backward`."""


FEW = 64
"""Most tokens that take the two launches of ``few_tokens``: beyond, a pass over the streams is bound by memory, and
four kernels that each run at the memory's speed are quicker."""


@dataclass(frozen=True)
class Lowered:
    """What happened to one node."""

    op: str
    provider: str
    """One of `PROVIDERS`, or `fused` for a node that a fusion took up."""
    reason: str = ""
    """Why no earlier provider took it (or which fusion did)."""


@dataclass
class LoweringLog:
    """Collects what the passes did, over the forward and the backward graph, in the order of lowering."""

    entries: list[Lowered] = field(default_factory=list)
    tuned: list[str] = field(default_factory=list)
    """The settings that kernels were launched with and where they come from, each line once (see `tune`)."""

    def record(self, op: str, provider: str, reason: str = "") -> None:
        """Add one entry."""
        self.entries.append(Lowered(op, provider, reason))

    def record_setting(self, line: str) -> None:
        """Add a line about a kernel's setting, once."""
        if line not in self.tuned:
            self.tuned.append(line)

    def counts(self) -> Counter[tuple[str, str]]:
        """How many nodes of each op went to each provider."""
        return Counter((entry.op, entry.provider) for entry in self.entries)

    def reasons(self) -> list[Lowered]:
        """Entries that carry a reason, each distinct one once."""
        return list(dict.fromkeys(entry for entry in self.entries if entry.reason))


VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
"""What changes the shape of a tensor and nothing else, on graphs behind autograd."""


def result(node: fx.Node, index: int) -> list[fx.Node]:
    """Who picks a result of a node with several."""
    return [user for user in node.users if user.args[1] == index]


def readers(values: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """(who reads these values, through views of them too; the views)."""
    found: list[fx.Node] = []
    views: list[fx.Node] = []
    ways = list(values)
    for value in ways:  # grows while it is walked through
        for user in value.users:
            if user.target in VIEWS:
                views.append(user)
                ways.append(user)
            else:
                found.append(user)
    return found, views


def origin(node: fx.Node) -> dict[str, Any]:
    """What a node's meta says of where it came from, for a node that is made in its place."""
    return {key: node.meta[key] for key in ("stack_trace", "nn_module_stack", "seq_nr") if key in node.meta}


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of its op's schema, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node} does not call an operator overload")
    named: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args):
            named[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def fake(value: Any) -> Any:
    """The fake tensor (or number) behind a graph argument: node -> its `val`, anything else as it is."""
    return fx.map_arg(value, lambda node: node.meta["val"])


def tensor_arguments(named: Mapping[str, Any]) -> list[Tensor]:
    """The fake tensors among the (faked) arguments."""
    return [value for value in (fake(value) for value in named.values()) if isinstance(value, Tensor)]


def device_of(named: Mapping[str, Any]) -> torch.device | None:
    """The device of the first tensor argument; None without one."""
    tensors = tensor_arguments(named)
    return tensors[0].device if tensors else None


def options_key(options: object) -> tuple[tuple[str, object], ...]:
    """The options as data for a cache key; any frozen dataclass, or an empty key for None."""
    if options is None or not dataclasses.is_dataclass(options) or isinstance(options, type):
        return ()
    return tuple((item.name, getattr(options, item.name)) for item in dataclasses.fields(options))
