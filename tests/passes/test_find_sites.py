from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_compile import explain
from mhc_compile.convert import Conversion
from tests.passes import cases_starts  # noqa: F401 - registers its models
from tests.passes.cases import CASES, Case
from tests.passes.cases_models import MODELS, REFUSED, Refused
from tests.passes.models import Block, Lambda, Mlp, Stack, assert_same, conversions, parameters_of, report, run, tokens


@pytest.mark.parametrize("case", [*CASES, *MODELS], ids=str)
def test_case(case: Case) -> None:
    result = report(case.build(), *case.inputs(), **case.options)
    assert tuple(row.module for row in result.sites) == case.modules, str(result)
    assert result.chains == case.chains
    reasons = [refusal.reason for refusal in result.left_alone]
    assert len(reasons) == len(case.reasons), reasons
    for have, want in zip(reasons, case.reasons, strict=True):
        assert want in have


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case: Refused) -> None:
    result = explain(case.build(), *case.inputs())
    assert result.sites == []
    reasons = [refusal.reason for refusal in result.left_alone]
    assert len(reasons) == len(case.reasons), reasons
    for have, want in zip(reasons, case.reasons, strict=True):
        assert want in have


SPELLINGS = {
    "plus": lambda x, f: x + f,
    "branch first": lambda x, f: f + x,
    "iadd": lambda x, f: operator.iadd(x.clone(), f),
    "torch.add": torch.add,
    "alpha on the branch": lambda x, f: torch.add(x, f, alpha=0.5),
    "alpha on the carrier": lambda x, f: torch.add(f, x, alpha=0.5),
    "method": lambda x, f: x.add(f),
    "in-place method": lambda x, f: x.clone().add_(f, alpha=2.0),
    "in-place on the branch": lambda x, f: f.add_(x),
    "aten": torch.ops.aten.add.Tensor,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    add = SPELLINGS[name]
    gm, example, (outcome,) = conversions(Stack([Block(add), Block(add)]), [tokens()], [{"sinkhorn_iters": 2}])
    assert isinstance(outcome, Conversion), outcome
    assert [row.module for row in outcome.report.sites] == ["layers.0"] * 2 + ["layers.1"] * 2
    assert outcome.report.left_alone == []
    wanted = parameters_of(example)
    actual, expected = run(outcome.gm, outcome.inputs, wanted), run(gm, example, wanted)
    assert_same(actual[0], expected[0], 1e-5, 1e-5)
    assert_same(actual[1], expected[1], 1e-4, 1e-4)


def write_to_stream(layer: nn.Module, x: Tensor) -> Tensor:
    x = layer(x)
    x[:, :2] = 0.5
    return x


def write_to_a_view_of_it(layer: nn.Module, x: Tensor) -> Tensor:
    x = layer(x)
    x.flatten(0, 1).mul_(0.5)
    return x


@pytest.mark.parametrize("body", [write_to_stream, write_to_a_view_of_it])
def test_in_place_writes_are_refused_with_their_line(body: Callable[..., Tensor]) -> None:
    """Streams are copies: they would not see the write. What is converted all the same must keep its numbers."""
    gm, example, (outcome,) = conversions(Stack([Block(), Block()], body), [tokens()], [{"sinkhorn_iters": 2}])
    refusals = outcome.report.left_alone
    assert any("written in place at" in r.reason and "test_find_sites.py" in r.reason for r in refusals), refusals
    if isinstance(outcome, Conversion):
        assert_same(run(outcome.gm, outcome.inputs, [])[0], run(gm, example, [])[0], 1e-5, 1e-5)


def test_write_to_an_input_is_refused() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x += m.a(x)
        return m.b(x)

    result = explain(Lambda(forward, a=Mlp(), b=Mlp()), tokens(2, 5, 8))
    assert ["in place" in refusal.reason for refusal in result.left_alone] == [True]


@pytest.mark.parametrize(
    ("options", "modules", "reason"),
    [
        ({"include": ("layers.0",)}, ["layers.0"] * 2, "include"),
        ({"exclude": ("*.1",)}, ["layers.0"] * 2, "exclude"),
    ],
)
def test_globs(options: dict[str, Any], modules: list[str], reason: str) -> None:
    result = report(Stack([Block(), Block()]), tokens(), **options)
    assert [row.module for row in result.sites] == modules
    assert [reason in refusal.reason for refusal in result.left_alone] == [True, True]
