"""The rows of a benchmark. All of them are in its result from the start: a row without numbers says why it has none."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

Row = dict[str, Any]
"""What was measured, or only ``status``: why nothing was."""


def not_measured(reason: str | Exception) -> Row:
    """Of an error its text, without the user's stack that Dynamo adds: paths of one machine."""
    if isinstance(reason, Exception):
        told = str(reason).split("from user code")[0].strip()
        reason = f"{type(reason).__name__}: {told[:300]}"
    return {"status": f"not measured: {reason}"}


def blank(names: Iterable[str], asked: Iterable[str]) -> dict[str, Row]:
    """All rows in their order. Those that are asked for say that the run ended before them, until it comes to them."""
    wanted = set(asked)
    return {name: not_measured("the run ended before it" if name in wanted else "not asked for") for name in names}


def chosen(names: Iterable[str], patterns: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[str]:
    """The rows that `--only` asks for, * for anything; all of them without it. A pattern of no row is refused."""
    names = list(names)
    if not patterns:
        return names
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parser.error(f"no row {pattern!r}; there are {', '.join(map(repr, names))}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def attempt(measure: Callable[[], Row | str], start: float, seconds: float) -> Row:
    """What `measure` finds, or why there is nothing: it says so itself ("not measured: ..."), it fails, or `seconds`
    were over since `start` (of `time.perf_counter`) before it could begin."""
    if time.perf_counter() - start > seconds:
        return not_measured(f"{seconds:g} s were over")
    try:
        found = measure()
    except Exception as error:  # a row that fails is a row of the table, not the end of it
        return not_measured(error)
    return {"status": found} if isinstance(found, str) else found
