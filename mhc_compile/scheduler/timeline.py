"""A plan as text, and as a trace that chrome://tracing and ui.perfetto.dev open: predicted beside measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .assign import Interval, Plan

WIDTH = 72
STREAMS = ("main", "side", "communication")
_LETTER = {"matmul": "M", "attention": "A", "attention_backward": "A", "memory": "m", "communication": "C"}


def summary(plan: Plan) -> str:
    """One line: what is predicted."""
    name = f"{plan.name}: " if plan.name else ""
    least = f"critical path {plan.dag.span() * 1e3:.3f} ms"
    if not plan.moves:
        return f"{name}one stream: {plan.reason or 'no gain predicted'}; {plan.serial * 1e3:.3f} ms predicted, {least}"
    kinds: dict[str, int] = {}
    for move in plan.moves:
        kind = plan.dag.tasks[move.task].kind
        kinds[kind] = kinds.get(kind, 0) + 1
    moved = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    times = f"{plan.predicted * 1e3:.3f} ms predicted, {plan.serial * 1e3:.3f} ms on one, {least}"
    return f"{name}two streams: {moved} on the side; {times} (gain {plan.gain:.2%})" + (
        f"; {plan.reason}" if plan.reason else ""
    )


def text(plan: Plan, width: int = WIDTH) -> str:
    """The summary, and for a plan with moves a row a stream: one character is a part of the predicted time.

    M matmul, A attention, m memory, C communication, S a call on the side stream, x waiting, . nothing.
    """
    if not plan.moves:
        return summary(plan)
    rows = [summary(plan)]
    for stream in STREAMS:
        row = bars([one for one in plan.timeline if one.stream in (stream, "wait" if stream == "main" else stream)],
                   plan.predicted, width)  # fmt: skip
        if row.strip("."):
            rows.append(f"  {stream:<13} {row}")
    return "\n".join(rows)


def bars(intervals: Iterable[Interval], end: float, width: int = WIDTH) -> str:
    """Intervals as a row of characters; what covers most of a character's time gives its letter."""
    if end <= 0:
        return "." * width
    cover: list[dict[str, float]] = [{} for _ in range(width)]
    for one in intervals:
        letter = "x" if one.stream == "wait" else "S" if one.stream == "side" else _LETTER.get(one.kind, "m")
        first, last = one.start / end * width, one.end / end * width
        for cell in range(max(int(first), 0), min(int(last) + 1, width)):
            part = min(last, cell + 1) - max(first, cell)
            if part > 0:
                cover[cell][letter] = cover[cell].get(letter, 0.0) + part
    return "".join(max(cell, key=cell.__getitem__) if sum(cell.values()) > 0.3 else "." for cell in cover)


def trace_events(plan: Plan, process: int = 0, name: str = "predicted") -> list[dict[str, Any]]:
    """A plan's timeline as events of the Chrome trace format; times in microseconds."""
    rows = {stream: index for index, stream in enumerate(STREAMS)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    ]
    for stream, row in rows.items():
        events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": row, "args": {"name": stream}})
    for one in plan.timeline:
        events.append(
            {
                "ph": "X",
                "pid": process,
                "tid": rows.get(one.stream, 0),
                "name": f"wait for {one.name}" if one.stream == "wait" else one.name,
                "cat": one.kind,
                "ts": one.start * 1e6,
                "dur": (one.end - one.start) * 1e6,
            }
        )
    return events


def write_trace(path: Path, plans: Mapping[str, Plan], measured: Path | None = None) -> Path:
    """Write plans by name as one trace, beside a trace that torch's profiler has exported, if there is one.

    The measured events keep their own processes and times; the predicted ones start at the first measured kernel.
    """
    events: list[dict[str, Any]] = []
    start = 0.0
    if measured is not None:
        found = json.loads(measured.read_text(encoding="utf-8"))
        events = list(found["traceEvents"] if isinstance(found, dict) else found)
        start = min((one["ts"] for one in events if one.get("cat") == "kernel"), default=0.0)
    for index, (name, plan) in enumerate(plans.items()):
        for event in trace_events(plan, 900_000 + index, f"predicted: {name}"):
            events.append({**event, "ts": event["ts"] + start} if "ts" in event else event)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    return path
