"""A process whose Triton interprets: TRITON_INTERPRET is read when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def interpreted(script: str) -> str:
    """What a script prints there; an assertion with its errors if it fails."""
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
