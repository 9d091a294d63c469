"""A memory for what a node means: the patterns ask many times for each node while they search and nothing changes."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import fx

_Meaning = TypeVar("_Meaning")
_local = threading.local()


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Within it no node is edited (new ones may be made), so each is read once; this thread only, may be nested."""
    before = getattr(_local, "memory", None)
    _local.memory = {} if before is None else before
    try:
        yield
    finally:
        _local.memory = before


def remembered(read: Callable[[fx.Node], _Meaning | None]) -> Callable[[Any], _Meaning | None]:
    """``read`` for anything: None for what is no node; within ``unchanged()`` each node is read once."""

    @functools.wraps(read)
    def once(node: Any) -> _Meaning | None:
        if not isinstance(node, fx.Node):
            return None
        memory = getattr(_local, "memory", None)
        if memory is None:
            return read(node)
        if node not in memory:
            memory[node] = read(node)
        meaning: _Meaning | None = memory[node]
        return meaning

    return once
