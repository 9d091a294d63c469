"""The run of all benchmarks: its rows exist, what fails is told, and every GPU takes parts until none is left."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks import site, suite


def test_rows_and_commands_exist() -> None:
    assert set(suite.PARTS) >= {"site", "step", "memory", "raised", "decode", "schedule", "ops"}
    for name, part in suite.PARTS.items():
        module = importlib.import_module(f"benchmarks.{part.command[0]}")
        rows = getattr(module, "ROWS", ())
        assert set(part.ahead) <= set(rows), name
        if "--only" in part.command:
            assert set(part.command[part.command.index("--only") + 1 :]) <= set(rows), name
        for row in part.ahead:
            for more in part.each:
                command = suite.arguments_of(part, row, more)
                assert command[-2 - len(more) :] == [*more, "--only", row]
                assert command.count("--only") == 1
        assert suite.arguments_of(part)[2:] == [f"benchmarks.{part.command[0]}", *part.command[1:]]


def test_rows_without_time_are_named_before_a_part_is_stopped() -> None:
    for name, part in suite.PARTS.items():
        own = float(part.command[part.command.index("--seconds") + 1])
        assert own + 30 <= part.seconds, name


def test_what_compiles_long_is_compiled_ahead() -> None:
    """All rows of a site and of a step, but for those that compile nothing, a width at a time."""
    parts = suite.PARTS
    assert set(parts["site"].ahead) == {name for name in site.ROWS if not name.startswith("eager")}
    assert [more[1] for more in parts["site"].each] == [str(width) for width in site.WIDTHS]
    step = parts["step"]
    assert set(step.ahead) == set(step.command[step.command.index("--only") + 1 :])
    assert {"TileKernels", "torch.compile, spelled", "Liger"} <= set(step.ahead)
    assert suite.AHEAD_SECONDS + parts["site"].seconds <= 480


def test_what_fails_is_told(tmp_path: Path) -> None:
    suite.run([sys.executable, "-c", "print('here'); raise SystemExit(3)"], 0, tmp_path / "a", {}, 60)
    assert (tmp_path / "a").read_text().splitlines() == ["here", "exit status 3"]
    ready = "print('here', flush=True)"
    suite.run([sys.executable, "-c", f"import time\n{ready}\ntime.sleep(60)"], 0, tmp_path / "b", {}, 3)
    lines = (tmp_path / "b").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("here", "stopped after 3 s")
    assert any('File "<string>", line 3' in line for line in lines)  # where it was
    deaf = "import signal, time; signal.signal(signal.SIGABRT, signal.SIG_IGN)"
    suite.run([sys.executable, "-c", f"{deaf}\n{ready}\ntime.sleep(60)"], 0, tmp_path / "d", {}, 3)
    assert (tmp_path / "d").read_text().splitlines() == ["here", "stopped after 3 s"]
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['MHC_COMPILE_AUTOTUNE'], os.environ['X'])"
    suite.run([sys.executable, "-c", script], 1, tmp_path / "c", {"X": "y"}, 60)
    assert (tmp_path / "c").read_text() == "1 0 y\n"


def test_every_part_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = "import os; print(os.environ['BENCHMARK_RESULTS'])"
    monkeypatch.setattr(suite, "arguments_of", lambda part, row=None, more=(): [sys.executable, "-c", script])
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
