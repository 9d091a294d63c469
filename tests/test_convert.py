"""One graph through the passes: what is kept of a refusal, and what is no model at all."""

from __future__ import annotations

import pytest
import torch

from mhc_compile import explain
from mhc_compile.convert import Conversion, as_error
from mhc_compile.errors import MhcError, NoSiteError, OptionError
from mhc_compile.model import hyper_connections
from tests.passes.models import Block, Mlp, Stack, conversions, tokens


def test_nothing_is_registered_before_the_commit() -> None:
    model = Stack([Block()])
    gm, _, (outcome,) = conversions(model, [tokens()], [{"streams": 2}])
    assert isinstance(outcome, Conversion)
    assert outcome.changed
    assert not list(hyper_connections(model))
    assert not any("mhc" in str(node.target) for node in gm.graph.nodes)


def test_a_model_without_a_site_is_an_error_that_keeps_its_report() -> None:
    _, _, (outcome,) = conversions(Stack([Mlp(), Mlp()]), [tokens()], [{}])
    assert isinstance(outcome, NoSiteError)
    assert outcome.report is not None
    assert "no residual add" in explain(Stack([Mlp()]), tokens()).error


@pytest.mark.parametrize("options", [{"streams": 1}, {"rewrite": False}])
def test_switched_off(options: dict[str, object]) -> None:
    gm, _, (outcome,) = conversions(Stack([Block()]), [tokens()], [options])
    assert isinstance(outcome, Conversion)
    assert not outcome.changed
    assert [n.name for n in outcome.gm.graph.nodes] == [n.name for n in gm.graph.nodes]


def test_a_function_over_loose_tensors_is_no_model() -> None:
    _, _, (outcome,) = conversions(lambda x: torch.relu(x) + x, [tokens()], [{}])
    assert isinstance(outcome, Conversion)
    assert not outcome.changed


def test_as_error() -> None:
    ours = OptionError("wrong")
    assert as_error(ours) is ours
    wrapped = as_error(KeyError("x"))
    assert type(wrapped) is MhcError
    assert "internal error" in str(wrapped)


def test_two_instances_have_their_own_parameters() -> None:
    models = [Stack([Block()]) for _ in range(2)]
    options = {"compiler": "eager", "streams": 2, "sinkhorn_iters": 1}
    for model in models:
        torch.compile(model, backend="mhc", options=options)(tokens())
    first, second = ({id(p) for _, h in hyper_connections(m) for p in h.parameters()} for m in models)
    assert len(first) == len(second) == 10
    assert not first & second
