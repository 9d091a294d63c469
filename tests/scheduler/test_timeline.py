"""A plan as text and as a trace."""

from __future__ import annotations

import json
from pathlib import Path

from mhc_compile.scheduler.assign import Interval, Plan, assign
from mhc_compile.scheduler.contention import Contention
from mhc_compile.scheduler.timeline import bars, summary, text, trace_events, write_trace
from tests.scheduler.test_assign import gradient, movable, table


def two_streams() -> Plan:
    return assign(gradient(4.0), movable, table(1.0))


def test_one_stream_says_why() -> None:
    plan = assign(gradient(), movable, table(-1.0))
    said = "one stream: no gain predicted; 9000.000 ms predicted, critical path 8000.000 ms"
    assert text(plan) == summary(plan) == said
    assert "nothing was measured of s" in text(assign(gradient(), movable, Contention("test")))


def test_two_streams_as_rows() -> None:
    first, main, side = text(two_streams(), width=8).splitlines()
    times = "8000.000 ms predicted, 12000.000 ms on one, critical path 8000.000 ms"
    assert first == f"two streams: 1 x s on the side; {times} (gain 33.33%)"
    assert main.split() == ["main", "MMMMMMMM"]
    assert side.split() == ["side", "....SSSS"]


def test_what_covers_most_of_a_character_gives_its_letter() -> None:
    rows = [Interval("main", "a", "memory", 0.0, 0.6), Interval("wait", "b", "s", 0.6, 1.0)]
    assert bars(rows, 2.0, 2) == "m."
    assert bars(rows, 1.0, 2) == "mx"
    assert bars([], 0.0, 3) == "..."


def test_a_trace_holds_every_interval() -> None:
    plan = two_streams()
    events = trace_events(plan, 7)
    spans = [one for one in events if one["ph"] == "X"]
    assert len(spans) == len(plan.timeline)
    assert {one["pid"] for one in events} == {7}
    assert max(one["ts"] + one["dur"] for one in spans) == plan.predicted * 1e6


def test_predicted_beside_measured(tmp_path: Path) -> None:
    measured = tmp_path / "measured.json"
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "ts": 500.0, "dur": 1.0, "pid": 0, "tid": 7}
    measured.write_text(json.dumps({"traceEvents": [kernel]}))
    path = write_trace(tmp_path / "new" / "trace.json", {"backward": two_streams()}, measured)
    events = json.loads(path.read_text())["traceEvents"]
    assert kernel in events
    names = [one["args"]["name"] for one in events if one["name"] == "process_name"]
    assert names == ["predicted: backward"]
    assert min(one["ts"] for one in events if one["ph"] == "X" and one["pid"] != 0) == 500.0
    assert json.loads(write_trace(tmp_path / "alone.json", {"f": two_streams()}).read_text())["displayTimeUnit"] == "ms"
