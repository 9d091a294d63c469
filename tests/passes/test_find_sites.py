from __future__ import annotations

import pytest

from mhc_compile import explain
from tests.passes.cases import CASES, Case
from tests.passes.cases_models import MODELS, REFUSED, Refused
from tests.passes.models import report


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
