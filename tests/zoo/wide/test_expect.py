"""The count of residual adds from the source agrees with the hand-written rules of the published list."""

from __future__ import annotations

import pytest

from tests.zoo import Entry, published
from tests.zoo.wide import expect


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("entry", published(), ids=lambda entry: entry.name)
def test_source_count_equals_the_rule(entry: Entry) -> None:
    example = entry.build(0)
    counted = expect.count(example)
    by_rule = entry.sites(example.model)
    wanted = (0, by_rule) if entry.status == "refused" else (by_rule, 0)
    assert (counted.pre_norm, counted.post_norm) == wanted, counted.where
