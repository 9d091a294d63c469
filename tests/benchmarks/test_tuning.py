"""The benchmark of autotune: nothing of earlier runs is used, and the choices of this one are what is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tuning
from mhc_compile.cost import cache_file
from mhc_compile.lowering import tune

CACHES = ("MHC_COMPILE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def test_caches_are_empty_within_and_as_before_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHES[0], str(tmp_path))
    monkeypatch.delenv(CACHES[2], raising=False)
    before = {name: os.environ.get(name) for name in CACHES}
    with tuning.nothing_kept():
        inside = [os.environ[name] for name in CACHES]
        assert len(set(inside)) == 3
        assert not any(os.path.exists(folder) for folder in inside)
        assert not cache_file("tuning", "a GPU").is_relative_to(tmp_path)
    assert {name: os.environ.get(name) for name in CACHES} == before


def test_two_questions_of_a_kernel_are_two_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHES[0], str(tmp_path))
    for key in ("post T<=8192 bfloat16 n=4 aaaa", "post T<=8192 bfloat16 n=4 bbbb", "pre T<=64 cccc"):
        tune.keep("a GPU", key, tune.Choice("post", {"BC": 512}, 0.05, 1.5, 4), [{"BC": 512}])
    found = tuning.kept("a GPU")
    assert list(found) == ["post aaaa", "post bbbb", "pre cccc"]
    assert found["post aaaa"] == {"config": {"BC": 512}, "gain": 0.05, "seconds": 1.5, "tried": 4}


def test_what_is_told_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, Any] = {
        "kernels": {"post aaaa": {"config": {"BC": 512}, "gain": 0.05, "seconds": 1.5, "tried": 4}},
        "slowest_s": 1.5,
        "first_step_s": {"fixed": 30.0, "tuned": 35.0},
        "site_us": {"fixed": 200.0, "tuned": 190.0},
        "tuned_over_fixed": {"median": 0.95, "least": 0.94, "greatest": 0.96},
    }
    monkeypatch.setattr(tuning, "measure", lambda tokens, width, count: row)
    monkeypatch.setattr(tuning, "unit_us", lambda tokens, width: 10.0)
    monkeypatch.setattr(tuning, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["tuning", "--width", "64"])
    tuning.main()
    results = json.loads((tmp_path / "tuning.json").read_text())["results"]
    unasked = {"status": "not measured: not asked for"}
    assert results == {"64": row, "4096": unasked, "2560": unasked}
    out = capsys.readouterr().out
    for told in ("slowest kernel 1.50 s", "fixed 20.0 u, tuned 19.0 u; 0.9500", "{'BC': 512}", "C 4096: not measured"):
        assert told in out
