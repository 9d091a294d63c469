"""A benchmark's file of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record


def test_a_file_is_replaced_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "x.json"
    record.record("x", {"a": 1}, path, tokens=8)
    assert "written" in capsys.readouterr().out
    record.record("x", {"a": 1, "b": 2}, path, quiet=True, tokens=8)
    assert capsys.readouterr().out == ""
    written = json.loads(path.read_text())
    assert (written["benchmark"], written["tokens"], written["results"]) == ("x", 8, {"a": 1, "b": 2})
    with pytest.raises(TypeError):
        record.record("x", {"a": object()}, path, quiet=True)
    assert json.loads(path.read_text()) == written
    assert [other.name for other in path.parent.iterdir()] == ["x.json"]
