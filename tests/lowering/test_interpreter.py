"""The kernels' numbers without a GPU: interpreted_*.py, each in a process with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_compile.compat import triton_version

HERE = Path(__file__).parent


def run_interpreted(cases: str, marked: str) -> None:
    """Run the tests of one file that a mark selects."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", marked, "-p", "no:cacheprovider",
         str(HERE / f"interpreted_{cases}.py")],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(not triton_version(), reason="Triton is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "cases", ["cases", "graphs", "few_tokens", "ops", "errors", "strides", "switches", "raised", "memory", "logits"]
)
def test_kernels_under_the_interpreter(cases: str) -> None:
    run_interpreted(cases, "not slow")


@pytest.mark.slow
@pytest.mark.skipif(not triton_version(), reason="Triton is not installed")
@pytest.mark.timeout(900)
def test_the_slow_ones_under_the_interpreter() -> None:
    run_interpreted("memory", "slow")
