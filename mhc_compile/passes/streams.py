"""Building on streams: channel layout in and out, and operations between sites applied to every stream alike."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from mhc_compile.capture.graph import Builder, meta_value
from mhc_compile.capture.mutation import op_name


class StreamValue(NamedTuple):
    """The n streams at one point of a chain."""

    node: fx.Node
    """Tokens first, then the stream axis, channels last: [..., n, C]."""
    channel: int
    """Axis (negative) that the channels have in the user's own layout of one stream."""


_CASTS = frozenset(
    """
    float half bfloat16 double contiguous clone detach dropout
    """.split()
)


class StreamBuilder:
    """Builds stream-level nodes with a ``Builder`` that says where."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder

    def channels_last(self, node: fx.Node, channel: int) -> fx.Node:
        """[B, C, H, W] -> [B, H, W, C] for ``channel=-3``; nothing for -1."""
        return node if channel == -1 else self.builder.method("movedim", node, channel, -1)

    def channels_back(self, node: fx.Node, channel: int) -> fx.Node:
        """Inverse of ``channels_last``."""
        return node if channel == -1 else self.builder.method("movedim", node, -1, channel)

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        """One result of a node that returns several."""
        return self.builder.call(operator.getitem, node, index)

    def apply(
        self,
        path: list[fx.Node],
        source: fx.Node,
        target: fx.Node,
        versions: dict[fx.Node, StreamValue],
        channel: int,
    ) -> StreamValue:
        """The streams after the operations ``path`` that lead from ``source`` to ``target``.

        A cast or a scaling is applied to the whole state at once, anything else to each stream on its own. Fills
        ``versions`` for every stream value on the way that has one.
        """
        if target is source:
            return versions[source]
        state = versions[source]
        if all(_is_direct(node, state.channel) for node in path) and _is_line(path, source):
            previous = source
            for node in path:
                with self.builder.at(after=_later(state.node, node), like=node):
                    state = StreamValue(self.builder.replay(node, {previous: state.node}), channel)
                versions[node] = state
                previous = node
            return versions[target]
        return self._each_stream(path, source, target, versions, channel)

    def _each_stream(
        self,
        path: list[fx.Node],
        source: fx.Node,
        target: fx.Node,
        versions: dict[fx.Node, StreamValue],
        channel: int,
    ) -> StreamValue:
        state = versions[source]
        count = int(meta_value(state.node).shape[-2])
        with self.builder.at(after=_later(state.node, path[-1]), like=target):
            results = []
            for index in range(count):
                stream = self.builder.method("select", state.node, -2, index)
                mapping = {source: self.channels_back(stream, state.channel)}
                for node in path:
                    mapping[node] = self.builder.replay(node, mapping)
                results.append(self.channels_last(mapping[target], channel))
            joined = self.builder.call(torch.stack, results, dim=-2)
        versions[target] = StreamValue(joined, channel)
        return versions[target]


def _is_line(path: list[fx.Node], source: fx.Node) -> bool:
    """True when each operation reads the one before it (no second way around)."""
    return all(node.args and node.args[0] is before for before, node in zip([source, *path], path, strict=False))


def _is_direct(node: fx.Node, channel: int) -> bool:
    """True when applying the operation to [..., n, C] is applying it to every stream."""
    name = op_name(node)
    others = [*node.args[1:], *node.kwargs.values()]
    if name in _CASTS:
        return True
    if name == "to":
        return not any(isinstance(arg, fx.Node) for arg in others)
    if name in ("mul", "div", "truediv", "neg", "imul"):
        return all(isinstance(arg, (int, float)) or _is_scalar(arg) for arg in others)
    if name == "layer_norm" and channel == -1:
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        return isinstance(shape, (tuple, list)) and len(shape) == 1
    return False


def _is_scalar(arg: Any) -> bool:
    value = meta_value(arg)
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _later(a: fx.Node, b: fx.Node) -> fx.Node:
    return b if a < b else a
