"""Every hand-written architecture of the zoo through the backend, end to end.

The right number of sites, the plain model's outputs and gradients at step 0, two training steps with a gradient on
every new parameter; or the refusal with its reason, and the same checks with the option that converts it. Where the
installed transformers break the graph of a model that is one graph in others, the refusal of its pieces is expected.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from mhc_compile import compat
from mhc_compile.errors import FragmentError, MhcError, NotConvertedWarning
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


def in_pieces(entry: Entry) -> bool:
    """True if Dynamo itself does not get the model as one graph here, whatever the backend."""
    example = entry.build(0)
    torch._dynamo.reset()
    try:
        torch.compile(example.model, backend="eager", fullgraph=True)(**example.inputs)
    except compat.unsupported_exceptions():
        return True
    return False


@pytest.mark.parametrize(("entry", "options"), convertible())
def test_converted(entry: Entry, options: dict[str, object]) -> None:
    example = entry.build(0)
    try:
        outcome = check(example, options)
    except FragmentError:
        if in_pieces(entry):
            return
        raise
    assert outcome.sites == entry.sites(example.model), outcome.reports
    assert len(outcome.reports) == entry.graphs
    assert outcome.problems == []


@pytest.mark.parametrize("entry", [e for e in entries() if e.status == "refused"], ids=lambda entry: entry.name)
def test_refused_with_its_reason(entry: Entry) -> None:
    example = entry.build(0)
    before = [name for name, _ in example.model.named_parameters()]
    compiled = torch.compile(example.model, backend="mhc", options=compiler(entry))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NotConvertedWarning)
        try:
            compiled(**example.inputs)
        except MhcError as error:
            caught = error
        else:
            assert in_pieces(entry), "it must be refused"
            assert any(issubclass(one.category, NotConvertedWarning) for one in told), "in silence"
            return
    if not (isinstance(caught, FragmentError) and in_pieces(entry)):
        given = [str(caught), *(refusal.reason for refusal in caught.report.left_alone)]
        assert any(entry.reason.lower() in reason.lower() for reason in given)
    assert caught.report.sites == []
    assert [name for name, _ in example.model.named_parameters()] == before
