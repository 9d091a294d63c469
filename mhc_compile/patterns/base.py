"""What every pattern has in common: pattern · check · replace.

A pattern finds candidates (``find``: analysis, returns data), and each candidate knows how to become one of our ops
(``replace``: builds nodes, changes no reader). ``passes.raise_chains`` checks the region that would go, lets the
numerical judge compare the two, and only then lets the new nodes take over. A refusal is data with a reason, never a
bare False.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes, Dims, flat

MAX_STREAMS = 16
"""More rows than this are no streams: a transport plan or a key axis has the same algebra, and is left alone."""


class Refused(Exception):
    """A chain that is almost one of ours, and the reason why it is left as it is."""

    def __init__(self, what: str, reason: str, node: fx.Node) -> None:
        super().__init__(f"{what}: {reason}")
        self.what, self.reason, self.node = what, reason, node


class Editor(Protocol):
    """How a pattern builds nodes (``capture.Builder`` is one): each gets its fake value and the anchor's place."""

    def at(
        self, *, after: fx.Node | None = None, before: fx.Node | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Insert after or before a node."""
        ...

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_function`` node."""
        ...

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_method`` node."""
        ...


@dataclass
class Candidate:
    """A recognised chain: what goes, what it read, and how to build what comes instead.

    what     the word for the report: sinkhorn, coefficients, pre, post, collapse, expand.
    outputs  the nodes whose readers will read the new op.
    inputs   the nodes that the region reads (activations; parameters are found by themselves).
    names    other nodes that stand for the (single) output: what an absorbed cast read.
    build    builds what comes instead, one node an output; it reads the inputs as they are in the graph.
    """

    what: str
    outputs: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    build: Callable[[Editor], tuple[fx.Node, ...]]
    names: tuple[fx.Node, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


class Unarrangeable(Exception):
    """A layout cannot be reached without sizes that only exist at run time."""


def arrange(edit: Editor, axes: Axes, node: fx.Node, have: Dims, want: Dims) -> fx.Node:
    """Bring a tensor with the named axes ``have`` into the layout ``want`` (same atoms) by views, none if it is there.

    Raises Unarrangeable if a dimension would have to be cut into two symbolic sizes.
    """
    dims = [axes.resolve(dim) for dim in have]
    target = [axes.resolve(dim) for dim in want]
    if sorted(flat(tuple(dims))) != sorted(flat(tuple(target))):
        raise Unarrangeable("the axes of the tensor are not those of the op")
    for i in reversed(range(len(dims))):
        if len(dims[i]) > 1 and dims[i] not in target:
            sizes = [axes.size(atom) for atom in dims[i]]
            symbolic = [k for k, size in enumerate(sizes) if not isinstance(size, int)]
            if len(symbolic) > 1:
                raise Unarrangeable("two axes of unknown size are flattened into one")
            for k in symbolic:
                sizes[k] = -1
            node = edit.method("unflatten", node, i, tuple(sizes))
            dims[i : i + 1] = [(atom,) for atom in dims[i]]
    if dims == target:
        return node
    for i in reversed(range(len(dims))):
        if not dims[i]:
            node = edit.method("squeeze", node, i)
            del dims[i]
    units = [unit for dim in target for unit in ([dim] if dim in dims else [(atom,) for atom in dim])]
    units = [unit for unit in units if unit]
    order = [dims.index(unit) for unit in units]
    if order != list(range(len(order))):
        node = edit.method("permute", node, *order)
    for position, dim in enumerate(target):
        if not dim:
            node = edit.method("unsqueeze", node, position)
            units.insert(position, ())
        elif units[position] != dim:
            node = edit.method("flatten", node, position, position + len(dim) - 1)
            units[position : position + len(dim)] = [dim]
    return node


def in_dtype(edit: Editor, node: fx.Node, dtype: Any) -> fx.Node:
    """The node, cast if its element type is another one."""
    return node if reading.dtype(node) == dtype else edit.method("to", node, dtype)


def tensors(nodes: Sequence[Any]) -> tuple[fx.Node, ...]:
    """The tensor nodes among some arguments, each once, in order."""
    return tuple(dict.fromkeys(node for node in nodes if reading.is_tensor(node)))


def last_cast(node: fx.Node) -> tuple[fx.Node, ...]:
    """The node and the casts that are its only reader, in order: the last one is what the others see.

    A cast to a wider type ends it. What was rounded before stays rounded, as in ``u.to(bf16)`` and then the norm's own
    ``.to(float32)``.
    """
    chain = [node]
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        op = reading.read(user)
        if op is None or op.kind != "cast":
            break
        if reading.dtype(user) != reading.dtype(chain[-1]) and reading.is_lossless(user, chain[-1]):
            break
        chain.append(user)
    return tuple(chain)
