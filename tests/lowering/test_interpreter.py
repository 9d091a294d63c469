"""The kernels' numbers without a GPU: interpreted_*.py, each in a process with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_compile.compat import triton_version

HERE = Path(__file__).parent


@pytest.mark.skipif(not triton_version(), reason="Triton is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cases", ["cases", "graphs", "few_tokens", "ops"])
def test_kernels_under_the_interpreter(cases: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / f"interpreted_{cases}.py")],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
