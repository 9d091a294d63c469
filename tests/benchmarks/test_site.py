"""The benchmark of a site: what can be said about it without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import record, site
from benchmarks.chain import Site, errors, make_inputs, spelled, spelled_transposed


def inputs() -> tuple[Tensor, list[Site]]:
    return make_inputs(24, 64, 2, device="cpu")


@pytest.mark.parametrize(("chain", "reference"), [(site.ours, spelled), (site.single_pass, site.single_pass)])
def test_our_chains_compute_what_they_are_checked_against(chain: Any, reference: Any) -> None:
    error = errors(chain, reference, *inputs(), checked=8)
    assert error["output"] < 0.01, error
    assert error["dx"] < 0.02, error


def test_errors_see_a_gradient_of_a_token_that_has_none() -> None:
    """All but the checked tokens have no gradient at the output; one that appears at the input is an error."""

    class Leak(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[:, 1] += 1
            return gradient

    good = errors(spelled, spelled, *inputs(), checked=8)
    bad = errors(lambda x, sites: spelled(Leak.apply(x), sites), spelled, *inputs(), checked=8)
    assert bad["dx"] > good["dx"] + 0.1
    assert bad["dphi"] == good["dphi"]


def test_the_transposed_chain_is_another() -> None:
    assert errors(spelled, spelled_transposed, *inputs(), checked=8)["output"] > 0.05


def test_rows_end_with_what_compiles_longest() -> None:
    names = list(site.ROWS)
    assert names[0] == "mhc"
    assert names[-1] == "torch.compile, spelled"
    assert names.index("Liger") < names.index("TileKernels") < names.index("eager, spelled")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program with rows that measure nothing, each of which takes ten seconds of a clock of ours."""
    clock = [0.0]

    def measure(row: site.Row, function: Any, tokens: int, width: int, count: int, u: float) -> dict[str, Any]:
        clock[0] += 10
        times = {"forward_us": 1.0, "both_us": 2.0, "forward_u": 1 / u, "both_u": 2 / u}
        return {**times, "sites": count, "first_s": 0.0, "errors": {"output": 0.0}}

    def chain(value: Any) -> site.Row:
        return site.Row(lambda log: value)

    two = site.Row(lambda log: min, sites=2)
    rows = {"one": chain(min), "two": two, "three": chain("not measured: not installed"), "four": chain(min)}
    monkeypatch.setattr(site, "ROWS", rows)
    monkeypatch.setattr(site, "measure", measure)
    monkeypatch.setattr(site, "unit_us", lambda tokens, width: 16.0)
    monkeypatch.setattr(site.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(site, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["site", *arguments])
    site.main()


def test_a_row_that_would_begin_late_is_named(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--width", "4096", "--seconds", "15")
    results = json.loads((table / "site.json").read_text())["results"]
    assert list(results) == ["one/4096", "two/4096", "three/4096", "four/4096"]
    assert results["one/4096"]["sites"] == 8
    assert results["two/4096"]["sites"] == 2
    assert results["three/4096"] == {"status": "not measured: 15 s were over"}
    printed = capsys.readouterr().out
    assert printed.count("not measured: 15 s were over") == 2
    assert "on 2 sites" in printed


def test_what_was_measured_is_kept_when_the_run_is_cut_off(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[str]] = []
    real = record.record

    def watched(name: str, results: dict[str, Any], *arguments: Any, **facts: Any) -> Path:
        written.append(list(results))
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(name, results, *arguments, **facts)

    monkeypatch.setattr(site, "record", watched)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--width", "4096", "2560")
    assert list(json.loads((table / "site.json").read_text())["results"]) == ["one/4096"]
    assert written == [["one/4096"], ["one/4096", "one/2560"]]


def test_a_row_that_fails_is_a_row(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("this one breaks")

    monkeypatch.setattr(site, "measure", fail)
    run(monkeypatch, "--only", "o*", "three", "--width", "2560", "--name", "part")
    results = json.loads((table / "part.json").read_text())["results"]
    assert results == {
        "one/2560": {"status": "not measured: RuntimeError: this one breaks"},
        "three/2560": {"status": "not measured: not installed"},
    }
    assert not list(table.glob("*.part"))
