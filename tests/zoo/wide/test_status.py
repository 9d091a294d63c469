"""The committed table says what is so: the page is made from it, and each row comes out again when it is run."""

from __future__ import annotations

import pytest

from tests.zoo.wide import run, status, table
from tests.zoo.wide.catalogue import attempts

ROWS = status.load()


def test_the_page_is_made_from_the_list() -> None:
    assert table.PATH.read_text() == table.render(ROWS), "run: python -m tests.zoo.wide.table"


@pytest.fixture(scope="module")
def warm() -> None:
    run.warm()


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.status in ("converted", "refused", "wrong")], ids=lambda r: r.name
)
def test_status_is_the_committed_one(row: status.Row, warm: None) -> None:
    attempt = next(attempt for attempt in attempts() if attempt.name == row.name)
    now = status.row_of(run.apart(attempt, 240))
    assert row.agrees(now), f"now {now}; if that is right: tests.zoo.wide.run, .status and .table"
