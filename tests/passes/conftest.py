"""What several of these tests ask for."""

from __future__ import annotations

import pytest
from torch import fx

import mhc_compile.convert
from mhc_compile.passes import PassContext, PassResult
from mhc_compile.passes.fold_norms import fold, fold_norms


def _fold_everywhere(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    return fold(gm, ctx, lambda named: "")


_fold_everywhere.__name__ = "fold_norms"


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass ``fold_norms`` folds on the CPU too, where no kernel runs its op."""
    order = [_fold_everywhere if step is fold_norms else step for step in mhc_compile.convert.ORDER]
    assert _fold_everywhere in order
    monkeypatch.setattr(mhc_compile.convert, "ORDER", order)
