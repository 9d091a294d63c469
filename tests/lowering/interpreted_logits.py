"""A training step whose coefficients are made again by their kernel, under the interpreter: test_interpreter.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from mhc_compile.config import Options
from mhc_compile.lowering import few_tokens
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from mhc_compile.passes import logits
from tests.passes import planned
from tests.passes.models import tokens
from tests.passes.planned import STATE, Run, model, same


class Kernels(Run):
    """The two graphs with kernels in them."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.log = LoweringLog()
        super().__init__(module, **options)

    def _see(self, name: str, graph: fx.GraphModule) -> Any:
        LowerPass(Options(), self.log)(graph.graph)
        graph.recompile()
        self.graphs[name] = graph.graph
        return graph.forward


@pytest.mark.parametrize(
    ("variant", "dtype"), [("mhc", torch.bfloat16), ("single_pass", torch.float32), ("identity", torch.float32)]
)
def test_bits(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (logits, few_tokens):
        monkeypatch.setattr(module, "FEW", 0)  # ten tokens take the kernels of many
    monkeypatch.setattr(planned, "tokens", lambda: tokens(dtype=dtype))
    bound = STATE * dtype.itemsize // 4
    runs = []
    for form in logits.FORMS:
        monkeypatch.setattr(logits, "FORMS", (form,))
        run = Kernels(model(1).to(dtype), variant=variant, init="paper", recompute=bound)
        sites = run.log.counts()["coefficients", "triton"]
        assert sites >= 2
        assert run.log.counts()["activate", "triton"] == (sites if form == "logits" else 0)
        assert run.result.logits.chosen == (form == "logits")
        runs.append(run)
    same(*runs)


def test_few_tokens_keep_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "FORMS", ("logits",))
    run = Kernels(model(1), recompute=STATE)
    assert run.log.counts()["activate", "triton"] == 0
    assert run.log.counts()["few tokens", "fused"] == 2
    assert "few tokens" in run.result.logits.refusal
