"""Kernels of a step as the profiler has seen them: on which stream, beside what, and how long on one stream."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mhc_compile.scheduler.assign import Plan
from mhc_compile.scheduler.timeline import write_trace

Events = list[dict[str, Any]]


def beside(path: Path, plans: list[Plan], measured: Events) -> None:
    """A trace of the predicted timelines and of measured events."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(measured, file)
        file.flush()
        write_trace(path, {plan.name: plan for plan in plans}, Path(file.name))


def traced(step: Callable[[], object]) -> Events:
    """The kernels and copies of one step under the profiler, as events of a trace."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as run:
        step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        run.export_chrome_trace(file.name)
        events: Events = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")]


def changed(off: Events, on: Events, top: int = 12) -> dict[str, float]:
    """Kernels whose time in a step is another with a plan, the most first: microseconds more. Then, of the whole step,
    what all kernels take and the span from the first to the last."""
    sums = []
    for events in (off, on):
        total: Counter[str] = Counter()
        for event in events:
            total[re.sub(r"_\d+$", "", event["name"])[:80]] += event["dur"]
        sums.append(total)
    more = {name: round(sums[1][name] - sums[0][name], 1) for name in sums[0] | sums[1]}
    most = dict(sorted(more.items(), key=lambda item: -abs(item[1]))[:top])
    spans = [max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events) for events in (off, on)]
    return {**most, "all kernels": round(sum(more.values()), 1), "first to last": round(spans[1] - spans[0], 1)}


def overlap(events: Events) -> dict[str, Any]:
    """Of the kernels of a trace, microseconds: what all of them take, and how much of it ran beside another. Not by
    stream: in the replay of a CUDA graph the branches are on streams of the graph's own choice."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    total, busy, end = 0.0, 0.0, float("-inf")
    for start, stop in spans:
        total += stop - start
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {"kernels": len(spans), "kernels_us": round(total, 1), "beside_another_us": round(total - busy, 1)}
