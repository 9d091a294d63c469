"""The benchmarks of whole steps: which rows are measured, when, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import device, raised, step


def prepare(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: dict[Any, float]) -> None:
    """``module`` without a GPU: a row takes ten seconds of a clock of ours and a step the time that ``times`` says."""
    clock = [0.0]

    def measure(row: Any, *_: Any) -> dict[str, Any]:
        clock[0] += 10
        if str(row) not in times:
            raise RuntimeError("this one breaks")
        return {"step_ms": times[str(row)], "compile_s": 1.0, "peak_GiB": 1.0, "graphs": 1}

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.empty(0))


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    module.main()


def results_of(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())["results"]
    return results


def test_step_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(step, tmp_path, monkeypatch, {"None": 40.0, "{}": 42.0})
    run(step, monkeypatch, "--seconds", "25", "--name", "part")
    results = results_of(tmp_path / "part.json")
    assert list(results) == list(step.ROWS)
    assert results["plain, inductor"]["over_plain"] == 0
    assert results["mhc"]["over_plain"] == pytest.approx(0.05)
    assert results["mhc, single_pass"] == {"status": "failed: RuntimeError: this one breaks"}
    assert results["mhc, identity"] == {"status": "not measured: 25 s were over"}


def test_steps_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that slows down by a tenth while it is measured: the ratios do not see it, the single times do."""
    warmth, order = [1.0], []

    def median_us(call: Any, repeat: int, warmup: int, flush: bool) -> float:
        order.append(call)
        warmth[0] += 0.01
        return call() * 1000 * warmth[0]

    monkeypatch.setattr(device, "median_us", median_us)
    plain, ours = (lambda: 40.0), (lambda: 42.0)
    results: dict[str, Any] = {"plain, inductor": {"step_ms": 40.0}, "mhc": {"step_ms": 50.0}}
    step.compare(results, {"plain, inductor": plain, "mhc": ours})
    assert order[:4] == [plain, ours, ours, plain]
    assert results["mhc"]["over_plain"] == pytest.approx(0.05, abs=2e-3)
    least, greatest = results["mhc"]["least_and_greatest"]
    assert 0.03 < least < 0.05 < greatest < 0.07
    assert results["plain, inductor"]["over_plain"] == 0
    assert 42.0 < results["mhc"]["step_ms"] < 50.0


@pytest.mark.parametrize(("module", "rows"), [(step, ["plain, inductor", "mhc"]), (raised, ["eager", "mhc"])])
def test_rows_are_kept_when_the_run_is_cut_off(
    module: ModuleType, rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(module, tmp_path, monkeypatch, {"None": 40.0, "{}": 42.0, "mhc": 20.0})
    calls = []
    real = module.measure

    def cut_off(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(module, monkeypatch)
    assert list(results_of(tmp_path / f"{module.__name__.split('.')[1]}.json")) == rows


def test_raised_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(raised, tmp_path, monkeypatch, {"None": 60.0, "mhc": 20.0, "inductor": 30.0})
    run(raised, monkeypatch)
    written = json.loads((tmp_path / "raised.json").read_text())
    results = written["results"]
    assert list(results) == ["eager", "mhc", "torch.compile"]
    assert results["mhc"]["faster_than_eager"] == pytest.approx(3)
    assert results["mhc"]["faster_than_torch.compile"] == pytest.approx(1.5)
    assert (written["layers"], written["sites"], written["width"]) == (1, 2, 2560)


def test_raised_leaves_out_what_would_begin_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(raised, tmp_path, monkeypatch, {"None": 60.0, "mhc": 20.0})
    run(raised, monkeypatch, "--seconds", "15")
    results = results_of(tmp_path / "raised.json")
    assert results["torch.compile"] == {"status": "not measured: 15 s were over"}
    assert "faster_than_torch.compile" not in results["mhc"]


def test_the_raised_model_steps() -> None:
    pytest.importorskip("transformers")
    raised.training_step(None, layers=1, width=64, tokens=16, device="cpu")()
