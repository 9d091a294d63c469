"""The benchmark of a site: what can be said about it without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import record, site
from benchmarks.chain import (
    Site,
    errors,
    make_inputs,
    over_eager,
    rms_norm,
    spelled,
    spelled_coefficients,
    spelled_single_pass,
    spelled_transposed,
)


def inputs() -> tuple[Tensor, list[Site]]:
    return make_inputs(24, 64, 2, device="cpu")


VARIANTS = [(site.ours, spelled), (site.single_pass, spelled_single_pass)]


@pytest.mark.parametrize(("chain", "reference"), VARIANTS)
def test_our_chains_compute_what_they_are_checked_against(chain: Any, reference: Any) -> None:
    error = errors(chain, reference, *inputs(), checked=8)
    assert error["output"] < 0.01, error
    assert error["dx"] < 0.02, error


@pytest.mark.parametrize(("chain", "reference"), VARIANTS)
def test_over_eager_compares_every_quantity(chain: Any, reference: Any) -> None:
    """Our native bodies keep float32 where eager rounds: no error is far above eager's own."""
    own, eager = (errors(one, reference, *inputs(), checked=8) for one in (chain, reference))
    over = over_eager(own, eager)
    assert list(over) == ["output", "dx", "dphi", "dbias", "dweight", "dalpha"]
    assert over["output"] == own["output"] / eager["output"]
    assert max(over.values()) <= 1.5, over


def test_single_pass_takes_the_weights_of_the_site_before() -> None:
    """A site with stream 0 as its branch input, then one with what the first computed; the last weights are unused."""
    x, sites = make_inputs(3, 16, 2, device="cpu")
    x, first, second = x.detach().double(), *([t.detach().double() for t in one] for one in sites)

    def behind(x: Tensor, u: Tensor, one: list[Tensor]) -> Tensor:
        _, post, comb = spelled_coefficients(x, one[:5])
        return post.unsqueeze(-1) * rms_norm(u, one[5]).unsqueeze(-2) + comb @ x

    middle = behind(x, x[..., 0, :], first)
    weights = spelled_coefficients(x, first[:5])[0]
    wanted = behind(middle, torch.einsum("bti,btic->btc", weights, middle), second)
    torch.testing.assert_close(spelled_single_pass(x, [tuple(first), tuple(second)]), wanted)  # type: ignore[list-item]  # six tensors
    alpha = sites[-1][2]
    total = spelled_single_pass(x.bfloat16(), sites).sum()
    assert torch.autograd.grad(total, alpha, allow_unused=True) == (None,)


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


def test_rows_begin_with_what_matters() -> None:
    names = list(site.ROWS)
    assert names[:6] == [
        "mhc", "mhc, single_pass", "eager, spelled", "eager, spelled single_pass", "TileKernels",
        "torch.compile, spelled",
    ]  # fmt: skip
    assert names[-1] == "mhc, opaque launches"
    for name, row in site.ROWS.items():
        ours = name.startswith("mhc")
        assert row.eager is ((spelled_single_pass if "single_pass" in name else spelled) if ours else None), name


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program with rows that measure nothing, each of which takes ten seconds of a clock of ours."""
    clock = [0.0]

    def measure(row: site.Row, function: Any, tokens: int, width: int, count: int, u: float) -> dict[str, Any]:
        clock[0] += 10
        times = {"forward_us": 1.0, "both_us": 2.0, "forward_u": 1 / u, "both_u": 2 / u}
        return {**times, "sites": count, "first_s": 0.0, "errors": {"output": 0.0}, "over_eager": {"output": 0.75}}

    def chain(value: Any) -> site.Row:
        return site.Row(lambda log: value)

    two = site.Row(lambda log: min, sites=2)
    rows = {"one": chain(min), "two": two, "three": chain("not measured: not installed"), "four": chain(min)}
    monkeypatch.setattr(site, "ROWS", rows)
    monkeypatch.setattr(site, "WIDTHS", (4096, 2560))
    monkeypatch.setattr(site, "measure", measure)
    monkeypatch.setattr(site, "unit_us", lambda tokens, width: 16.0)
    monkeypatch.setattr(site.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(site, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["site", *arguments])
    site.main()


UNASKED = {"status": "not measured: not asked for"}


def test_a_row_that_would_begin_late_is_named(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--width", "4096", "--seconds", "15")
    results = json.loads((table / "site.json").read_text())["results"]
    assert list(results) == [f"{name}/{width}" for name in site.ROWS for width in (4096, 2560)]
    assert results["one/4096"]["sites"] == 8
    assert results["two/4096"]["sites"] == 2
    assert results["three/4096"] == results["four/4096"] == {"status": "not measured: 15 s were over"}
    assert all(results[f"{name}/2560"] == UNASKED for name in site.ROWS)
    printed = capsys.readouterr().out
    assert printed.count("not measured: 15 s were over") == 2
    assert printed.count(UNASKED["status"]) == 4
    assert "on 2 sites" in printed
    assert "over eager output 0.75" in printed


def test_what_was_measured_is_kept_when_the_run_is_cut_off(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = record.record

    def watched(name: str, results: dict[str, Any], *arguments: Any, **facts: Any) -> Path:
        written.append(sum("both_u" in row for row in results.values()))
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(name, results, *arguments, **facts)

    monkeypatch.setattr(site, "record", watched)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--only", "one", "two")
    results = json.loads((table / "site.json").read_text())["results"]
    assert [key for key, row in results.items() if "both_u" in row] == ["one/4096"]
    assert results["two/2560"] == {"status": "not measured: the run ended before it"}
    assert results["four/2560"] == UNASKED
    assert written == [1, 2]


def test_a_row_that_fails_is_a_row(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("this one breaks")

    monkeypatch.setattr(site, "measure", fail)
    run(monkeypatch, "--only", "o*", "three", "--width", "2560", "--name", "part")
    results = json.loads((table / "part.json").read_text())["results"]
    assert {key: row for key, row in results.items() if row != UNASKED} == {
        "one/2560": {"status": "not measured: RuntimeError: this one breaks"},
        "three/2560": {"status": "not measured: not installed"},
    }
    assert not list(table.glob("*.part"))
