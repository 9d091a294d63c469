"""The machine-readable list of the wide zoo: read it, and rewrite it from the rows of a run.

    python -m tests.zoo.wide.status rows.jsonl ...      (rows as written by tests.zoo.wide.run --output)

A line of ``status.json`` holds what a test needs to make the example again (level of the configuration, rung of the
inputs) and what it must find: the number of graphs, the expected number of sites (pre-norm) and of post-norm adds, or
the stage where the attempt ends and why.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("status.json")
ADDRESS = re.compile(r"0x[0-9a-f]+|/\S+/site-packages/")


@dataclass(frozen=True)
class Row:
    """One architecture. stage.

    "done", or the last step that was begun (config, build, forward, backward, capture, killed).
    """

    name: str
    model: str
    stage: str
    level: int = 0
    ladder: int = 0
    graphs: int | None = None
    expected: int | None = None
    post_norm: int | None = None
    parameters: int | None = None
    error: str = ""


def load() -> list[Row]:
    """The committed list, in the order of the registry."""
    return [Row(**row) for row in json.loads(PATH.read_text())]


def row_of(raw: dict[str, Any]) -> Row:
    """A row of a run without what differs from machine to machine (times, addresses, paths)."""
    known = {field.name for field in fields(Row)}
    row = Row(**{key: value for key, value in raw.items() if key in known and value is not None})
    error = ADDRESS.sub("", row.error).split("\n")[0][:160]
    return Row(**{**asdict(row), "error": error})


def main() -> None:
    """Merge the rows of the given files into the list; later rows of a name replace earlier ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="+")
    rows = {row.name: row for row in load()} if PATH.exists() else {}
    for file in parser.parse_args().files:
        for line in Path(file).read_text().splitlines():
            row = row_of(json.loads(line))
            rows[row.name] = row
    lines = [json.dumps(asdict(row)) for row in sorted(rows.values(), key=lambda row: row.name)]
    PATH.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    stages: dict[str, int] = {}
    for row in rows.values():
        stages[row.stage] = stages.get(row.stage, 0) + 1
    print(len(rows), "architectures:", stages, "one graph:", sum(row.graphs == 1 for row in rows.values()))


if __name__ == "__main__":
    main()
