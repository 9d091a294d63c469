"""The sample for another transformers is large enough, of known architectures, and its page has nothing unexplained."""

from __future__ import annotations

import re

from tests.zoo import sample
from tests.zoo.wide import status


def test_the_sample_and_its_page() -> None:
    assert len(set(sample.NAMES)) == len(sample.NAMES) >= 30
    assert set(sample.NAMES) <= {row.name for row in status.load()}
    pages = sorted(sample.DOCS.glob("models-*.md"))
    assert sample.page("5.17.0") in pages
    for page in pages:
        rows = re.findall(r"^\| (\S+) \| .*? \| \d* \| (\w+) \| (.*?) \|", page.read_text(), re.MULTILINE)
        assert [name for name, *_ in rows] == list(sample.NAMES)
        assert all(word == "converted" or (word == "refused" and reason) for _, word, reason in rows)
