"""Copying a Dynamo graph, building nodes in it, and reading where a node comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from mhc_compile import compat

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_STACK_NAME = re.compile(r"^(?:[LG]\[['\"][^'\"]+['\"]\]\.?)")


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that can be edited: own graph, shared submodules and parameters.

    ``_dynamo_source`` and the meta dictionaries of the nodes are carried over (the dictionaries are copied, so that
    new entries stay ours); ``grapharg`` is dropped, because it belongs to Dynamo's own placeholders.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copy = graph.node_copy(node, lambda n: mapping[n])
        copy.meta = {key: value for key, value in node.meta.items() if key != "grapharg"}
        source = getattr(node, "_dynamo_source", None)
        if source is not None:
            copy._dynamo_source = source  # type: ignore[attr-defined]  # Dynamo's own attribute, read by AOTAutograd
        mapping[node] = copy
    result = compat.graph_module(gm, graph)
    result.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(result, name, getattr(gm, name))
    return result


def meta_value(node: Any) -> Any:
    """The fake value of a node (FakeTensor, SymInt, python value), the argument itself if it is no node."""
    if not isinstance(node, fx.Node):
        return node
    if "example_value" in node.meta:
        return node.meta["example_value"]
    return node.meta.get("val")


def user_line(node: fx.Node) -> str:
    """``file:line`` of the innermost frame of the user's stack, relative to the working directory where possible."""
    trace = node.meta.get("stack_trace")
    return _innermost(trace, os.getcwd()) if trace else ""


@functools.lru_cache(maxsize=4096)
def _innermost(trace: str, directory: str) -> str:
    """``file:line`` of the last frame of a stack trace; all nodes of a line, and every pass, ask for the same."""
    frames = _FRAME.findall(trace)
    if not frames:
        return ""
    file, line = frames[-1]
    relative = os.path.relpath(file, directory)
    return f"{file if relative.startswith('..') else relative}:{line}"


def qualified_module(node: fx.Node) -> str:
    """Qualified name of the innermost module of the node's stack, ``model.layers.0``; empty for the root itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name = next(reversed(stack.values()))[0]
    name = _STACK_NAME.sub("", str(name))
    return re.sub(r"\._modules\['([^']+)'\]", r".\1", name).replace("._modules", "").lstrip(".")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What a fake tensor of fixed sizes is, but for its identity."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_UNKNOWN = object()


def _kind(value: Any) -> Any:
    """The kind of an argument: equal for arguments that a result does not tell apart; ``_UNKNOWN`` where it may."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (FakeTensor, torch.Tensor, torch.nn.Parameter):
            return _UNKNOWN
        size, stride = tuple(value.shape), value.stride()
        fixed = all(type(number) is int for number in (*size, *stride))
        return _Tensor(size, stride, value.dtype, value.device) if fixed else _UNKNOWN
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
    return (type(value), value) if plain else _UNKNOWN


def _empty(kind: _Tensor) -> torch.Tensor:
    return torch.empty_strided(kind.size, kind.stride, dtype=kind.dtype, device=kind.device)


class Builder:
    """Inserts nodes into a graph, each with its fake value and the place of the node it stands for.

    ``example_value`` is computed by running the target on the fake values of the arguments: AOTAutograd's cache and
    our later passes read it. ``anchor`` gives the stack trace and module stack of every node built.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.fake_mode = next(
            (value.fake_mode for node in gm.graph.nodes for value in [meta_value(node)] if hasattr(value, "fake_mode")),
            None,
        )
        self._anchor: fx.Node | None = None
        self._results: dict[tuple[Any, ...], Any] = {}
        self.tags: fx.Node | None = None
        """Node whose recompute tags (an activation checkpoint's) every new node gets."""

    @contextlib.contextmanager
    def at(
        self, *, after: fx.Node | None = None, before: fx.Node | None = None, like: fx.Node | None = None
    ) -> Iterator[None]:
        """Insert after or before a node; successive nodes keep their order and get the place of ``like``."""
        anchor = after if after is not None else before
        assert anchor is not None
        previous, self._anchor = self._anchor, like if like is not None else anchor
        point = self.graph.inserting_before(anchor.next if after is not None else anchor)
        try:
            with point:
                yield
        finally:
            self._anchor = previous

    def describe(self, node: fx.Node) -> fx.Node:
        """Give a new node the place of the anchor, and its fake value."""
        if self._anchor is not None:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in self._anchor.meta:
                    node.meta[key] = self._anchor.meta[key]
        if self.tags is not None:
            for key in ("recompute", "ac_graph_id"):
                if key in self.tags.meta:
                    node.meta[key] = self.tags.meta[key]
        node.meta["example_value"] = self.fake(node)
        return node

    def fake(self, node: fx.Node) -> Any:
        """Run one node on the fake values of its arguments."""
        args = fx.map_arg(node.args, meta_value)
        kwargs = fx.map_arg(node.kwargs, meta_value)
        mode = self.fake_mode if self.fake_mode is not None else contextlib.nullcontext()
        with mode, torch.no_grad():
            if node.op == "call_function":
                assert callable(node.target)
                return self._run(node.target, args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            raise AssertionError(f"no fake value for a {node.op} node")

    def _run(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``target``. What one of our own ops gives depends on nothing but the kinds of its arguments, and the
        sites of a model mostly ask for the same: each kind is worked out once."""
        if getattr(target, "namespace", "") != "mhc":
            return target(*args, **kwargs)
        kinds = [_kind(value) for value in (*args, *kwargs.values())]
        if any(kind is _UNKNOWN for kind in kinds):
            return target(*args, **kwargs)
        key = (target, *kinds, *kwargs)
        if key not in self._results:
            result = target(*args, **kwargs)
            made = tuple(map(_kind, result)) if isinstance(result, tuple) else _kind(result)
            if all(isinstance(kind, _Tensor) for kind in (made if isinstance(made, tuple) else (made,))):
                self._results[key] = made
            return result
        known = self._results[key]
        return tuple(map(_empty, known)) if isinstance(known, tuple) else _empty(known)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_function`` node at the insertion point."""
        return self.describe(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_method`` node at the insertion point."""
        return self.describe(self.graph.call_method(name, args, kwargs))

    def replay(self, node: fx.Node, mapping: dict[fx.Node, fx.Node]) -> fx.Node:
        """A copy of a node at the insertion point with arguments replaced by ``mapping``."""
        copy = self.graph.node_copy(node, lambda n: mapping.get(n, n))
        copy.meta = {key: value for key, value in node.meta.items() if key != "grapharg"}
        copy.meta["example_value"] = self.fake(copy)
        return copy
