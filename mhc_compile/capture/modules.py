"""Which module owns a parameter of the graph, and which instances the graph was traced from.

Dynamo lifts every parameter to a placeholder whose ``_dynamo_source`` is a chain of attribute reads starting at a
local or global of the frame. Evaluating the prefixes of that chain gives the root module (the outermost
``nn.Module``) and the modules on the way down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from mhc_compile import compat


@dataclasses.dataclass(frozen=True)
class ParameterRef:
    """A parameter or buffer placeholder: root module, names on the way down, name in the last module."""

    root: nn.Module
    path: tuple[str, ...]
    name: str
    is_buffer: bool


class ModuleMap:
    """Parameters of a captured graph by placeholder, and the root modules they come from.

    Args:
        gm: the graph whose placeholders carry ``_dynamo_source``.
        scope: what the sources are evaluated in (``{"L": locals, "G": globals}``); empty for a hand-made graph.
    """

    def __init__(self, gm: fx.GraphModule, scope: dict[str, Any], example_inputs: Sequence[Any] = ()) -> None:
        self._scope = scope
        self._values: dict[str, Any] = {}
        self._names: dict[int, dict[int, str]] = {}
        self.refs: dict[str, ParameterRef] = {}
        self.loose: set[str] = set()
        """Placeholders of parameters that no module is known to own."""
        self.root_sources: dict[int, tuple[nn.Module, Any]] = {}
        """id(root) -> (root, the Dynamo source that evaluates to it): what the instance guard is made of."""
        for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            source = getattr(node, "_dynamo_source", None)
            value = example_inputs[position] if position < len(example_inputs) else None
            if isinstance(value, nn.Parameter):
                self.loose.add(node.name)
            if source is None or (value is not None and not isinstance(value, torch.Tensor)):
                continue
            ref = self._resolve(source)
            if ref is not None:
                self.refs[node.name] = ref
                self.loose.discard(node.name)

    def _resolve(self, source: Any) -> ParameterRef | None:
        links = [source]
        while (base := getattr(links[-1], "base", None)) is not None:
            links.append(base)
        root: nn.Module | None = None
        owner: nn.Module | None = None
        for link in reversed(links):
            value = self._evaluate(link)
            if isinstance(value, nn.Module):
                if root is None:
                    root = value
                    self.root_sources.setdefault(id(root), (root, link))
                owner = value
        if root is None or owner is None:
            return None
        tensor = self._evaluate(source)
        name = next((k for k, v in owner._parameters.items() if v is tensor and v is not None), None)
        is_buffer = name is None
        if name is None:
            name = next((k for k, v in owner._buffers.items() if v is tensor and v is not None), None)
        if name is None:
            return None
        path = self.name_of(root, owner)
        return None if path is None else ParameterRef(root, path, name, is_buffer)

    def _evaluate(self, source: Any) -> Any:
        name = compat.source_name(source)
        if name not in self._values:
            try:
                self._values[name] = compat.evaluate_source(name, self._scope)
            except Exception:  # a source that cannot be evaluated here (a synthetic one) names no module
                self._values[name] = None
        return self._values[name]

    def name_of(self, root: nn.Module, module: nn.Module) -> tuple[str, ...] | None:
        """Names from ``root`` down to ``module``; None if it is no submodule (any more)."""
        if id(root) not in self._names:
            self._names[id(root)] = {id(child): name for name, child in root.named_modules()}
        name = self._names[id(root)].get(id(module))
        return None if name is None else tuple(part for part in name.split(".") if part)

    def is_parameter(self, node: fx.Node) -> bool:
        """True for a placeholder that is a parameter or a buffer."""
        return node.name in self.refs or node.name in self.loose

    def is_buffer(self, node: fx.Node) -> bool:
        """True for a placeholder that is a buffer of a module."""
        return node.name in self.refs and self.refs[node.name].is_buffer

    @property
    def roots(self) -> list[nn.Module]:
        """Root modules of the graph's parameters, in order of first use."""
        return [root for root, _ in self.root_sources.values()]

    def owner(self, add: fx.Node, parameters: Iterable[fx.Node]) -> tuple[nn.Module, tuple[str, ...]] | None:
        """The module that owns a residual add: (root, names down to the owner); None if nothing says it.

        The module stack of the add names it, unless the add stands in the frame's own module (empty stack) or in a
        body that several instances share (the stack is the first instance's, always). So the stack is believed only
        where it lies on the same line of descent as the longest common prefix of the branch's parameters.
        """
        refs = [self.refs[p.name] for p in parameters if p.name in self.refs and not self.refs[p.name].is_buffer]
        stacked = self._stack_owner(add)
        if not refs:
            return stacked
        root = refs[0].root
        refs = [ref for ref in refs if ref.root is root]
        common = refs[0].path
        for ref in refs[1:]:
            length = next((i for i, (a, b) in enumerate(zip(common, ref.path, strict=False)) if a != b), None)
            common = common[: min(len(common), len(ref.path)) if length is None else length]
        if stacked is not None and stacked[0] is root:
            name = stacked[1]
            if name == common[: len(name)] or common == name[: len(common)]:
                return stacked
        if not any(True for _ in self._get(root, common).children()) and common:
            common = common[:-1]  # a leaf (one Linear) is the branch itself: the add belongs to its parent
        return root, common

    def _stack_owner(self, add: fx.Node) -> tuple[nn.Module, tuple[str, ...]] | None:
        stack = add.meta.get("nn_module_stack") or {}
        for key in reversed(list(stack)):
            identity = str(key).split("@")[0]
            for root in self.roots:
                self.name_of(root, root)
                name = self._names[id(root)].get(int(identity)) if identity.isdigit() else None
                if name is not None:
                    return root, tuple(part for part in name.split(".") if part)
        return None

    @staticmethod
    def _get(root: nn.Module, path: tuple[str, ...]) -> nn.Module:
        return root.get_submodule(".".join(path))
