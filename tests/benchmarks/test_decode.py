"""The benchmark of few tokens: every row is in its result, measured or with the reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode, record
from benchmarks.chain import spelled, spelled_single_pass


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program without a GPU: a row takes ten seconds of a clock of ours, and that of inductor alone fails."""
    clock = [0.0]

    def measure(name: str, tokens: int, width: int) -> dict[str, Any]:
        clock[0] += 10
        if name.startswith("torch.compile"):
            raise RuntimeError("this one breaks")
        return {"us_a_site": 12.0, "sites": 8, "error": 0.004}

    monkeypatch.setattr(decode, "measure", measure)
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def results_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["decode", *arguments])
    decode.main()
    results: dict[str, Any] = json.loads(next(folder.glob("decode-*.json")).read_text())["results"]
    return results


def test_every_row_is_there(table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of(table, monkeypatch, "--seconds", "1000")
    assert list(results) == [f"{name}/T{t}/C{c}" for name in decode.ROWS for c in (4096, 2560) for t in decode.TOKENS]
    assert results["two launches, single_pass/T8/C2560"]["us_a_site"] == 12.0
    failed = {"status": "not measured: RuntimeError: this one breaks"}
    assert all(row == failed for key, row in results.items() if key.startswith("torch.compile, spelled"))
    assert capsys.readouterr().out.count("not measured") == 2 * len(decode.TOKENS)


def test_what_is_not_asked_for_and_what_would_begin_late(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--tokens", "1", "3", "--width", "4096", "--only", "two launches", "four launches", "--seconds", "25")
    results = results_of(table, monkeypatch, *asked)
    assert len(results) == len(decode.ROWS) * 2 * len({*decode.TOKENS, 3})
    measured = [key for key, row in results.items() if "us_a_site" in row]
    assert measured == ["two launches/T1/C4096", "two launches/T3/C4096", "four launches/T1/C4096"]
    assert results["four launches/T3/C4096"] == {"status": "not measured: 25 s were over"}
    unasked = {"status": "not measured: not asked for"}
    assert results["two launches/T8/C4096"] == results["torch.compile, spelled/T1/C4096"] == unasked
    assert capsys.readouterr().out.count("not measured: not asked for") == len(results) - 4


def test_what_the_rows_are_checked_against() -> None:
    for name, (_, reference, _, _) in decode.ROWS.items():
        assert reference is (spelled_single_pass if "single_pass" in name else spelled), name


def test_a_row_is_what_its_name_says() -> None:
    """How many launches follows from the fusions; two are for few tokens."""
    fusions = {name: fuse for name, (_, _, fuse, _) in decode.ROWS.items()}
    assert fusions["two launches"] is True
    assert isinstance(three := fusions["three launches"], tuple)
    assert isinstance(four := fusions["four launches"], tuple)
    assert "few_tokens" not in three
    assert set(three) - set(four) == {"activate_post"}
    assert isinstance(beside := fusions["three launches, Sinkhorn beside the norm"], tuple)
    assert set(beside) - set(four) == {"activate_beside_norm"}
    refused = {"status": "not measured: two launches are for at most 64 tokens"}
    assert decode.measure("two launches", 65, 64) == refused


def test_a_fusion_is_measured_beyond_its_limits() -> None:
    from mhc_compile.lowering import activate_beside_norm, activate_post

    limits = (activate_post.MOST, activate_beside_norm.LEAST)
    with decode.within_limits(9999):
        assert (9999, limits[1]) == (activate_post.MOST, activate_beside_norm.LEAST)
    with decode.within_limits(3):
        assert (limits[0], 3) == (activate_post.MOST, activate_beside_norm.LEAST)
    assert limits == (activate_post.MOST, activate_beside_norm.LEAST)
