"""What the benchmark of side streams makes of traces, and what it keeps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import schedule, traces
from mhc_compile.scheduler.contention import RANGE, SIZES


def kernel(name: str, start: float, seconds: float, stream: int = 7) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": seconds, "args": {"stream": stream}}


def test_what_ran_beside_another_kernel() -> None:
    events = [kernel("m", 0, 10), kernel("m", 12, 8), kernel("s", 8, 6, stream=20)]
    assert traces.overlap(events) == {"kernels": 3, "kernels_us": 24.0, "beside_another_us": 4.0}
    assert traces.overlap([]) == {"kernels": 0, "kernels_us": 0.0, "beside_another_us": 0.0}


def test_which_kernels_take_longer() -> None:
    """Inductor numbers its kernels: two of another number are the same."""
    off = [kernel("triton_poi_fused_1", 0, 5), kernel("mm", 5, 10), kernel("activate", 15, 5)]
    on = [kernel("triton_poi_fused_3", 0, 5), kernel("mm", 5, 12), kernel("activate", 5, 9), kernel("pre", 17, 1)]
    assert traces.changed(off, on) == {
        "activate": 4, "mm": 2, "pre": 1, "triton_poi_fused": 0, "all kernels": 7, "first to last": -2
    }  # fmt: skip


def test_what_is_measured_stands_for_every_shape() -> None:
    """Bytes grow with tokens: each shape lies within the range of a measured number of tokens; the tool measures them
    too."""
    assert {tokens for tokens, _ in SIZES} == set(schedule.MEASURED)
    for batch, length in schedule.SHAPES.values():
        assert any(tokens / RANGE <= batch * length <= tokens * RANGE for tokens in schedule.MEASURED)


@pytest.mark.parametrize(("model", "graphs", "usual", "name"), [
    ("4B", False, False, "schedule"), ("0.6B", False, False, "schedule-0.6B"),
    ("0.6B", False, True, "schedule-0.6B-usual"), ("4B", True, False, "schedule-inductor-graphs"),
])  # fmt: skip
def test_a_model_has_a_file_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, graphs: bool, usual: bool, name: str
) -> None:
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    clock = schedule.Clock(10.0)
    assert clock.fits("a", 1.0)
    assert not clock.fits("b", 20.0)
    asked = argparse.Namespace(
        model=model, inductor_graphs=graphs, usual=usual, layers=2, runs=3, variant="mhc", recompute="off", out=""
    )
    schedule.keep({"1x1024": {"auto": 1}}, asked, clock)
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith(f"{name}-")
    written = json.loads(path.read_text())
    assert written["results"]["left_out"] == ["b"]
    assert (written["model"], written["variant"], written["recompute"]) == (model, "mhc", "off")
