"""The settings of a whole site measured ahead of time: on a GPU, all kernels, kept for a compile of the same sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mhc_compile.compat import triton_version
from mhc_compile.config import Options
from mhc_compile.lowering import tune
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.tune_ahead import tune_ahead, two_sites
from tests.lowering.graphs import lowered


def test_the_sites_are_sites_of_a_model() -> None:
    """Every op with its backward, as a widened model has them."""
    log, n, width = LoweringLog(), 2, 8
    tensors = [torch.randn(5, width), torch.randn(width, width), torch.ones(width), torch.randn(8, n * width)]
    tensors += [torch.randn(8), torch.ones(1)]
    out = lowered(two_sites(n), Options(lowering="native"), log, [])(*(one.requires_grad_() for one in tensors))
    out.sum().backward()
    ops = {op for op, _ in log.counts()}
    assert {f"{op}{side}" for op in ("coefficients", "pre_norm", "post") for side in ("", "_backward")} <= ops


@pytest.mark.gpu
@pytest.mark.skipif(not triton_version(), reason="needs Triton")
def test_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line was measured; a compile of the same sizes finds all of it on disk."""
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_chosen", {})
    lines = tune_ahead(2048, 1024)
    assert lines
    assert all("measured in" in line for line in lines), lines
    names = {line.split(":")[0] for line in lines}
    assert {"post", "project", "pre_norm_backward"} <= names, lines
    assert len(tune.kept(torch.cuda.get_device_name())) >= len(names)
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "_measured", None)
    session = tune.Session
    monkeypatch.setattr(tune, "Session", lambda report, **_: session(report))
    again = tune_ahead(2048, 1024)
    assert len(again) == len(lines)
    assert all(line.endswith("from disk") for line in again), again
