"""The benchmark of single kernels: none is missing, all of its calls run, and every row is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_compile.compat import triton_version

if not triton_version():
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks import ops
from mhc_compile.lowering.launch import KERNEL_OPS
from mhc_compile.ops import OPS
from tests.lowering.interpreter import interpreted

TINY = """
import json
from benchmarks import ops

found = {}
for name, case in ops.cases(16, 64, device="cpu", by_inductor=lambda call: call).items():
    outs = case.call()
    outs = outs if isinstance(outs, (list, tuple)) else [outs]
    written = sum(out.numel() * out.element_size() for out in outs if out is not None)
    found[name] = {"floor": case.floor, "tokens": case.tokens, "written": written / (case.tokens * 64 * 2)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tiny() -> dict[str, dict[str, float]]:
    """Every call of the benchmark for 16 tokens of 64 channels, under Triton's interpreter: its floor, and the bytes of
    its results, both in u."""
    found: dict[str, dict[str, float]] = json.loads(interpreted(TINY))
    return found


def test_every_kernel_has_a_benchmark(tiny: dict[str, Any]) -> None:
    names = {name.split(",")[0] for name in tiny}
    assert names >= {str(op).split(".")[1] for op in KERNEL_OPS}
    assert names >= set(OPS)
    assert set(ops.SWEEPS) <= set(tiny)


def test_a_floor_is_at_least_what_is_written(tiny: dict[str, Any]) -> None:
    """Where that is streams and branch outputs. Results for the backward, which nobody asks for here, are left out."""
    for name in ("post", "pre", "post_pre_norm", "replay, four sites", "streams_backward", "expand", "collapse"):
        assert tiny[name]["written"] < tiny[name]["floor"], name
    four = tiny["replay, four sites"]
    assert (four["written"], four["floor"]) == (16, 4 + 4 + 16), "one X is read, four y are, and four X' are written"
    for count, word in ((2, "two"), (3, "three"), (4, "four")):
        row = tiny[f"replay_normed, {word} sites"]
        statistics = 2 / 64  # a float32 number a token
        assert row["written"] == pytest.approx(count * (4 + 1 + statistics))
        assert row["floor"] == 4 + count * (1 + 4 + 1)
    assert all(row["floor"] > 0 for row in tiny.values())


def test_an_op_without_a_kernel_runs_by_inductor() -> None:
    x = torch.randn(16, 4, 64).bfloat16()
    rows = [ops._inductor_cases(x, lambda *shape: torch.ones(shape).bfloat16(), by)["collapse"]
            for by in (ops.through_inductor, lambda call: call)]  # fmt: skip
    assert torch.equal(*(row.call() for row in rows))  # type: ignore[call-overload]  # two tensors


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["ops", *arguments])
    ops.main()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program with three rows of which one fails."""

    def measure(case: ops.Case, u: float) -> dict[str, Any]:
        case.call()
        return {"us": 3.0, "u": 3 / (u * case.tokens), "floor_u": case.floor, "tokens": case.tokens}

    def fail() -> None:
        raise RuntimeError("this one breaks")

    rows = {"post": (nothing, 9.0, 8192), "pre": (fail, 5.0, 8192), "post_project": (nothing, 12.0, 64)}
    monkeypatch.setattr(ops, "cases", lambda tokens, width: {name: ops.Case(*row) for name, row in rows.items()})
    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(ops, "unit_us", lambda tokens, width: 0.001 * tokens)
    monkeypatch.setattr(ops, "RESULTS", tmp_path)
    return tmp_path


def nothing() -> None:
    """A call that does nothing."""


def test_every_row_is_kept(table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--width", "4096", "--only", "p*e", "post_project")
    results = json.loads((table / "ops.json").read_text())["results"]
    assert results["post/4096"] == {"status": "not measured: not asked for"}
    assert results["pre/4096"] == {"status": "not measured: RuntimeError: this one breaks"}
    assert results["post_project/4096"]["u"] == pytest.approx(3 / 0.064), "the u of its own 64 tokens"
    assert capsys.readouterr().out.count("not measured") == 2


def test_rows_are_kept_when_the_run_is_cut_off(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off() -> None:
        raise KeyboardInterrupt

    rows = {"post": nothing, "pre": cut_off}
    monkeypatch.setattr(ops, "cases", lambda *_: {name: ops.Case(call, 9.0, 8) for name, call in rows.items()})
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--width", "4096")
    results = json.loads((table / "ops.json").read_text())["results"]
    assert results["post/4096"]["us"] == 3.0
    assert results["pre/4096"] == {"status": "not measured: the run ended before it"}


def test_settings_that_are_tried_are_rows_of_their_own(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--width", "4096", "--sweep", "--only", "post")
    results = json.loads((table / "ops.json").read_text())["results"]
    tried = [key for key in results if key.startswith("post/4096/")]
    assert len(tried) == len(ops.SWEEPS["post"][2](8192, 4096)) > 0
    assert all(results[key]["us"] == 3.0 for key in tried)
