"""The demo: its gain is the one of the paper, its text is real, and a short run ends with its table and its plot."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")
PATH = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mhc_demo", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mhc_demo"] = module  # its dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_gain_of_doubly_stochastic_mixes_is_one(demo: ModuleType) -> None:
    mix = torch.eye(4)[torch.randperm(4)].expand(2, 3, 4, 4) * 0.5 + 0.125
    for forward, backward in demo.gains([mix] * 5):
        assert (forward, backward) == pytest.approx((1, 1))


def test_gain_is_of_the_product_in_the_order_of_the_sites(demo: ModuleType) -> None:
    first, second = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, -3.0], [1.0, 1.0]])
    answer = demo.gains([first.expand(5, 2, 2), second.expand(5, 2, 2)])
    product = second @ first  # [[0, -3], [2, 1]]: signs count before the absolute value
    assert product.tolist() == [[0, -3], [2, 1]]
    assert answer == [(2, 2), (3, 2)]


def test_text_is_source_code_and_the_parts_are_apart(demo: ModuleType) -> None:
    train, held_out = demo.corpus()
    assert train.dtype == held_out.dtype == torch.uint8
    assert len(train) > 10 * len(held_out) > 1_000_000
    assert b"import " in bytes(train[:20_000].tolist())


@pytest.mark.slow
def test_a_short_run(demo: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    size = ["--layers", "2", "--hidden", "32", "--heads", "2", "--length", "16", "--batch", "2", "--steps", "9"]
    runs = demo.main(["--device", "cpu", "--out", str(tmp_path), *size])
    assert [run.name for run in runs] == ["plain", "HC", "mHC"]
    assert {len(run.losses) for run in runs} == {9}
    plain, free, constrained = runs
    assert plain.parameters < constrained.parameters == free.parameters
    assert plain.worst is None
    assert max(constrained.worst) < 1.1  # Sinkhorn leaves the columns a little off
    assert len(constrained.gains[1]) == 4
    assert (tmp_path / "demo.png").stat().st_size > 10_000
