"""The run of all benchmarks: its rows exist, what fails is told, and every GPU takes parts until none is left."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks import suite


def test_rows_and_commands_exist() -> None:
    assert set(suite.PARTS) >= {"site", "step", "memory", "raised", "decode", "schedule", "ops"}
    for name, part in suite.PARTS.items():
        module = importlib.import_module(f"benchmarks.{part.command[0]}")
        rows = getattr(module, "ROWS", ())
        assert set(part.ahead) <= set(rows), name
        if "--only" in part.command:
            assert set(part.command[part.command.index("--only") + 1 :]) <= set(rows), name
        for row in part.ahead:
            assert suite.arguments_of(part, row)[-2:] == ["--only", row]
            assert suite.arguments_of(part, row).count("--only") == 1
        assert suite.arguments_of(part)[2:] == [f"benchmarks.{part.command[0]}", *part.command[1:]]


def test_what_fails_is_told(tmp_path: Path) -> None:
    suite.run([sys.executable, "-c", "print('here'); raise SystemExit(3)"], 0, tmp_path / "a", {}, 60)
    assert (tmp_path / "a").read_text().splitlines() == ["here", "exit status 3"]
    suite.run([sys.executable, "-c", "import time; time.sleep(60)"], 0, tmp_path / "b", {}, 0.5)
    assert (tmp_path / "b").read_text() == "stopped after 0.5 s\n"
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['MHC_COMPILE_AUTOTUNE'], os.environ['X'])"
    suite.run([sys.executable, "-c", script], 1, tmp_path / "c", {"X": "y"}, 60)
    assert (tmp_path / "c").read_text() == "1 0 y\n"


def test_every_part_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = "import os; print(os.environ['BENCHMARK_RESULTS'])"
    monkeypatch.setattr(suite, "arguments_of", lambda part, row=None: [sys.executable, "-c", script])
    names = list(suite.PARTS)[:3]
    suite.measure(names, 2, tmp_path)
    assert [(tmp_path / f"{name}.log").read_text() for name in names] == [f"{tmp_path}\n"] * 3
    assert sorted(line.split(":")[0] for line in capsys.readouterr().out.splitlines()) == sorted(names)
    suite.compile_ahead([suite.PARTS["raised"]], 2, 2, 60)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert not any(str(tmp_path) in line for line in said), "what is measured then goes elsewhere"


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["suite", "sites"])
    with pytest.raises(SystemExit):
        suite.main()
    assert "unknown part sites; there are memory, site" in capsys.readouterr().err
