"""What every test can count on: a fixed seed, no code compiled by another test, no shell options, no old cache."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The same examples in every run: a test that fails on some days is a test of the day.
hypothesis.settings.register_profile("deterministic", derandomize=True)
hypothesis.settings.load_profile("deterministic")

_OWN_CACHE = "MHC_TEST_OWN_INDUCTOR_CACHE"


def pytest_configure(config: pytest.Config) -> None:
    """Give inductor a cache of this run (workers inherit it): an artefact of older source must not decide a test."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="mhc_inductor_")
        os.environ[_OWN_CACHE] = str(os.getpid())
    for name in [name for name in os.environ if name.startswith("MHC_COMPILE_")]:
        del os.environ[name]
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if os.environ.get(_OWN_CACHE) == str(os.getpid()):
        shutil.rmtree(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"), ignore_errors=True)
        del os.environ[_OWN_CACHE]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The same random numbers whatever ran before, and afterwards no compiled code (Dynamo keeps it by class)."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
