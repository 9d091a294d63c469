"""The report: fits a terminal, is JSON for tools, reaches the log and the structured trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import mhc_compile
from mhc_compile.backend import reports
from mhc_compile.config import resolve
from mhc_compile.passes.base import PassResult, Refusal
from mhc_compile.report import SiteRow, make_report, readable
from tests.tiny import compiled, ids, tiny

ROOT = Path(__file__).parent.parent
RUN = """
from tests.tiny import compiled, ids, tiny
compiled(tiny(layers=1))(ids())
"""


def test_fits_the_terminal() -> None:
    report = make_report("A" * 60, resolve({"streams": 2, "include": ["model.layers.*" * 5]}))
    for index in range(3):
        long = "model.language_model.layers.17.self_attention_block.inner"
        report.sites.append(SiteRow(0, index, long, "cross_attention", f"/a/long/path/to/modeling_{'x' * 50}.py:12345",
                                    "bfloat16[s27, s14, 163840]", f"{long}.mhc{index}"))  # fmt: skip
    report.left_alone.append(Refusal("residual add", "because " * 40, "file.py:3", "model.layers.0"))
    report.passes = [PassResult(f"pass_number_{i}", i, 0.1) for i in range(12)]
    report.error = "word " * 60
    assert max(map(len, str(report).splitlines())) <= 110
    real = mhc_compile.explain(tiny(layers=1), ids())
    assert max(map(len, str(real).splitlines())) <= 110
    assert "layers.0" in str(real)
    assert "tiny.py:" in str(real)


def test_json_there_and_back() -> None:
    report = mhc_compile.explain(tiny(layers=1), ids(), streams=2)
    data = json.loads(report.to_json())
    assert data["options"]["streams"] == 2
    assert data["set_by"]["streams"] == "options"
    assert data["set_by"]["variant"] == "default"
    assert [row["parameters"] for row in data["sites"]] == ["layers.0.mhc0", "layers.0.mhc1"]
    assert data["added"]["bytes"] == 4 * data["added"]["elements"]
    assert {p["name"] for p in data["passes"]} >= {"find_sites", "widen"}
    assert json.loads(report.to_json(indent=None)) == data


def test_who_set_what_is_shown() -> None:
    report = mhc_compile.explain(tiny(layers=1), ids(), streams=2, preset="single_pass")
    assert "streams=2 (options)" in str(report)
    assert "variant='single_pass' (preset:single_pass)" in str(report)


def test_numbers_are_right() -> None:
    model = tiny(layers=1)
    compiled(model)(ids())
    report = reports[-1]
    ours = [p for name, p in model.named_parameters() if ".mhc" in name]
    assert report.added == {
        "tensors": len(ours), "elements": sum(p.numel() for p in ours),
        "bytes": 4 * sum(p.numel() for p in ours), "new": 10,
    }  # fmt: skip
    torch._dynamo.reset()
    compiled(model)(ids())
    assert reports[-1].added["new"] == 0
    assert reports[-1].added["tensors"] == 10
    assert report.chains == 1
    assert [row.kind for row in report.sites] == [row.kind for row in reports[-1].sites]


def test_the_graph_is_text_and_repeats() -> None:
    first, second = (mhc_compile.explain(tiny(seed, layers=1), ids()).graph for seed in (0, 1))
    assert first == second
    assert "mhc.expand" in first
    assert "tiny.py:" in first
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert readable(graph).splitlines()[-1].startswith("output")


def test_torch_logs() -> None:
    environment = {**os.environ, "TORCH_LOGS": "+mhc_compile", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "2 sites in 1 chains widened" in result.stderr
    assert "mhc.post" in result.stderr


def test_structured_trace(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert '"name": "mhc_compile_report"' in text
    assert '"name": "mhc_compile_graph"' in text
