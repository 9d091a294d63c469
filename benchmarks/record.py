"""Writes a benchmark's result as JSON, with the machine and the versions that made it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import torch

RESULTS = pathlib.Path(os.environ.get("BENCHMARK_RESULTS") or pathlib.Path(__file__).parent / "results")
_PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "tile-kernels", "tilelang", "mhc-compile")

_SETTINGS = ("MHC_COMPILE_", "TORCHINDUCTOR_", "CUBLAS_", "NCCL_", "CUDA_GRAPHS_")
"""What an environment variable begins with that may change a measurement."""


def _is_setting(name: str) -> bool:
    return name.startswith(_SETTINGS) and not name.endswith("_DIR")


def machine() -> dict[str, Any]:
    """GPU (or processor), core count, Python, and the versions of the packages that matter."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("BENCHMARK_COMMIT") or _commit(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _is_setting(name)},
        "command": " ".join(["python -m benchmarks." + pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]),
    }


def record(
    name: str, results: dict[str, Any], out: str | pathlib.Path = "", *, quiet: bool = False, **facts: Any
) -> pathlib.Path:
    """Write ``results`` to ``out`` or to benchmarks/results/<name>-<gpu or cpu>.json and return the path.

    A result lies in the file under ``results``, ``facts`` (sizes, what is measured) and ``machine`` beside it. The file
    is whole at any time: a run that writes after every row and is cut off keeps what it wrote last.
    """
    where = "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name().split()[-1].lower()
    path = pathlib.Path(out) if out else RESULTS / f"{name}-{where}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, **facts, "machine": machine(), "results": results}, indent=1) + "\n"
    whole = path.with_suffix(".part")
    whole.write_text(text)
    whole.replace(path)
    if not quiet:
        print(f"written: {path}")
    return path


def _commit() -> str | None:
    """The commit of the code, None outside of a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
