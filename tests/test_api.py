"""prepare and explain: the conversion without the compilation, and nothing else."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import FragmentError, NoSiteError, OptionError
from mhc_compile.model import hyper_connections
from tests.tiny import Block, Tiny, compiled, ids, tiny


def everything(model: nn.Module) -> tuple[Any, ...]:
    """All that a call may have changed."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(len(m._forward_pre_hooks), len(m._forward_hooks), m.training) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        copy.deepcopy(vars(getattr(model, "config", object)) if hasattr(model, "config") else None),
        torch.get_rng_state(),
    )


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    equal = a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0])
    return equal and a[1:4] == b[1:4] and torch.equal(a[4], b[4])


class Counting(Tiny):
    """A Tiny that says when it is really run."""

    runs: int = 0

    def forward(self, ids: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return super().forward(ids)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


def test_explain_changes_nothing() -> None:
    model = Counting(1)
    optimizer = torch.optim.AdamW(model.parameters())
    before, held = everything(model), [id(p) for p in optimizer.param_groups[0]["params"]]
    report = mhc_compile.explain(model, ids(), init="paper", collapse="learned")
    assert len(report.sites) == 2
    assert report.added["new"] == report.added["tensors"] == 13
    assert same(everything(model), before)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert model.runs == 0
    model(ids())


def test_prepare_registers_and_runs_nothing() -> None:
    model = Counting(1)
    state = torch.get_rng_state()
    assert mhc_compile.prepare(model, ids()) is model
    assert model.runs == 0
    assert torch.equal(torch.get_rng_state(), state)
    names = [name for name, _ in model.named_parameters()]
    before = [id(p) for p in model.parameters()]
    calls = []
    real = mhc_compile.backend.convert if hasattr(mhc_compile, "backend") else None
    assert real is None or callable(real)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(model)(ids())
    calls.append([id(p) for p in model.parameters()])
    assert calls == [before]
    assert [name for name, _ in model.named_parameters()] == names
    mhc_compile.prepare(model, ids())  # again: nothing to do
    assert [id(p) for p in model.parameters()] == before


def test_same_names_as_a_compiled_call() -> None:
    prepared, called = tiny(), tiny()
    mhc_compile.prepare(prepared, ids())
    compiled(called)(ids())
    for (a, p), (b, q) in zip(prepared.named_parameters(), called.named_parameters(), strict=True):
        assert a == b
        assert torch.equal(p, q)


def test_inputs_by_name_and_the_wrapper() -> None:
    model = tiny(layers=1)
    call = compiled(model)
    assert mhc_compile.prepare(call, {"ids": ids()}) is call
    assert len(list(hyper_connections(model))) == 2
    assert len(mhc_compile.explain(call, {"ids": ids()}).sites) == 2


def test_refusals_change_nothing() -> None:
    models: list[tuple[nn.Module, Tensor, type[Exception], dict[str, Any]]] = [
        (nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 16), NoSiteError, {}),
        (Broken(), torch.randn(2, 3, 16), FragmentError, {}),
        (tiny(layers=1), ids(), NoSiteError, {"exclude": ["*"]}),
        (tiny(layers=1), ids(), OptionError, {"stream": 4}),
    ]
    for model, x, error, options in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before, held = everything(model), len(optimizer.param_groups[0]["params"])
        with pytest.raises(error):
            mhc_compile.prepare(model, x, **options)
        torch._dynamo.reset()
        with pytest.raises(error):
            compiled(model, **options)(x)
        torch._dynamo.reset()
        assert same(everything(model), before)
        assert len(optimizer.param_groups[0]["params"]) == held
        model(x)


def test_explain_of_what_cannot_be_converted() -> None:
    report = mhc_compile.explain(tiny(layers=1), ids(), exclude=["*"])
    assert "residual add" in report.error
    assert report.left_alone, "the error's cure promises the reasons"
    assert "left alone" in str(report)
    report = mhc_compile.explain(Broken(), torch.randn(2, 3, 16))
    assert "not one graph" in report.error
    with pytest.raises(OptionError, match="streams"):
        mhc_compile.explain(tiny(layers=1), ids(), stream=4)
    with pytest.raises(OptionError, match="dictionary in the last place"):
        mhc_compile.explain(tiny(layers=1), ids=ids())


@pytest.mark.parametrize("look", [mhc_compile.prepare, mhc_compile.explain])
def test_other_sizes_than_the_first_call(look: Any) -> None:
    """Dynamo makes a size dynamic that it sees twice with different values; ours is not the first of them."""
    graphs: list[bool] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(any(not isinstance(value, Tensor) for value in inputs))
        return gm.forward

    model = tiny(layers=1)
    look(model, ids(3, 7))
    torch.compile(model, backend=backend)(ids(2, 5))
    assert graphs == [False]
    look(model, ids(4, 9))
    torch.compile(model, backend=backend)(ids(2, 6))
    assert graphs == [False, True], "what real calls have shown is remembered"


@pytest.mark.parametrize("look", [mhc_compile.prepare, mhc_compile.explain])
def test_the_model_is_let_go(look: Any) -> None:
    """Dynamo keeps the backends that it has seen; the one of a look at a model must not keep the model."""
    model = tiny(layers=1)
    seen = weakref.ref(model)
    look(model, ids())
    del model
    torch._dynamo.reset()
    gc.collect()
    assert seen() is None
