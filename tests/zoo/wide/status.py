"""The machine-readable list of the wide zoo: read it, and rewrite it from the rows of a run.

    python -m tests.zoo.wide.status rows.jsonl ...      (rows as written by tests.zoo.wide.run --output)

A line of ``status.json`` holds what a test needs to make the example again (level of the configuration, rung of the
inputs) and what it must find: the status with its reason, and the number of sites.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("status.json")
_MACHINE = re.compile(r"0x[0-9a-f]+|\S*/site-packages/|/\S*/tests/")
_LENGTH = 200


@dataclass(frozen=True)
class Row:
    """One architecture.

    status: ``converted``; ``refused`` (by the backend, with its reason); ``unbuildable`` (the rules give no tiny model
    that runs plainly: the reason is the error of the most natural try); ``wrong`` (the sites are not the expected ones,
    or the numbers differ); ``limit`` (out of time or memory); ``untried`` (runs plainly, was not converted yet).
    sites: found. expected, post_norm: residual adds counted in the source, before and behind which the norm sits.
    cured: what a refused one is converted with, and how many sites that gives; empty if nothing was found.
    level, ladder: how small the configuration is made and which inputs are given (``shrink``, ``feed``).
    """

    name: str
    model: str
    kind: str = ""
    status: str = "unbuildable"
    sites: int | None = None
    expected: int | None = None
    post_norm: int | None = None
    reason: str = ""
    cured: str = ""
    level: int = 0
    ladder: int = 0

    def agrees(self, other: Row) -> bool:
        """True if a new run found what this row says (the words of an error of another library may change)."""
        same = (self.status, self.sites, self.cured) == (other.status, other.sites, other.cured)
        return same and (self.status != "refused" or self.reason == other.reason)


def load() -> list[Row]:
    """The committed list, by name."""
    return [Row(**row) for row in json.loads(PATH.read_text())] if PATH.exists() else []


def row_of(raw: dict[str, Any]) -> Row:
    """A row of a run without what differs from machine to machine (times, addresses, paths)."""
    known = {field.name for field in fields(Row)}
    row = Row(**{key: value for key, value in raw.items() if key in known and value is not None})
    reason = _MACHINE.sub("", " ".join(row.reason.split()))
    return Row(**{**asdict(row), "reason": reason[:_LENGTH]})


def write(rows: list[Row]) -> None:
    """One line a row, sorted by name, so that a change of one is a change of one line."""
    lines = [json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: row.name)]
    PATH.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main() -> None:
    """Merge the rows of the given files into the list; later rows of a name replace earlier ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="+")
    rows = {row.name: row for row in load()}
    for file in parser.parse_args().files:
        for line in Path(file).read_text().splitlines():
            row = row_of(json.loads(line))
            rows[row.name] = row
    write(list(rows.values()))
    print(len(rows), "architectures:", dict(Counter(row.status for row in rows.values())))


if __name__ == "__main__":
    main()
