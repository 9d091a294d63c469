"""The engines: what they take, whose memory is whose, and what is said when one is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mhc_compile.errors import LayoutError, MissingDependencyError, OptionError
from mhc_compile.lowering import mlir, mlir_engines
from mhc_compile.lowering.mlir_engines import Compiled, Slot

needs_torch_mlir = pytest.mark.skipif(importlib.util.find_spec("torch_mlir") is None, reason="needs torch-mlir")


class Several(nn.Module):
    """Results of several ranks and dtypes, one of them an input, one a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(6.0).reshape(2, 3))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return x @ self.weight, x, self.weight, ids > 3, x.sum(), ids * 2


def several() -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    return fx.symbolic_trace(Several()), (torch.randn(4, 2), torch.arange(5))


@needs_torch_mlir
@pytest.mark.parametrize("engine", ["wheel", "iree"])
def test_results_are_copies_in_their_own_dtype(engine: str) -> None:
    if engine == "iree" and mlir_engines.choose("auto") != "iree":
        pytest.skip("needs IREE")
    graph, inputs = several()
    compiled = mlir.compile_mlir(graph, *inputs, engine=engine)
    assert compiled.engine == engine
    for _ in range(3):  # a result that was freed twice, or not owned, shows at the latest now
        have, want = compiled(*inputs), graph(*inputs)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b)
        have[1].zero_()
        have[2].zero_()
    assert inputs[0].abs().sum() > 0
    assert graph.weight.sum() == 15


@needs_torch_mlir
def test_equal_results_are_freed_once() -> None:
    """The compiler makes one buffer of them."""

    class Equal(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2.0, x * 2.0

    x = torch.randn(3, 5)
    compiled = mlir.compile_mlir(fx.symbolic_trace(Equal()), x, engine="wheel")
    for _ in range(3):
        one, two = compiled(x)
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()


@needs_torch_mlir
def test_inputs_are_checked_and_made_contiguous() -> None:
    graph, (x, ids) = several()
    compiled = mlir.compile_mlir(graph, x, ids, engine="wheel")
    torch.testing.assert_close(compiled(x.t().contiguous().t(), ids)[0], graph(x, ids)[0])
    with pytest.raises(LayoutError, match="expected 2 inputs, got 1"):
        compiled(x)
    with pytest.raises(LayoutError, match=r"input 0 is torch\.float64"):
        compiled(x.double(), ids)
    with pytest.raises(LayoutError, match=r"input 1 is torch\.int64 \(6,\)"):
        compiled(x, torch.arange(6))


def test_a_weight_that_was_replaced_by_something_else_is_refused() -> None:
    compiled = Compiled(lambda *a: list(a), [torch.zeros(2)], [Slot(torch.float32, (3,))], "wheel")
    with pytest.raises(LayoutError, match="weight 0"):
        compiled()


def test_a_slot_knows_what_fits() -> None:
    slot = Slot(torch.float32, (2, None))
    assert slot.fits(torch.zeros(2, 9))
    assert not slot.fits(torch.zeros(3, 9))
    assert not slot.fits(torch.zeros(2))
    assert not slot.fits(torch.zeros(2, 9, device="meta"))
    assert not slot.fits(3)


def test_the_choice_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlir_engines.choose("wheel") == "wheel"
    with pytest.raises(OptionError, match="engine='gpu'"):
        mlir_engines.choose("gpu")
    there: dict[str, Any] = {"compiler": True, "runtime": False}
    monkeypatch.setattr(mlir_engines, "_has_iree", there.get)
    assert mlir_engines.choose("auto") == "wheel"
    with pytest.raises(MissingDependencyError, match="iree-base-runtime missing"):
        mlir_engines.choose("iree")
    there["runtime"] = True
    assert mlir_engines.choose("auto") == "iree"
