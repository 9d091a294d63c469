"""The norm between a branch's input and its first matmul: what a replay of the input may give back with it.

Only a norm that is spelled out (``x.pow(2).mean(-1)``, ``x * rsqrt(v + eps)``, ``weight * x``) is taken: its reductions
are kept (one number a token), everything after them is element-wise and so the same bits whenever it is run. A norm
that is one call (``F.layer_norm``, ``F.rms_norm``) has its reduction inside, which a compiler may order differently in
the backward graph: it is left to the partitioner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx

from mhc_compile.cost import bytes_of, elements, is_view, target_name, value_of

_ELEMENTWISE = frozenset(
    "to float half bfloat16 double type type_as pow square mul add sub div truediv rsqrt sqrt neg reciprocal".split()
)
_REDUCTIONS = frozenset("mean var".split())


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm that starts at a branch input."""

    replayed: tuple[fx.Node, ...]
    """Element-wise nodes, in graph order."""
    reductions: tuple[fx.Node, ...]
    """Nodes whose few numbers are kept."""

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that others read."""
        inside = {*self.replayed, *self.reductions}
        return [node for node in self.replayed if any(user not in inside for user in node.users)]

    @property
    def result_bytes(self) -> int:
        """Bytes of what others read."""
        return sum(bytes_of(node) for node in self.results)


def find_norm(source: fx.Node, is_parameter: Callable[[fx.Node], bool]) -> Norm | None:
    """The norm of a branch input, None where the branch does not start with one that is spelled out."""
    inside = {source}
    reductions: list[fx.Node] = []
    pending = list(source.users)
    size = elements(value_of(source))
    while pending:
        node = min(pending)
        pending.remove(node)
        if node in inside or not _belongs(node, inside, size, is_parameter):
            continue
        inside.add(node)
        if target_name(node) in _REDUCTIONS:
            reductions.append(node)
        pending.extend(user for user in node.users if user not in pending)
    replayed = sorted(inside - {source, *reductions})
    norm = Norm(tuple(replayed), tuple(reductions))
    return norm if reductions and norm.results else None


def _belongs(node: fx.Node, inside: set[fx.Node], size: int, is_parameter: Callable[[fx.Node], bool]) -> bool:
    name = target_name(node)
    if node.op not in ("call_function", "call_method"):
        return False
    if name not in _ELEMENTWISE and name not in _REDUCTIONS and not (is_view(node) and name != "getitem"):
        return False
    if elements(value_of(node)) > size:
        return False
    return all(other in inside or is_parameter(other) for other in node.all_input_nodes)
