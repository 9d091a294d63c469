"""The rows of a benchmark: none is lost, whatever becomes of it."""

from __future__ import annotations

import argparse
import time
from typing import Any

import pytest

from benchmarks.table import attempt, blank, chosen, not_measured


def test_every_row_is_there_from_the_start() -> None:
    assert blank(["a", "b", "c"], ["b"]) == {
        "a": {"status": "not measured: not asked for"},
        "b": {"status": "not measured: the run ended before it"},
        "c": {"status": "not measured: not asked for"},
    }


def test_what_only_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    parser, names = argparse.ArgumentParser(), ["mhc", "mhc, identity", "Liger"]
    assert chosen(names, None, parser) == chosen(names, [], parser) == names
    assert chosen(names, ["Liger", "mhc"], parser) == ["mhc", "Liger"], "in the order of the table"
    assert chosen(names, ["mhc*"], parser) == ["mhc", "mhc, identity"]
    with pytest.raises(SystemExit):
        chosen(names, ["liger"], parser)
    assert "no row 'liger'" in capsys.readouterr().err


def test_one_word_for_what_has_no_numbers() -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("x" * 1000)

    now = time.perf_counter()
    assert attempt(lambda: {"us": 1.0}, now, 60) == {"us": 1.0}
    assert attempt(lambda: "not measured: not installed", now, 60) == {"status": "not measured: not installed"}
    assert attempt(fail, now, 60) == {"status": "not measured: ValueError: " + "x" * 300}
    refused = RuntimeError("no ParameterList\n\nfrom user code:\n  File wrapped.py")
    assert not_measured(refused) == {"status": "not measured: RuntimeError: no ParameterList"}
    assert attempt(lambda: {"us": 1.0}, now - 61, 60) == {"status": "not measured: 60 s were over"}
