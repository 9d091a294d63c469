"""Every hand-written architecture of the zoo through the backend, end to end.

The right number of sites, the plain model's outputs and gradients at step 0, two training steps with a gradient on
every new parameter; or the refusal with its reason, and the same checks with the option that converts it.
"""

from __future__ import annotations

import pytest
import torch

from mhc_compile.errors import MhcError
from tests.zoo import Entry, entries
from tests.zoo.convert import check

THROUGH_AUTOGRAD = ("llama", "qwen3-moe", "gpt-neox", "mamba2", "bert", "swin", "dit", "checkpointed")
"""Compiled by aot_eager (AOTAutograd, no code generation); the others run the rewritten graph as it is."""


def compiler(entry: Entry) -> dict[str, object]:
    return {"compiler": "aot_eager" if entry.name in THROUGH_AUTOGRAD else "eager"}


def convertible() -> list[object]:
    """(entry, options) of every conversion that must succeed."""
    return [
        pytest.param(entry, {**compiler(entry), **(entry.options if entry.status == "refused" else {})}, id=entry.name)
        for entry in entries()
        if entry.status == "converted" or entry.options
    ]


@pytest.mark.parametrize(("entry", "options"), convertible())
def test_converted(entry: Entry, options: dict[str, object]) -> None:
    example = entry.build(0)
    outcome = check(example, options)
    assert outcome.sites == entry.sites(example.model), outcome.reports
    assert len(outcome.reports) == entry.graphs
    assert outcome.problems == []


@pytest.mark.parametrize("entry", [e for e in entries() if e.status == "refused"], ids=lambda entry: entry.name)
def test_refused_with_its_reason(entry: Entry) -> None:
    example = entry.build(0)
    before = [name for name, _ in example.model.named_parameters()]
    compiled = torch.compile(example.model, backend="mhc", options=compiler(entry))
    with pytest.raises(MhcError) as caught:
        compiled(**example.inputs)
    report = caught.value.report
    given = [str(caught.value), *(refusal.reason for refusal in report.left_alone)]
    assert any(entry.reason.lower() in reason.lower() for reason in given)
    assert report.sites == []
    assert [name for name, _ in example.model.named_parameters()] == before
