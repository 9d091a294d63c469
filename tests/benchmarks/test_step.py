"""The benchmarks of whole steps: which rows are measured, when, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import device, raised, step


def prepare(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> None:
    """``module`` without a GPU: a row takes ten seconds of a clock of ours and a step the time that ``times`` says."""
    clock = [0.0]

    def measure(name: str, *_: Any) -> dict[str, Any]:
        clock[0] += 10
        if name not in times:
            raise RuntimeError("this one breaks")
        return {"step_ms": times[name], "compile_s": 1.0, "peak_GiB": 1.0, "graphs": 1}

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


def test_step_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(step, tmp_path, monkeypatch, {"plain, inductor": 40.0, "mhc": 42.0})
    asked = ["plain, inductor", "mhc", "mhc, single_pass", "mhc, identity"]
    run(step, monkeypatch, "--seconds", "25", "--name", "part", "--only", *asked)
    results = results_of(tmp_path / "part.json")
    assert list(results) == list(step.ROWS)
    assert results["plain, inductor"]["over_plain"] == 0
    assert results["mhc"]["over_plain"] == pytest.approx(0.05)
    assert results["mhc, single_pass"] == {"status": "not measured: RuntimeError: this one breaks"}
    assert results["mhc, identity"] == {"status": "not measured: 25 s were over"}
    unasked = {name for name, row in results.items() if row == {"status": "not measured: not asked for"}}
    assert unasked == set(step.ROWS) - set(asked)
    assert capsys.readouterr().out.count("not measured: not asked for") == len(unasked)


def test_an_unknown_row_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(step, monkeypatch, "--only", "mhc", "Tiger")
    assert "no row 'Tiger'; there are 'plain, inductor', 'mhc'" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "not measured: No module named 'tile_kernels'"
    monkeypatch.setattr(step, "build", lambda layers: torch.nn.Linear(1, 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setitem(step.ROWS, "TileKernels", step.by_peer(lambda: reason))
    assert step.measure("TileKernels", 1, torch.zeros(1, 4), False) == reason


def test_steps_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that slows down by a tenth while it is measured: the ratios do not see it, the single times do."""
    warmth, order = [1.0], []

    def median_us(call: Any, repeat: int, warmup: int, flush: bool, ahead: int) -> float:
        order.append(call)
        warmth[0] += 0.12 / step.ROUNDS
        return call() * 1000 * warmth[0]

    monkeypatch.setattr(device, "median_us", median_us)
    plain, ours, peer = (lambda: 40.0), (lambda: 42.0), (lambda: 80.0)
    results: dict[str, Any] = {"plain, inductor": {"step_ms": 40.0, "over_plain": 0.0}, "mhc": {"step_ms": 50.0}}
    results["peer"] = {"step_ms": 90.0}
    step.compare(results, {"plain, inductor": plain, "mhc": ours, "peer": peer})
    assert order[:4] == [plain, ours, ours, plain]
    assert order[2 * step.ROUNDS :][:4] == [plain, peer, peer, plain]
    assert len(order) == 4 * step.ROUNDS
    assert results["mhc"]["over_plain"] == pytest.approx(0.05, abs=2e-3)
    least, greatest = results["mhc"]["least_and_greatest"]
    assert 0.03 < least < 0.05 < greatest < 0.07
    assert results["plain, inductor"]["over_plain"] == 0
    assert 42.0 < results["mhc"]["step_ms"] < 50.0
    assert results["peer"]["over_plain"] == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize(
    ("module", "rows"), [(step, ["plain, inductor", "mhc"]), (raised, ["eager", "mhc"])], ids=["step", "raised"]
)
def test_rows_are_kept_when_the_run_is_cut_off(
    module: ModuleType, rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(module, tmp_path, monkeypatch, {"plain, inductor": 40.0, "eager": 40.0, "mhc": 42.0})
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
    results = results_of(tmp_path / f"{module.__name__.split('.')[1]}.json")
    assert [name for name, row in results.items() if "step_ms" in row] == rows
    later = [row for name, row in results.items() if name not in rows]
    assert later == [{"status": "not measured: the run ended before it"}] * (len(module.ROWS) - 2)


def test_raised_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(raised, tmp_path, monkeypatch, {"eager": 60.0, "mhc": 20.0, "torch.compile": 30.0})
    run(raised, monkeypatch)
    written = json.loads((tmp_path / "raised.json").read_text())
    results = written["results"]
    assert list(results) == ["eager", "mhc", "torch.compile"]
    assert results["mhc"]["faster_than_eager"] == pytest.approx(3)
    assert results["mhc"]["faster_than_torch.compile"] == pytest.approx(1.5)
    assert (written["layers"], written["sites"], written["width"]) == (1, 2, 2560)


def test_raised_names_what_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(raised, tmp_path, monkeypatch, {"eager": 60.0, "mhc": 20.0})
    run(raised, monkeypatch, "--seconds", "5", "--only", "mhc", "torch.compile")
    results = results_of(tmp_path / "raised.json")
    assert results["eager"] == {"status": "not measured: not asked for"}
    assert results["torch.compile"] == {"status": "not measured: 5 s were over"}
    assert set(results["mhc"]).isdisjoint({"faster_than_eager", "faster_than_torch.compile"})
    assert "not measured: not asked for" in capsys.readouterr().out


def test_the_raised_model_steps() -> None:
    pytest.importorskip("transformers")
    raised.training_step(None, layers=1, width=64, tokens=16, device="cpu")()
